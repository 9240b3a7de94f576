"""Checkpoints that T5X itself writes and reads, where it is installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_peft import patching
from moe_peft.weights import formats, t5x_files

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

TOKENS = jnp.ones((1, 4), jnp.int32)
LAYOUTS = ("legacy", "orbax")


@pytest.fixture(autouse=True)
def rank_promotion():
    """T5X promotes ranks in its embedding."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(params=["t5", "scalable_t5"])
def network(request):
    # Importing T5X takes TensorFlow and tens of seconds.
    module = pytest.importorskip(f"t5x.examples.{request.param}.network")
    return module.Transformer(
        module.T5Config(
            vocab_size=32,
            emb_dim=16,
            num_heads=8,  # T5X splits them over the eight devices
            head_dim=4,
            mlp_dim=24,
            num_encoder_layers=2,
            num_decoder_layers=3,
            mlp_activations=("gelu", "linear"),
            dtype=jnp.float32,
        )
    )


def train_state(network, seed, optimizer=True):
    from t5x import adafactor, train_state

    variables = network.init(jax.random.key(seed), TOKENS, TOKENS, TOKENS, enable_dropout=False)
    if not optimizer:
        return train_state.InferenceState.create(variables)
    return train_state.FlaxOptimTrainState.create(adafactor.Adafactor(0.1), variables)


def checkpointer(layout, state, folder):
    from t5x import checkpoints, partitioning

    partitioner = partitioning.PjitPartitioner(num_partitions=1)
    if layout == "legacy":
        return checkpoints.Checkpointer(state, partitioner, str(folder))
    return checkpoints.OrbaxCheckpointManagerInterface(str(folder), state, partitioner)


def save(layout, state, folder):
    folder.mkdir()
    manager = checkpointer(layout, state, folder)
    manager.save(state)
    if layout == "orbax":
        manager.wait_until_finished()


def assert_equal(one, other):
    one, other = (patching.flatten(jax.device_get(tree)) for tree in (one, other))
    assert one.keys() == other.keys()
    assert len(one) > 20
    for path, leaf in one.items():
        assert leaf.dtype == other[path].dtype
        np.testing.assert_array_equal(leaf, other[path], err_msg=path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back(network, tmp_path, layout):
    # Adafactor wants rules for the kernels of scanned layers.
    state = train_state(network, 0, optimizer="scalable" not in type(network).__module__)
    save(layout, state, tmp_path / "theirs")
    assert formats.detect(tmp_path / "theirs") == "t5x"
    opened = t5x_files.open_folder(tmp_path / "theirs")
    report = opened.report()
    _, params = opened.read(scan_layers=opened.config.scan_layers)
    assert not report.missing
    assert not report.unused
    assert_equal(params, dict(state.params))
    # Through the other layout of layers and back: the fresh biases of scanned layers differ, which
    # an unscanned network cannot hold, so that way starts from the unscanned network.
    if not opened.config.scan_layers:
        scanned = opened.scanned(True)
        t5x_files.write(tmp_path / "scanned", scanned.config, scanned.leaves, layout=layout)
        opened = t5x_files.open_folder(tmp_path / "scanned").scanned(False)
    t5x_files.write(tmp_path / "ours", opened.config, opened.leaves, step=7, layout=layout)
    other = train_state(network, 1, optimizer=False)
    restored = checkpointer(layout, other, tmp_path / "ours").restore(step=7)
    assert_equal(dict(restored.params), dict(state.params))
    assert restored.step == 7

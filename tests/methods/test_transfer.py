"""From a multi-task run to a new task: what goes over, on whole networks, scanned and not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_peft import errors, methods, patching
from moe_peft.methods import transfer
from moe_peft.models import encoder_decoder, t5
from moe_peft.weights import identity

# Compiling costs more here than running.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SIZES = {
    "vocab_size": 32,
    "emb_dim": 8,
    "num_heads": 3,
    "head_dim": 4,
    "mlp_dim": 16,
    "num_encoder_layers": 2,
    "num_decoder_layers": 1,
}
RNG = np.random.default_rng(0)
BATCH = {
    name: RNG.integers(2, 32, (3, 5)).astype(np.int32)
    for name in ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
} | {"task_ids": np.array([0, 2, 1], np.int32)}


@functools.cache
def model_of(method, scan_layers=False):
    config = t5.T5Config(**SIZES, scan_layers=scan_layers)
    return encoder_decoder.EncoderDecoder(method.patch(t5.Transformer(config)), method=method)


@functools.cache
def shapes_of(method, scan_layers=False):
    init = functools.partial(
        model_of(method, scan_layers).init, batch_shapes=jax.tree.map(jnp.shape, BATCH)
    )
    return jax.eval_shape(init, jax.random.key(0))


def trained(method, scan_layers=False):
    """(frozen, trainable) far from their initial values."""
    rng = np.random.default_rng(1)
    draw = lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32)
    return method.split(jax.tree.map(draw, shapes_of(method, scan_layers)))


def moved(method, variant, trainable, scan_layers=False, task_weights=None):
    """The transferred method and what it starts from."""
    new = transfer.transferred(method, variant)
    shapes = shapes_of(new, scan_layers)
    return new, transfer.initial(new, trainable, shapes, jax.random.key(5), task_weights)


@functools.cache
def program(method, scan_layers):
    return jit(model_of(method, scan_layers).logits)


def logits(method, params, scan_layers=False, batch=BATCH):
    return program(method, scan_layers)(params, batch)


def without_logits(params):
    flat = {path: leaf for path, leaf in patching.flatten(params).items() if "router" not in path}
    return patching.trees.unflatten(flat)


poly = functools.partial(methods.poly, num_tasks=3, num_skills=4, rank=2, relaxed=False)
mhr = functools.partial(
    methods.mhr, num_tasks=3, num_skills=4, num_splits=4, rank=2, placement="light"
)


LORA = {"num_splits": 4, "placement": "light"}
IA3 = {"adapter": "ia3", "num_splits": 2}


@pytest.mark.parametrize(
    ("options", "scan_layers"),
    [
        (LORA, True),
        (IA3, False),
        pytest.param(LORA, False, marks=pytest.mark.slow),
        pytest.param(IA3, True, marks=pytest.mark.slow),
    ],
)
def test_mu_is_the_uniform_forward_as_one_adapter(options, scan_layers):
    method = poly(**options)
    frozen, trainable = trained(method, scan_layers)
    new, start = moved(method, "mu", trainable, scan_layers)
    assert new.name == "mhr_mu"
    assert new.rules == method.average.rules
    uniform = poly(routing="uniform", **options)
    expected = logits(
        uniform, without_logits(patching.merge(frozen, trainable)), scan_layers, BATCH
    )
    found = logits(new, patching.merge(frozen, start), scan_layers)
    neutral = jnp.ones_like if "adapter" in options else jnp.zeros_like
    plain = logits(new, patching.merge(frozen, jax.tree.map(neutral, start)), scan_layers)
    assert np.abs(expected - plain).max() > 1e-2
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("variant", "granularity"),
    [
        ("new_logits", "block"),
        ("z", "linear"),
        # Of shared routers: "block".
        pytest.param("z", "coder", marks=pytest.mark.slow),
        pytest.param("new_logits", "linear", marks=pytest.mark.slow),
        pytest.param("new_logits", "coder", marks=pytest.mark.slow),
        pytest.param("z", "block", marks=pytest.mark.slow),
    ],
)
def test_new_logits_are_fresh_and_modules_stay(variant, granularity):
    method = mhr(granularity=granularity)
    frozen, trainable = trained(method)
    new, start = moved(method, variant, trainable)
    flat, before = patching.flatten(start), patching.flatten(trainable)
    routers = {path for path in flat if path.endswith("/logits")}
    assert len(routers) == {"linear": 11, "coder": 2, "block": 3}[granularity]
    for path, leaf in flat.items():
        if path in routers:
            assert leaf.shape == (1, 4, 4)
            assert 0 < np.abs(leaf).max() <= 1e-3
        else:
            np.testing.assert_array_equal(leaf, before[path])
    assert len({leaf.tobytes() for path, leaf in flat.items() if path in routers}) == len(routers)
    # Fresh logits are nearly uniform; task ids no longer matter.
    _, averaged = moved(method, "mu", trainable)
    average = transfer.transferred(method, "mu")
    found = logits(new, patching.merge(frozen, start))
    expected = logits(average, patching.merge(frozen, averaged))
    np.testing.assert_allclose(found, expected, atol=2e-2)
    other = logits(
        new, patching.merge(frozen, start), batch=BATCH | {"task_ids": BATCH["task_ids"] + 7}
    )
    np.testing.assert_array_equal(found, other)

    _, learns = new.split(patching.merge(frozen, start))
    learns = set(patching.flatten(learns))
    assert learns == (routers if variant == "z" else set(flat))


def test_soup_of_one_task_is_that_tasks_private_adapter():
    method = methods.private(num_tasks=3, rank=2, placement="light")
    frozen, trainable = trained(method)
    new, start = moved(method, "soup", trainable, task_weights=np.array([0.0, 1.0, 0.0]))
    alone = BATCH | {"task_ids": np.array([1, 1, 1], np.int32)}
    np.testing.assert_allclose(
        logits(new, patching.merge(frozen, start)),
        logits(method, patching.merge(frozen, trainable), batch=alone),
        rtol=1e-4,
        atol=1e-4,
    )
    _, half = moved(method, "soup", trainable, task_weights=np.array([0.5, 0.5, 0.0]))
    _, first = moved(method, "soup", trainable, task_weights=np.array([1.0, 0.0, 0.0]))
    for path, leaf in patching.flatten(half).items():
        mean = (patching.flatten(first)[path] + patching.flatten(start)[path]) / 2
        np.testing.assert_allclose(leaf, mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [methods.lora(rank=2), methods.ia3(), methods.full()])
def test_keep_goes_on_with_the_same_leaves(method):
    _, trainable = trained(method)
    new, start = moved(method, "keep", trainable)
    assert new.name == method.name
    jax.tree.map(np.testing.assert_array_equal, start, trainable)


def test_descriptions_tell_transfers_apart():
    described = [transfer.transferred(mhr(), v).describe() for v in ("new_logits", "z", "mu")]
    assert len({str(d) for d in described}) == 3
    assert described[1]["transfer"]["source"] == mhr().describe()
    assert "transfer" not in mhr().describe()


@pytest.mark.parametrize(
    ("method", "variant", "message"),
    [
        (poly(), "zz", "Unknown variant 'zz'.*Did you mean 'z'"),
        (poly(), "keep", "routes by task. Choose 'new_logits'"),
        (methods.lora(), "z", "'lora' has no learned task routers"),
        (methods.private(num_tasks=3), "new_logits", "no learned task routers"),
        (methods.lora(), "mu", "'lora' has none. Choose 'keep'"),
        (poly(), "soup", "modules of single tasks"),
    ],
)
def test_variants_that_do_not_fit(method, variant, message):
    with pytest.raises(errors.UserError, match=message):
        transfer.transferred(method, variant)


def test_sources_that_do_not_fit():
    light = functools.partial(poly, placement="light")
    _, trainable = trained(light())
    with pytest.raises(errors.UserError, match="no parameter .*/lora_a"):
        moved(mhr(), "mu", {"a": {"adapter": {"lora_b": jnp.zeros(3)}}})
    other = light(num_skills=3)
    with pytest.raises(errors.UserError, match="has the shape .* expects"):
        moved(other, "z", trainable)
    private = methods.private(num_tasks=3, rank=2, placement="light")
    with pytest.raises(errors.UserError, match="2 task weights for 3 modules"):
        moved(private, "soup", trained(private)[1], task_weights=np.array([0.5, 0.5]))
    with pytest.raises(errors.UserError, match="go together"):
        moved(private, "soup", trained(private)[1])
    new = transfer.transferred(light(), "z")
    saved = {"method": light(num_skills=3).describe()}
    with pytest.raises(errors.UserError, match=r"run in /r .*num_skills is 3 in the checkpoint"):
        identity.check_source(new, saved, "/r")
    identity.check_source(new, {"method": light().describe()}, "/r")
    with pytest.raises(errors.UserError, match="does not say what it takes from /r"):
        identity.check_source(light(), saved, "/r")

"""Files of T-Few's (IA)3, made by hand: its formula, the command, and what is refused."""

import jax
import numpy as np
import pytest

from moe_peft import methods, patching
from moe_peft.cli import main
from moe_peft.convert import targets, tfew
from moe_peft.convert.peft import adapters
from moe_peft.models import encoder_decoder
from moe_peft.weights import identity, safetensors_files, saved_run

# Modules as transformers calls them, and our layers.
PLACES = {
    "encoder.block.{}.layer.0.SelfAttention.{}": "encoder/layers_{}/attention/{}",
    "encoder.block.{}.layer.1.DenseReluDense.{}": "encoder/layers_{}/mlp/{}",
    "decoder.block.{}.layer.0.SelfAttention.{}": "decoder/layers_{}/self_attention/{}",
    "decoder.block.{}.layer.1.EncDecAttention.{}": "decoder/layers_{}/encoder_decoder_attention/{}",
    "decoder.block.{}.layer.2.DenseReluDense.{}": "decoder/layers_{}/mlp/{}",
}
NAMES = {"k": "key", "v": "value"}


def vectors(toy):
    """{module: vector [outputs, 1]} of all places, and {module: layer}."""
    rng, found, layers = np.random.default_rng(0), {}, {}
    for theirs, ours in PLACES.items():
        for block in range(2 if theirs.startswith("encoder") else 1):
            for name in ("wi_1",) if "Dense" in theirs else ("k", "v"):
                module = theirs.format(block, name)
                size = toy.SIZES["mlp_dim"] if name == "wi_1" else toy.SIZES["emb_dim"]
                found[module] = (1 + 0.5 * rng.normal(size=(size, 1))).astype(np.float32)
                layers[module] = ours.format(block, NAMES.get(name, name))
    return found, layers


@pytest.fixture
def file(toy, writing, tmp_path):
    """A function that writes vectors as T-Few does, with a change to its keys."""

    def write(change=lambda key: key, more=()):
        found = {f"{module}.multi_lora_b": one for module, one in vectors(toy)[0].items()}
        path = tmp_path / "t03b_ia3_finish.pt"
        path.write_bytes(writing.of_arrays({change(k): v for k, v in found.items()} | dict(more)))
        return path

    return write


def base(toy):
    return adapters.Base("hf:somewhere", toy.network("t5_1_1").config, "of the toy")


def test_logits_are_those_of_scaled_kernels(toy, file):
    saved, network = tfew.read(file(), base(toy)), toy.network("t5_1_1")
    assert saved.description["method"] == identity.as_json(methods.ia3().describe())
    plain = toy.base_params(network)
    found = toy.logits(methods.ia3(), network, plain, saved.trainable, toy.batch())
    flat, (scales, layers) = patching.flatten(plain), vectors(toy)
    for module, vector in scales.items():  # hidden * multi_lora_b.flatten()
        kernel = flat[f"{layers[module]}/kernel"]
        flat[f"{layers[module]}/kernel"] = kernel * vector.reshape(kernel.shape[1:])
    logits = jax.jit(encoder_decoder.EncoderDecoder(network).logits)
    want = np.asarray(logits(patching.trees.unflatten(flat), toy.batch()))
    assert np.abs(want - logits(plain, toy.batch())).max() > 0.1 * np.abs(want).max()
    assert np.abs(found - want).max() < 1e-5 * np.abs(want).max()


def test_the_command(toy, file, tmp_path, capsys):
    path = safetensors_files.save_tree(
        toy.base_params(toy.network("t5_1_1")), tmp_path / "b.safetensors"
    )
    place, target = str(file()), tmp_path / "ia3.safetensors"
    assert targets.source(place) == targets.source(f"tfew:{place}")
    arguments = ["convert", "--from", place, "--to", str(target)]
    assert main.main(arguments) == main.USER_ERROR
    assert "name them with --base" in capsys.readouterr().err
    assert main.main([*arguments, "--base", str(path)]) == 0
    saved = saved_run.load(target)
    assert toy.same(saved.trainable, tfew.read(file(), base(toy)).trainable)
    assert saved.description["gin"] == ["METHOD = @methods.ia3()"]
    assert main.main([*arguments[:-1], "tfew:x"]) == main.USER_ERROR

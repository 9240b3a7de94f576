"""torch.save and torch.load of torch itself, bit for bit; where torch is installed."""

import json

import hypothesis
from hypothesis import strategies
import numpy as np
import pytest

from moe_peft import patching
from moe_peft.weights import formats, hugging_face, torch_files

torch = pytest.importorskip("torch", reason="needs torch")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

DTYPES = (
    *("float16", "bfloat16", "float32", "float64", "bool", "uint8", "int8", "int16", "int32"),
    *("int64", "uint16", "uint32", "uint64"),
)


def bits(tensor):
    """The bytes of a tensor of torch."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return flat.view(torch.uint8).numpy().tobytes()


@strategies.composite
def state_dicts(draw):
    """Tensors of every dtype, ties, views and Parameters among them."""
    torch.manual_seed(draw(strategies.integers(0, 1000)))
    found = {}
    for index in range(draw(strategies.integers(1, 6))):
        dtype = getattr(torch, draw(strategies.sampled_from(DTYPES)))
        shape = draw(strategies.lists(strategies.integers(0, 5), max_size=4))
        base = (torch.randn(shape) * 100).abs().to(dtype)
        found[f"layer.{index}.weight"] = base
        kind = draw(
            strategies.sampled_from(["alone", "tied", "turned", "cut", "parameter", "flat"])
        )
        if kind == "tied":
            found[f"layer.{index}.tied"] = base
        elif kind == "turned" and shape:
            found[f"layer.{index}.turned"] = base.movedim(0, -1)
        elif kind == "cut" and shape:
            start = draw(strategies.integers(0, shape[0]))
            found[f"layer.{index}.cut"] = base[start :: draw(strategies.integers(1, 3))]
        elif kind == "flat" and base.numel() > 1:
            found[f"layer.{index}.flat"] = base.reshape(-1)[1:]
        elif kind == "parameter":
            found[f"layer.{index}.weight"] = torch.nn.Parameter(base, requires_grad=False)
    return found


@hypothesis.settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    given=state_dicts(),
    is_zip=strategies.booleans(),
    protocol=strategies.sampled_from([2, 3, 4, 5]),
)
def test_every_bit_of_random_state_dicts(tmp_path, given, is_zip, protocol):
    path = tmp_path / "model.pt"
    if not is_zip:  # torch.load has no wide unsigned integers there; protocol 2 is the default
        given = {
            k: v for k, v in given.items() if v.dtype.itemsize == 1 or "uint" not in str(v.dtype)
        }
        protocol = 2
    torch.save(given, path, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
    loaded, found = torch.load(path, weights_only=False), torch_files.open_file(path)
    assert list(found) == list(loaded)
    for key, tensor in loaded.items():
        assert found[key].shape == tuple(tensor.shape)
        assert found[key].dtype.name == str(tensor.dtype).removeprefix("torch.")
        assert found[key].read().tobytes() == bits(tensor), key


def test_files_without_checksums(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(5.0)}, tmp_path / "a.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    found = torch_files.open_file(tmp_path / "a.bin")["a"].read()
    np.testing.assert_array_equal(found, np.arange(5, dtype=np.float32))


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_t5_of_transformers(tmp_path, is_zip, parts):
    """transformers 5 writes safetensors only, so its state dict is saved as version 4 did."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "d_model": 12, "num_heads": 3, "d_kv": 4, "d_ff": 20}
    sizes |= {"num_layers": 2, "num_decoder_layers": 2, "decoder_start_token_id": 0}
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    model.save_pretrained(tmp_path / "new")
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_bytes((tmp_path / "new" / "config.json").read_bytes())
    state, options = model.state_dict(), {"_use_new_zipfile_serialization": is_zip}
    assert "encoder.embed_tokens.weight" in state  # tied; safetensors have it once
    if parts == 1:
        torch.save(state, old / "pytorch_model.bin", **options)
    else:
        places = {key: f"pytorch_model-{n % 2}.bin" for n, key in enumerate(state)}
        for name in set(places.values()):
            torch.save({k: v for k, v in state.items() if places[k] == name}, old / name, **options)
        index = json.dumps({"metadata": {}, "weight_map": places})
        (old / "pytorch_model.bin.index.json").write_text(index)
    assert formats.detect(old) == "hf"
    one, other = hugging_face.read(tmp_path / "new"), hugging_face.read(old)
    assert one[0] == other[0]
    one, other = patching.flatten(one[1]), patching.flatten(other[1])
    assert one.keys() == other.keys()
    assert all(np.array_equal(leaf, other[path]) for path, leaf in one.items())


def test_what_torch_writes_but_no_state_dict_has(tmp_path):
    for name, value in {
        "float8_e4m3fn": {"a": torch.ones(2).to(torch.float8_e4m3fn)},
        "has 30 values": {"a": torch.ones(3).expand(10, 3)},
        "ComplexFloatStorage": {"a": torch.ones(2, dtype=torch.complex64)},
        "torch.nn.modules.linear.Linear": torch.nn.Linear(2, 2),
        "it has 2 dictionaries of tensors": {
            "model": {"a": torch.ones(2)},
            "b": {"a": torch.ones(2)},
        },
        "_rebuild_sparse_tensor": {"a": torch.ones(2).to_sparse()},
    }.items():
        torch.save(value, tmp_path / "a.bin")
        with pytest.raises(ValueError, match=f"a.bin cannot be read as torch's.*{name}"):
            torch_files.open_file(tmp_path / "a.bin")

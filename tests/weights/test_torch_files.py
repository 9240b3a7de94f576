"""Files of torch without torch: golden ones, folders of transformers and PEFT, live torch."""

import json
import pathlib
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from moe_peft import errors, patching
from moe_peft.weights import formats, hugging_face, safetensors_files, torch_files

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
FORMATS = ("zip", "serial")


def same(one, other):
    """Whether two files' tensors are the same by name, shape, dtype and every bit."""
    assert one.keys() == other.keys()
    for key, leaf in one.items():
        assert (leaf.shape, leaf.dtype) == (other[key].shape, other[key].dtype), key
        values = leaf.read()
        assert (values.shape, values.dtype) == (leaf.shape, leaf.dtype), key
        assert values.tobytes() == other[key].read().tobytes(), key
    return len(one)


@pytest.mark.parametrize("kind", FORMATS)
def test_golden_files_of_torch(kind):
    found = torch_files.open_file(GOLDEN / f"torch_{kind}.bin")
    assert same(found, safetensors_files.open_file(GOLDEN / "torch.safetensors")) == 21
    assert len({leaf.dtype for leaf in found.values()}) == 13
    assert found["matrix"].source.endswith(f"torch_{kind}.bin: matrix")
    np.testing.assert_array_equal(found["turned"].read(), found["matrix"].read().T)


def test_nothing_of_torch_or_pickle_is_imported():
    code = (
        "import sys\nfrom moe_peft.weights import torch_files\nbefore = set(sys.modules)\n"
        f"found = torch_files.open_file({str(GOLDEN / 'torch_zip.bin')!r})\n"
        "[leaf.read() for leaf in found.values()]\n"
        "print({name for name in set(sys.modules) - before if not name.startswith('encodings')})"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert output.stdout.decode().strip() == "set()"


def test_values_are_read_when_they_are_asked_for(tmp_path):
    path = tmp_path / "model.bin"
    shutil.copy(GOLDEN / "torch_zip.bin", path)
    found = torch_files.open_file(path)
    data = bytearray(path.read_bytes())
    name = next(one for one in zipfile.ZipFile(path).namelist() if one.endswith("data/2"))
    start = data.index(name.encode()) + len(name)
    start += data[start - len(name) - 2]  # the padding that aligns values
    data[start] ^= 1
    path.write_bytes(data)
    with pytest.raises(errors.UserError, match="model.bin.*another checksum.*copy it again"):
        found["float32"].read()
    found["float64"].read()
    path.write_bytes(data[:500])
    with pytest.raises(errors.UserError, match="model.bin.*it is cut short"):
        found["float64"].read()


def pickled(folder, writing, parts=1, kind="zip"):
    """Puts the weights of a folder into files of torch."""
    found = safetensors_files.open_file(folder / "model.safetensors")
    tensors = {key: leaf.read() for key, leaf in found.items()}
    (folder / "model.safetensors").unlink()
    places = {key: number % parts for number, key in enumerate(tensors)}
    name = lambda part: f"pytorch_model-{part + 1:05d}-of-{parts:05d}.bin"
    for part in range(parts):
        own = {key: array for key, array in tensors.items() if places[key] == part}
        target = folder / (name(part) if parts > 1 else "pytorch_model.bin")
        target.write_bytes(writing.of_arrays(own, kind))
    if parts > 1:
        index = {"metadata": {}, "weight_map": {key: name(part) for key, part in places.items()}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(("kind", "parts"), [("zip", 1), ("serial", 1), ("zip", 3), ("serial", 3)])
def test_folders_of_transformers(cfg, flat, tmp_path, writing, kind, parts):
    params = flat(cfg)
    folder = hugging_face.write(tmp_path / "a", cfg, params)
    pickled(folder, writing, parts, kind)
    assert formats.detect(folder) == "hf"
    config, read = hugging_face.read(folder)
    assert config == cfg
    read = patching.flatten(read)
    assert read.keys() == params.keys()
    assert all(np.array_equal(read[path], leaf) for path, leaf in params.items())
    again = hugging_face.write(tmp_path / "b", config, read)
    assert (again / "model.safetensors").exists()


def test_safetensors_come_first_and_a_file_may_stand_alone(cfg, flat, tmp_path, writing):
    folder = hugging_face.write(tmp_path / "a", cfg, flat(cfg))
    shutil.copytree(folder, tmp_path / "b")
    pickled(tmp_path / "b", writing)
    for name in ("t_few.pt", "t_few.pth", "t_few.bin"):
        (tmp_path / "b" / "pytorch_model.bin").rename(tmp_path / "b" / name)
        assert formats.detect(tmp_path / "b" / name) == "hf"
        opened = formats.open_backbone(tmp_path / "b" / name)
        assert (opened.config, len(opened.leaves)) == (cfg, len(flat(cfg)))
        (tmp_path / "b" / name).rename(tmp_path / "b" / "pytorch_model.bin")
    (folder / "pytorch_model.bin").write_bytes(b"no weights")
    hugging_face.read(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(errors.UserError, match="pytorch_model.bin cannot be read as torch's"):
        hugging_face.read(folder)


def test_an_index_names_files_next_to_it(cfg, flat, tmp_path, writing):
    folder = hugging_face.write(tmp_path / "a", cfg, flat(cfg))
    pickled(folder, writing, 2)
    path = folder / "pytorch_model.bin.index.json"
    index = json.loads(path.read_text())
    for odd in ("../a/pytorch_model-00001-of-00002.bin", "/etc/passwd", 3, ["x"], {}):
        places = index["weight_map"] | {"shared.weight": odd}
        path.write_text(json.dumps({"weight_map": places}))
        with pytest.raises(errors.UserError, match="from keys to files next to it"):
            hugging_face.read(folder)
    for odd in ("..", path.name):  # an index that names itself would never end
        path.write_text(json.dumps({"weight_map": {"shared.weight": odd}}))
        with pytest.raises(errors.UserError, match="cannot be read as safetensors"):
            hugging_face.read(folder)
    path.write_text(json.dumps(index))
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(errors.UserError, match="no such file next to it"):
        hugging_face.read(folder)


def test_a_state_dict_next_to_other_things(tmp_path, writing):
    inner = writing.state_dict(a=writing.tensor())[2:-1]
    number = lambda value: b"K" + bytes([value])
    optimizer = b"}(" + writing.text("state") + b"}(K\x00}K\x01Ns" + b"uu"
    pickle = writing.state_dict(state_dict=inner, epoch=number(3), optimizer=optimizer, none=b"N")
    for data in (writing.zipped(pickle), writing.serial(pickle)):
        (tmp_path / "last.ckpt.pt").write_bytes(data)
        found = torch_files.open_file(tmp_path / "last.ckpt.pt")
        assert found.keys() == {"a"}
        assert found["a"].source.endswith("last.ckpt.pt: state_dict/a")
        assert found["a"].read().tobytes() == bytes(range(24))

"""Writes torch_zip.bin and torch_serial.bin, as torch.save does, and torch.safetensors beside them.

    python tests/golden/make_torch_golden.py

One state dict with every dtype that is read, a Parameter, an empty tensor and one number, a
transposed and a strided view, two names for one tensor, and the versions that modules leave there.
The safetensors file holds the same values, each tensor by itself. torch 2.13 and safetensors 0.7
made these files; the keys of storages in the serial file are addresses, different in every run.
"""

import collections
import pathlib

import safetensors.torch
import torch

FOLDER = pathlib.Path(__file__).parent
DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64),
)


def state_dict():
    """Returns the tensors."""
    torch.manual_seed(0)
    found = collections.OrderedDict()
    for dtype in DTYPES:
        values = (torch.randn(2, 3) * 50).abs() if "uint" in str(dtype) else torch.randn(2, 3) * 50
        found[str(dtype).removeprefix("torch.")] = values.to(dtype)
    matrix = torch.randn(4, 5)
    found |= {"matrix": matrix, "tied": matrix, "turned": matrix.T, "view": matrix[1:, ::2]}
    found |= {"parameter": torch.nn.Parameter(torch.randn(3)), "empty": torch.zeros(0, 4)}
    found |= {"number": torch.tensor(3.5), "four_axes": torch.randn(2, 1, 3, 2).transpose(0, 3)}
    found._metadata = collections.OrderedDict({"": {"version": 1}, "layer": {"version": 2}})
    return found


if __name__ == "__main__":
    given = state_dict()
    torch.save(given, FOLDER / "torch_zip.bin")
    torch.save(given, FOLDER / "torch_serial.bin", _use_new_zipfile_serialization=False)
    alone = {key: one.detach().clone().contiguous() for key, one in given.items()}
    safetensors.torch.save_file(alone, FOLDER / "torch.safetensors")

"""Writes peft.npz: LoRA, (IA)3 and Poly as huggingface/peft computes them, values and gradients.

    python tests/golden/make_peft_golden.py

Three linear maps in torch, adapted by peft's own injection: LoRA on one, (IA)3 on the output of the
second, (IA)3 on the input of the third (peft's "feedforward" modules, as in T5 1.0's wo). Adapter
weights are moved off their initial values. Stored in our orientation: kernels [in, out], factors
[in, r] and [r, out].

Poly with one split and with several (MHR), in evaluation and in training, where the uniform numbers
behind its relaxed Bernoulli are given and stored. The factors have our shapes already; peft's
logits [tasks, splits * skills] are stored as [tasks, splits, skills]. Known differences from
`SkilledLoRA`, none of them in what is compared here:

* Fresh A: peft draws each split by itself, uniform within 1 / sqrt(in / splits); the papers' code
  and ours within 1 / sqrt(3 in).
* Scale: peft has 1 / r fixed, ours is alpha / r.
* peft always draws noise in training; ours is a setting (`relaxed`).
* peft clamps probabilities within 1.2e-7 of 0 and 1 before they become logits again.
"""

import pathlib
from unittest import mock

import numpy as np
import peft
import torch

IN, OUT, RANK, ALPHA = 5, 7, 2, 6
TARGET = pathlib.Path(__file__).with_name("peft.npz")
CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["layer"]),
    "ia3": lambda: peft.IA3Config(target_modules=["layer"], feedforward_modules=[]),
    "ia3_inputs": lambda: peft.IA3Config(target_modules=["layer"], feedforward_modules=["layer"]),
}


class Model(torch.nn.Module):
    """One frozen linear map."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(IN, OUT, bias=False)

    def forward(self, x):
        return self.layer(x)


def compute() -> dict[str, np.ndarray]:
    """Returns all arrays by name."""
    arrays = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = peft.inject_adapter_in_model(config(), Model())
        x = torch.randn(2, 3, IN, requires_grad=True)
        cotangent = torch.randn(2, 3, OUT)
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for parameter in trainable.values():
                parameter.add_(torch.randn_like(parameter))
        outputs = model(x)
        (outputs * cotangent).sum().backward()
        (kernel,) = (p for n, p in model.named_parameters() if "base_layer" in n)
        arrays |= {
            f"{name}/x": x,
            f"{name}/x_grad": x.grad,
            f"{name}/cotangent": cotangent,
            f"{name}/outputs": outputs,
            f"{name}/kernel": kernel.T,
        }
        for path, parameter in trainable.items():
            if "lora" in path:
                leaf, turn = ("lora_a" if "lora_A" in path else "lora_b"), lambda p: p.T
            else:
                leaf, turn = "vectors", lambda p: p.reshape(-1)
            arrays[f"{name}/{leaf}"] = turn(parameter)
            arrays[f"{name}/{leaf}_grad"] = turn(parameter.grad)
    return {name: value.detach().numpy().copy() for name, value in arrays.items()}


POLY_IN, POLY_OUT, TASKS, SKILLS = 8, 12, 5, 3
POLY_RUNS = {
    f"poly_{splits}_{mode}": (splits, mode) for splits in (1, 4) for mode in ("eval", "train")
}


class TaskModel(torch.nn.Module):
    """One frozen linear map that is told the task of each example."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(POLY_IN, POLY_OUT, bias=False)

    def forward(self, x, task_ids):
        return self.layer(x, task_ids=task_ids)


def compute_poly() -> dict[str, np.ndarray]:
    """Returns the arrays of Poly by name."""
    arrays = {}
    for name, (splits, mode) in POLY_RUNS.items():
        torch.manual_seed(1)
        config = peft.PolyConfig(
            r=RANK, n_tasks=TASKS, n_skills=SKILLS, n_splits=splits, target_modules=["layer"]
        )
        model = peft.inject_adapter_in_model(config, TaskModel()).train(mode == "train")
        x = torch.randn(4, 3, POLY_IN, requires_grad=True)
        cotangent = torch.randn(4, 3, POLY_OUT)
        task_ids = torch.tensor([3, 0, 4, 3])
        uniform = torch.rand(4, splits, SKILLS)
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for parameter in trainable.values():
                parameter.add_(torch.randn_like(parameter))
        with mock.patch("torch.rand", return_value=uniform):
            outputs = model(x, task_ids)
        (outputs * cotangent).sum().backward()
        (kernel,) = (p for n, p in model.named_parameters() if "base_layer" in n)
        arrays |= {
            f"{name}/x": x,
            f"{name}/x_grad": x.grad,
            f"{name}/task_ids": task_ids,
            f"{name}/uniform": uniform,
            f"{name}/cotangent": cotangent,
            f"{name}/outputs": outputs,
            f"{name}/kernel": kernel.T,
        }
        names = {"poly_lora_A": "lora_a", "poly_lora_B": "lora_b", "module_logits": "logits"}
        for path, parameter in trainable.items():
            (leaf,) = (ours for theirs, ours in names.items() if theirs in path)
            shape = (TASKS, splits, SKILLS) if leaf == "logits" else parameter.shape
            arrays[f"{name}/{leaf}"] = parameter.reshape(shape)
            arrays[f"{name}/{leaf}_grad"] = parameter.grad.reshape(shape)
    return {name: value.detach().numpy().copy() for name, value in arrays.items()}


if __name__ == "__main__":
    np.savez_compressed(TARGET, **compute(), **compute_poly())

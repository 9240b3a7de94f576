"""Writes peft.npz: LoRA and (IA)3 as huggingface/peft computes them, values and gradients.

    python tests/golden/make_peft_golden.py

Three linear maps in torch, adapted by peft's own injection: LoRA on one, (IA)3 on the output of the
second, (IA)3 on the input of the third (peft's "feedforward" modules, as in T5 1.0's wo). Adapter
weights are moved off their initial values. Stored in our orientation: kernels [in, out], factors
[in, r] and [r, out].
"""

import pathlib

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


if __name__ == "__main__":
    np.savez_compressed(TARGET, **compute())

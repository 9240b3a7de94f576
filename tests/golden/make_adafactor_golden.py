"""Writes adafactor.npz: six updates of transformers' Adafactor on leaves of one to four dimensions.

    python tests/golden/make_adafactor_golden.py

The settings of Poly and MHR: no relative step, no momentum, no weight decay. One run with and one
without parameter scaling. A leaf of zeros stands for a fresh LoRA's B, whose scale is then the
smallest allowed.
"""

import pathlib

import numpy as np
import torch
import transformers.optimization

TARGET = pathlib.Path(__file__).with_name("adafactor.npz")
SHAPES = {
    "one": (6,),
    "two": (4, 5),
    "zeros": (3, 4),
    "three": (2, 3, 4),
    "four": (2, 3, 5, 1),
}
STEPS, LEARNING_RATE = 6, 0.05


def compute() -> dict[str, np.ndarray]:
    """Returns all arrays by name: "start/<leaf>", "gradients/<leaf>" and "<run>/<leaf>"."""
    rng = np.random.default_rng(0)
    start = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    start["zeros"][:] = 0.0
    # Gradients of unequal size, so that the clip is at work in some updates.
    sizes = np.array([1.0, 0.1, 5.0, 1.0, 20.0, 0.5])
    gradients = {
        name: (rng.normal(size=(STEPS, *shape)).T * sizes).T.astype(np.float32)
        for name, shape in SHAPES.items()
    }
    arrays = {f"start/{name}": value for name, value in start.items()}
    arrays |= {f"gradients/{name}": value for name, value in gradients.items()}
    for scale in (True, False):
        params = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
        optimizer = transformers.optimization.Adafactor(
            params.values(),
            lr=LEARNING_RATE,
            scale_parameter=scale,
            relative_step=False,
            warmup_init=False,
        )
        for step in range(STEPS):
            for name, parameter in params.items():
                parameter.grad = torch.tensor(gradients[name][step])
            optimizer.step()
        run = "scaled" if scale else "unscaled"
        arrays |= {f"{run}/{name}": p.detach().numpy().copy() for name, p in params.items()}
    return arrays


if __name__ == "__main__":
    np.savez_compressed(TARGET, **compute())

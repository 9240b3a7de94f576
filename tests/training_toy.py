"""A model of three small matrices with the interface that training needs, and runs of it.

Run as a script it trains until it ends or is killed: the kill tests start it.
"""

import argparse
import dataclasses
import sys
import time

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moe_peft import methods
from moe_peft.partitioning import mesh as mesh_lib
from moe_peft.training import loop as loop_lib
from moe_peft.training import optimizers, schedules, train
from moe_peft.training import start as start_lib

WIDTH = 6
ROWS = 8


class Net(nn.Module):
    """Two layers; with adapters, a low-rank detour around the first."""

    has_adapter: bool

    @nn.compact
    def __call__(self, x, rng=None):
        hidden = _Dense(self.has_adapter, name="first")(x)
        if rng is not None:
            hidden = hidden * jax.random.bernoulli(rng, 0.9, hidden.shape)
        return nn.Dense(1, name="second")(jnp.tanh(hidden))[:, 0]


class _Dense(nn.Module):
    has_adapter: bool

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(0.5), (WIDTH, WIDTH))
        out = x @ kernel
        return out + _Adapter(name="adapter")(x) if self.has_adapter else out


class _Adapter(nn.Module):
    @nn.compact
    def __call__(self, x):
        lora_a = self.param("lora_a", nn.initializers.normal(0.5), (WIDTH, 2))
        lora_b = self.param("lora_b", nn.initializers.normal(0.5), (2, WIDTH))
        return x @ lora_a @ lora_b


@dataclasses.dataclass(frozen=True)
class Model:
    """Squared error; weights make the normalizer uneven between micro-batches."""

    net: Net

    def init(self, rng, batch_shapes):
        return self.net.init(rng, jnp.zeros(batch_shapes["x"]))["params"]

    def loss_sums(self, params, batch, dropout_rng=None):
        wrong = self.net.apply({"params": params}, batch["x"], dropout_rng) - batch["y"]
        weights = batch["weights"]
        loss_sum, total = jnp.sum(weights * jnp.square(wrong)), jnp.sum(weights)
        sums = {
            "nll": loss_sum,
            "z_loss": 0.0 * loss_sum,
            "right_tokens": jnp.sum(weights * (jnp.abs(wrong) < 0.5)),
            "right_targets": jnp.sum(jnp.abs(wrong) < 0.5).astype(jnp.float32),
            "tokens": total,
            "targets": jnp.float32(wrong.size),
        }
        return loss_sum, total, sums


MODEL, BASE_MODEL = Model(Net(True)), Model(Net(False))
ADAPTED = methods.Method("toy", trainable=".*/adapter/.*")


def batch(index, rows=ROWS, seed=0):
    """Batch number `index`, always the same."""
    rng = np.random.default_rng((seed, index))
    x = rng.normal(size=(rows, WIDTH)).astype(np.float32)
    y = np.sin(x.sum(axis=1)).astype(np.float32)
    return {"x": x, "y": y, "weights": rng.uniform(0.5, 2.0, size=rows).astype(np.float32)}


def open_batches(start, delay=0.0, **kwargs):
    """Endless batches from number `start` on."""
    while True:
        time.sleep(delay)
        yield batch(start, **kwargs)
        start += 1


def adamw(**kwargs):
    return optimizers.adamw(schedules.constant(1e-2), **kwargs)


def fit(model_dir, num_steps, method=ADAPTED, **overrides):
    """Trains the toy; `overrides` go to `train.fit` or into its settings."""
    names = {field.name for field in dataclasses.fields(loop_lib.Settings)}
    settings = {"batch_size": ROWS, "checkpoint_period": 4, "log_period": 3, "eval_period": 5}
    settings |= {k: overrides.pop(k) for k in list(overrides) if k in names}
    model = overrides.pop("model", BASE_MODEL if method.name == "full" else MODEL)
    defaults = {
        "backbone": "random:7",
        "open_batches": open_batches,
        "optimizer": adamw(),
        "mesh": mesh_lib.make_mesh(devices=jax.devices()[:1]),
        "described": {"model": {"width": WIDTH}, "data": {"seed": 0}},
    }
    return train.fit(
        start=lambda shapes: start_lib.Start(model, BASE_MODEL, method, shapes),
        model_dir=model_dir,
        settings=loop_lib.Settings(num_steps=num_steps, **settings),
        **(defaults | overrides),
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model_dir")
    parser.add_argument("num_steps", type=int)
    parser.add_argument("--delay", type=float, default=0.003, help="seconds a batch takes")
    args = parser.parse_args()
    fit(
        args.model_dir,
        args.num_steps,
        open_batches=lambda start: open_batches(start, args.delay),
        checkpoint_period=20,
        log_period=15,
        eval_period=25,
        eval_hook=lambda step, params: {"norm": float(jnp.linalg.norm(params["first"]["kernel"]))},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the benchmarks of train steps have in common: random batches, the frozen pass, a step."""

from collections.abc import Callable
import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moe_peft import methods, patching
from moe_peft.models import encoder_decoder
from moe_peft.training import optimizers
from moe_peft.training import step as step_lib

FROZEN = "frozen, forward and backward"


@dataclasses.dataclass(frozen=True)
class Call:
    """Something to time.

    Attributes:
      run: makes one step; returns its outputs, not yet waited for.
      num_trainable: parameters.
      compiled: the step's program.
      num_bytes: what lives from step to step: weights and optimiser.
    """

    run: Callable[[], object]
    num_trainable: int
    compiled: jax.stages.Compiled
    num_bytes: int


def make_batch(batch: int, inputs: int, targets: int, num_tasks: int) -> dict[str, np.ndarray]:
    """Random tokens without padding."""
    rng = np.random.default_rng(0)
    tokens = lambda length: rng.integers(2, 32000, (batch, length)).astype(np.int32)
    target = tokens(targets)
    return {
        "encoder_input_tokens": tokens(inputs),
        "decoder_target_tokens": target,
        "decoder_input_tokens": np.pad(target[:, :-1], ((0, 0), (1, 0))),
        "decoder_loss_weights": np.ones_like(target, np.float32),
        "task_ids": np.arange(batch, dtype=np.int32) % num_tasks,
    }


def frozen_call(module: nn.Module, params, batch) -> Call:
    """Loss of the bare network and the gradient with respect to all embedded tokens."""

    def loss(offset, params, batch):
        def add_offset(next_fun, args, kwargs, context):
            outputs = next_fun(*args, **kwargs)
            if context.module.name == "token_embedder" and context.method_name == "__call__":
                outputs = outputs + offset
            return outputs

        with nn.intercept_methods(add_offset):
            return encoder_decoder.EncoderDecoder(module).loss(params, batch)[0]

    offset = jnp.zeros((1, 1, module.config.emb_dim))
    step = jax.jit(jax.value_and_grad(loss)).lower(offset, params, batch).compile()
    return Call(lambda: step(offset, params, batch), 0, step, step_lib.num_bytes(params))


def method_call(
    method: methods.Method, module: nn.Module, backbone, batch, optimizer: optimizers.Optimizer
) -> Call:
    """One step of a method through the project's own train step.

    Args:
      method: what trains.
      module: the bare network.
      backbone: its parameters; those of `full` are given away.
      batch: on the device.
      optimizer: of the trainable tree.
    """
    network = encoder_decoder.EncoderDecoder(method.patch(module), method=method)
    shapes = jax.tree.map(jnp.shape, batch)
    fresh = jax.jit(lambda: method.split(network.init(jax.random.key(0), shapes))[1])
    frozen, trainable = ({}, backbone) if method.name == "full" else (backbone, fresh())
    built = optimizer.build(trainable, method.learning_rate_group)
    step = step_lib.make_train_step(network, built, patching.merge, use_dropout=False)
    holder = {"state": step_lib.create_state(trainable, built, seed=0)}
    compiled = step.lower(holder["state"], frozen, batch).compile()

    def run():
        holder["state"], metrics = compiled(holder["state"], frozen, batch)
        return holder["state"], metrics

    num_trainable = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    return Call(run, num_trainable, compiled, step_lib.num_bytes((holder["state"], frozen)))

"""The state of a run and one update of it: gradients, accumulation, metrics, a watch for NaN."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree, UInt32
import optax

from moe_peft.partitioning import layout as layout_lib

Batch = Mapping[str, Array]
Metrics = dict[str, Array]

ALL_FINITE = -1
LOSS_IS_BAD = -2


@flax.struct.dataclass
class TrainState:
    """The trainable tree, its optimiser state and the position in the run."""

    step: Int[Array, ""]  # number of updates made so far
    trainable: PyTree  # nested dict of the leaves that learn
    opt_state: PyTree  # the optimiser's state for exactly those leaves
    # Raw key of the run. Step s uses `fold_in(rng, s)`, so that a resumed run draws what the
    # uninterrupted one would have drawn.
    rng: UInt32[Array, "2"]


def create_state(
    trainable: PyTree, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
    """Returns the state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        opt_state=optimizer.init(trainable),
        rng=jax.random.key_data(jax.random.key(seed)),
    )


def leaf_names(tree: PyTree) -> list[str]:
    """Returns "encoder/layers_0/..." for every leaf, in the order of `jax.tree.leaves`."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]


def num_bytes(tree: PyTree) -> int:
    """Returns the size in bytes of the arrays (or abstract arrays) of a tree."""
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


TrainStep = Callable[[TrainState, PyTree, Batch], tuple[TrainState, Metrics]]


class Model(Protocol):
    """What a step needs of `models.encoder_decoder.EncoderDecoder`."""

    def loss_sums(
        self, params: PyTree, batch: Batch, dropout_rng: Array | None
    ) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns (loss sum, normalizer, metric sums); the normalizer is free of params."""
        ...


def make_train_step(
    *args: Any,
    layout: layout_lib.Layout | None = None,
    out_shardings: Any = None,
    compiler_options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> TrainStep:
    """Returns `make_update(*args, **kwargs)`, jitted; the layout splits activations.

    The state is donated, the frozen tree is not: it is never differentiated and stays as it is.
    Metrics are device arrays; nothing waits for them.
    """
    update = make_update(*args, **kwargs)
    if layout is not None:
        update = layout.with_axis_rules(update)
    options = {"out_shardings": out_shardings, "compiler_options": compiler_options}
    return jax.jit(update, donate_argnums=0, **options)


def compiler_options() -> dict[str, Any] | None:
    """Returns XLA's options for a step on the devices of this process.

    On a CPU the products are a library's, and the rest comes out the same, as fast, without the
    dear ones of LLVM's passes: a quarter of the compilation of a T5-small.
    """
    return {"xla_llvm_disable_expensive_passes": True} if jax.default_backend() == "cpu" else None


def make_update(
    model: Model,
    optimizer: optax.GradientTransformation,
    merge: Callable[[PyTree, PyTree], PyTree],
    num_microbatches: int = 1,
    learning_rates: Callable[[Int[Array, ""]], Mapping[str, Float[Array, ""]]] | None = None,
    use_dropout: bool = True,
) -> TrainStep:
    """Returns the step `(state, frozen, batch) -> (state, metrics)`, a pure function.

    Metrics are `loss_sum` and `normalizer` (their quotient is the objective), `sums/<name>` as the
    model reports them, `examples`, `grad_norm` (before clipping), `param_norm` (after the update),
    the learning rates by group, and `bad_leaf`: -1, or the index of the first gradient leaf (see
    `leaf_names`) that is not finite, or -2 where the loss itself is not while every gradient is.

    Args:
      model: gives the loss sums of a batch.
      optimizer: transforms the gradients of the trainable tree.
      merge: (frozen, trainable) -> the model's params.
      num_microbatches: K parts whose loss sums and normalizers are added before the one division,
        so that K parts are exactly one batch. Part i takes the rows i, i + K, i + 2K, ...: every
        device keeps its own rows.
      learning_rates: step -> {name: value}, reported as metrics.
      use_dropout: False trains without dropout and without stochastic routing.
    """

    def loss_sums(trainable, frozen, batch, rng):
        loss_sum, normalizer, sums = model.loss_sums(
            merge(frozen, trainable), batch, rng if use_dropout else None
        )
        return loss_sum, (normalizer, sums)

    gradients = _over_parts(jax.value_and_grad(loss_sums, has_aux=True), num_microbatches)

    def train_step(state, frozen, batch):
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        (loss_sum, (normalizer, sums)), grads = gradients(state.trainable, frozen, batch, rng)
        scale = 1.0 / jnp.maximum(normalizer, 1e-9)
        grads = jax.tree.map(lambda grad: grad * scale, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        leaf_norms = _squared_norms(grads)
        metrics = {
            "loss_sum": loss_sum,
            "normalizer": normalizer,
            "examples": jnp.asarray(jax.tree.leaves(batch)[0].shape[0], jnp.float32),
            "grad_norm": jnp.sqrt(jnp.sum(leaf_norms)),
            "param_norm": jnp.sqrt(jnp.sum(_squared_norms(trainable))),
            "bad_leaf": _first_bad_leaf(loss_sum, leaf_norms),
            **{f"sums/{name}": value for name, value in sums.items()},
            **(learning_rates(state.step) if learning_rates else {}),
        }
        new_state = state.replace(step=state.step + 1, trainable=trainable, opt_state=opt_state)
        return new_state, metrics

    return train_step


def _over_parts(gradients: Callable[..., Any], num_parts: int) -> Callable[..., Any]:
    """Returns `gradients`, a function of (trainable, frozen, batch, rng), as a sum over parts."""
    if num_parts == 1:
        return gradients

    def summed(trainable, frozen, batch, rng):
        def add_part(total, part):
            index, rows = part
            # A key of its own for every part: otherwise all would drop the same units.
            new = gradients(trainable, frozen, rows, jax.random.fold_in(rng, index))
            return jax.tree.map(jnp.add, total, new), None

        parts = jax.tree.map(lambda rows: _split_rows(rows, num_parts), batch)
        first = jax.tree.map(lambda rows: rows[0], parts)
        shapes = jax.eval_shape(gradients, trainable, frozen, first, rng)
        zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
        return jax.lax.scan(add_part, zeros, (jnp.arange(num_parts), parts))[0]

    return summed


def _split_rows(rows: Array, num_parts: int) -> Array:
    """[b, ...] -> [num_parts, b / num_parts, ...] without moving rows between devices."""
    by_part = rows.reshape(rows.shape[0] // num_parts, num_parts, *rows.shape[1:])
    return jnp.swapaxes(by_part, 0, 1)


def _squared_norms(tree: PyTree) -> Float[Array, "n"]:
    """Sum of squares of every leaf, in float32."""
    leaves = jax.tree.leaves(tree)
    return jnp.stack([jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in leaves])


def _first_bad_leaf(loss: Float[Array, ""], leaf_norms: Float[Array, "n"]) -> Int[Array, ""]:
    is_bad = ~jnp.isfinite(leaf_norms)
    without_gradient = jnp.where(jnp.isfinite(loss), ALL_FINITE, LOSS_IS_BAD)
    return jnp.where(jnp.any(is_bad), jnp.argmax(is_bad), without_gradient).astype(jnp.int32)

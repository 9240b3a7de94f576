"""What changes from step to step, and nothing else."""

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree, UInt32
import optax


@flax.struct.dataclass
class TrainState:
    """The trainable tree, its optimiser state and the position in the run.

    Attributes:
      step: number of updates made so far.
      trainable: nested dict of the leaves that learn.
      opt_state: the optimiser's state for exactly those leaves.
      rng: raw key of the run. Step s uses `fold_in(rng, s)`, so that a resumed run draws what the
        uninterrupted one would have drawn.
    """

    step: Int[Array, ""]
    trainable: PyTree
    opt_state: PyTree
    rng: UInt32[Array, "2"]


def create(trainable: PyTree, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
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

"""Adafactor's second moment as Hugging Face keeps it: factored over the last two dimensions."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree
import optax

from moe_peft import methods, patching, routing


class LastTwoState(NamedTuple):
    """Running means of squared gradients."""

    count: Array  # updates made
    # Per leaf {"row": [..., m], "column": [..., n]}, or {"all": the leaf's shape} unfactored.
    v: PyTree


def scale_by_last_two_rms(
    decay_rate: float, step_offset: int, min_dim_size_to_factor: int, epsilon: float
) -> optax.GradientTransformation:
    """Returns g -> g / sqrt(v), v [..., m, n] kept as its means over m and over n.

    v is approximated by row * column / mean(row), separately for every index of the dimensions
    before the last two (Shazeer and Stern 2018, algorithm 4, as `transformers.Adafactor` and
    fairseq have it). Leaves of one dimension, or with one below `min_dim_size_to_factor`, are not
    factored. At update t = 1, 2, ... the decay is 1 - (t - step_offset)^-decay_rate; `epsilon` is
    added to squared gradients.
    """

    def is_factored(shape):
        return len(shape) >= 2 and min(shape[-2:]) >= min_dim_size_to_factor

    def init(params):
        def zeros(leaf):
            if is_factored(leaf.shape):
                shapes = {"row": leaf.shape[:-1], "column": (*leaf.shape[:-2], leaf.shape[-1])}
            else:
                shapes = {"all": leaf.shape}
            return {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}

        return LastTwoState(jnp.zeros((), jnp.int32), jax.tree.map(zeros, as_published(params)))

    def update(updates, state, params=None):
        del params
        step = (state.count + 1 - step_offset).astype(jnp.float32)
        decay = 1.0 - step**-decay_rate

        def moments(grad, old):
            squares = jnp.square(grad.astype(jnp.float32)) + epsilon
            axes = {"row": -1, "column": -2, "all": ()}
            return {
                name: decay * old[name] + (1.0 - decay) * jnp.mean(squares, axis=axes[name])
                for name in old
            }

        def precondition(grad, v):
            if "all" in v:
                return grad * jax.lax.rsqrt(v["all"])
            row = v["row"] / jnp.mean(v["row"], axis=-1, keepdims=True)
            row, column = jax.lax.rsqrt(row), jax.lax.rsqrt(v["column"])
            return grad * row[..., :, None] * column[..., None, :]

        matrices = as_published(updates)
        v = jax.tree.map(moments, matrices, state.v)
        scaled = jax.tree.map(precondition, matrices, v)
        scaled = jax.tree.map(lambda new, old: new.reshape(old.shape), scaled, updates)
        return scaled, LastTwoState(state.count + 1, v)

    return optax.GradientTransformation(init, update)


def as_published(params: PyTree) -> PyTree:
    """Returns the tree with leaves in the shapes that the code of Poly and MHR gives them.

    Ours keep heads and head width, and splits and skills, as dimensions of their own:

    | leaf                    | here                              | there           |
    |-------------------------|-----------------------------------|-----------------|
    | task logits             | [n, p, s]                         | [n, p s]        |
    | LoRA                    | [*in, r], [r, *out]               | [in, r], [r, out] |
    | (IA)3 vectors           | [heads, head width]               | [heads * head width] |
    | skilled LoRA and (IA)3  | [p, s, i, r], [p, s, r, o], [s, p, o] | the same    |

    Leaves of mixtures over experts, which that code does not have, stay as they are.
    """
    flat = patching.flatten(params)
    below: dict[str, dict[str, tuple[int, ...] | None]] = {}
    for path, leaf in flat.items():
        parts = path.split("/")
        start = parts.index(patching.ADAPTER) + 1 if patching.is_adapter(path) else -1
        names = below.setdefault("/".join(parts[:start]), {})
        names["/".join(parts[start:])] = getattr(leaf, "shape", None)
    kinds = (*methods.ADAPTERS.values(), *routing.ROUTERS, *routing.SKILL_ROUTERS)
    shapes = {
        f"{folder}/{name}": shape
        for folder, names in below.items()
        for kind in kinds
        for name, shape in kind.published(names).items()
    }
    # What optax masks out is not an array and stays.
    new = {
        path: leaf.reshape(shapes[path]) if path in shapes and hasattr(leaf, "reshape") else leaf
        for path, leaf in flat.items()
    }
    return patching.trees.unflatten(new)

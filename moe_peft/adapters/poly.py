"""Skilled LoRA and skilled (IA)3: inventories of modules, combined for each example by its task.

Poly (Ponti et al. 2022), Poly-S and MHR (Caccia et al. 2023, "Multi-Head Adapter Routing", section
3). The modules' *parameters* are averaged, not their outputs, with one set of weights for A and B.
"""

import math
from typing import ClassVar

from flax import linen as nn
from flax.linen import partitioning
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe_peft import errors, narrow_matmul, routing
from moe_peft.adapters import adapter, mov


def mix_lora(
    weights: Float[Array, "b p s"], lora_a: Float[Array, "p s j r"], lora_b: Float[Array, "p s r k"]
) -> tuple[Float[Array, "b i r"], Float[Array, "b r o"]]:
    """Returns each example's A and B: blocks `sum_s w_ps A_ps`, joined over splits.

    Blocks of A stand along the inputs (i = p j), blocks of B along the outputs (o = p k); the rank
    is never split. So the part of A B from input split p to output split q has the weights of p on
    its left and of q on its right.
    """
    a = jnp.einsum("bps,psjr->bpjr", weights, lora_a)
    b = jnp.einsum("bps,psrk->brpk", weights, lora_b)
    return a.reshape(a.shape[0], -1, a.shape[-1]), b.reshape(*b.shape[:2], -1)


def mix_vectors(
    weights: Float[Array, "b p s"], vectors: Float[Array, "s p k"]
) -> Float[Array, "b o"]:
    """Returns each example's vector: `sum_s w_ps l_sp`, joined over splits."""
    mixed = jnp.einsum("bps,spk->bpk", weights, vectors)
    return mixed.reshape(mixed.shape[0], -1)


def apply_lora(
    x: Float[Array, "b ... i"], a: Float[Array, "#b i r"], b: Float[Array, "#b r o"], scale: float
) -> Float[Array, "b ... o"]:
    """Returns `scale * (x a) b`, example by example; one a and b (b = 1) serve all examples."""
    if a.shape[0] == 1:
        hidden = narrow_matmul.narrow_matmul(x, a[0])
        return narrow_matmul.narrow_matmul(hidden * jnp.asarray(scale, hidden.dtype), b[0])
    # Left to itself, XLA (jax 0.10.2) splits factors that were joined from several splits wrongly
    # on meshes of three axes (data 2 x fsdp 2 x model 2): other numbers, no error.
    a, b = (partitioning.with_sharding_constraint(f, ("batch", None, None)) for f in (a, b))
    hidden = jnp.einsum("b...i,bir->b...r", x, a.astype(x.dtype))
    return jnp.einsum("b...r,bro->b...o", hidden * jnp.asarray(scale, x.dtype), b.astype(x.dtype))


class Skilled(adapter.Adapter):
    """What the adapters below share: modules combined by a task router, features in splits."""

    router_sizes: ClassVar[tuple[str, ...]] = ("num_skills", "num_splits")

    def _weights(self, inputs: Array, site: routing.Site) -> Float[Array, "b p s"]:
        """The router's weights; one row per example of `inputs`, or one for all."""
        weights = self.make_router(name="router")(site)
        if weights.shape[0] not in (1, inputs.shape[0]):
            raise errors.UserError(
                f"{'/'.join(self.path)} sees {inputs.shape[0]} examples, but the batch has "
                f"{weights.shape[0]} task ids."
            )
        return weights

    def _split_width(self, what: str, width: int) -> int:
        """Returns width / splits, or raises UserError."""
        if width % self.num_splits:
            fitting = [p for p in range(1, 129) if width % p == 0]
            raise errors.UserError(
                f"{'/'.join(self.path)}: {self.num_splits} splits do not divide the {what}, "
                f"{width} wide. Choose num_splits among {', '.join(map(str, fitting))}."
            )
        return width // self.num_splits


class SkilledLoRA(Skilled):
    """`y = outputs + alpha / rank * (inputs A_task) B_task`; B is zero at first, so y = outputs.

    Caccia et al. 2023, equations 4 to 6; one split is Poly, one skill is LoRA.

    Example:
        y = SkilledLoRA(router_factory=UniformSkillRouter).apply(variables, x, y, routing.Site())
    """

    num_skills: int = 8  # S, modules in the inventory; the papers use 8
    num_splits: int = 1  # heads of MHR; has to divide the widths of inputs and outputs
    rank: int = 1  # of every module
    alpha: float = 1.0  # scale times rank; 1 in the released code
    # called as `router_factory(num_skills=..., num_splits=..., name="router")`
    router_factory: routing.SkillRouterFactory = routing.TaskRouter

    def __post_init__(self) -> None:
        routing.check_positive("rank", self.rank)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "..."], outputs: Float[Array, "..."], site: routing.Site
    ) -> Float[Array, "..."]:
        """Returns the updated outputs, in their own dtype.

        Args:
            inputs: [b, t..., *in features] of the frozen layer.
            outputs: [b, t..., *out features] of the frozen layer.
            site: where we are.

        Raises UserError if splits do not divide a width, or task ids are missing.
        """
        tokens = inputs.shape[: site.num_token_axes]
        x = inputs.astype(outputs.dtype).reshape(*tokens, -1)
        splits, skills, rank = self.num_splits, self.num_skills, self.rank
        in_part = self._split_width("inputs", x.shape[-1])
        out_part = self._split_width("outputs", math.prod(outputs.shape[len(tokens) :]))
        param = partitioning.param_with_axes
        lora_a = param(
            "lora_a",
            _uniform_within(x.shape[-1]),
            (splits, skills, in_part, rank),
            jnp.float32,
            axes=("split", "skill", _joined(site.in_axes), "rank"),
        )
        lora_b = param(
            "lora_b",
            nn.initializers.zeros,
            (splits, skills, rank, out_part),
            jnp.float32,
            axes=("split", "skill", "rank", _joined(site.out_axes)),
        )
        weights = self._weights(inputs, site)
        a, b = mix_lora(weights, lora_a, lora_b)
        delta = apply_lora(x, a, b, self.alpha / rank)
        return outputs + delta.reshape(outputs.shape)

    @staticmethod
    def average(
        name: str, modules: Float[Array, "p s ..."], weights: Float[Array, "s"]
    ) -> Float[Array, "..."]:
        """Returns lora_a [p, j, r] from [p, s, j, r], or lora_b [r, p, k] from [p, s, r, k]."""
        mean = jnp.tensordot(weights, modules, axes=(0, 1))
        return mean if name == "lora_a" else jnp.swapaxes(mean, 0, 1)


class SkilledIA3(Skilled):
    """`y = l_task * outputs`, an inventory of (IA)3 vectors; all ones at first: the identity.

    Caccia et al. 2023 (P1's runs on T0); splits part the outputs.
    """

    only_scales: ClassVar[bool] = True

    num_skills: int = 8  # vectors in the inventory
    num_splits: int = 1  # has to divide the width of the outputs
    router_factory: routing.SkillRouterFactory = routing.TaskRouter  # as in `SkilledLoRA`

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "..."], outputs: Float[Array, "..."], site: routing.Site
    ) -> Float[Array, "..."]:
        """Returns the scaled outputs [b, t..., *features], in their own dtype."""
        features = outputs.shape[site.num_token_axes :]
        part = self._split_width("outputs", math.prod(features))
        vectors = partitioning.param_with_axes(
            "vectors",
            nn.initializers.ones,
            (self.num_skills, self.num_splits, part),
            jnp.float32,
            axes=("skill", "split", _joined(site.out_axes)),
        )
        mixed = mix_vectors(self._weights(inputs, site), vectors)
        ones = (1,) * (site.num_token_axes - 1)
        return mov.scale_features(outputs, mixed.reshape(mixed.shape[0], *ones, *features))

    @staticmethod
    def average(
        name: str, modules: Float[Array, "s p k"], weights: Float[Array, "s"]
    ) -> Float[Array, "p k"]:
        """Returns the mean vector, in its splits."""
        del name  # There is one leaf, "vectors".
        return jnp.tensordot(weights, modules, axes=(0, 0))


def _uniform_within(width: int):
    """The law of lora_a: uniform within 1/sqrt(3 * inputs), full width also with several splits."""
    bound = (3.0 * width) ** -0.5

    def init(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def _joined(axes: tuple[str, ...]) -> str:
    return axes[0] if len(axes) == 1 else "joined_kv"

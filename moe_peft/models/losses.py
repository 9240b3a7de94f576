"""What a batch of logits costs: cross entropy, its weights, and the number it is divided by.

Everything here is written as a sum and a normalizer that does not depend on parameters. The
objective is their quotient, so sums over micro-batches or devices may be added first and divided
once: the result is the same number.
"""

from collections.abc import Mapping
import dataclasses

import gin
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num
import numpy as np

from moe_peft import errors

NORMALIZATIONS = ("token_mean", "per_sequence", "per_example")

# What comes from a data pipeline (numpy) or lives on a device; tracers are Arrays too.
AnyArray = Array | np.ndarray
Batch = Mapping[str, AnyArray]
Sums = dict[str, Float[Array, ""]]


@gin.register(module="losses")
@dataclasses.dataclass(frozen=True)
class LossConfig:
    """How token losses become one number."""

    # what the weighted sum of token losses is divided by. "token_mean": the sum of the loss weights
    # (T-Few; T5X's NUM_REAL_TARGET_TOKENS). "per_sequence": every target counts 1, whatever its
    # length: a token weighs 1 / (weight of its target), the divisor is the number of targets.
    # Targets packed into one row are told apart by decoder_segment_ids (MoV and MoLoRA; T5X's
    # AVERAGE_PER_SEQUENCE). "per_example": the plain sum over tokens divided by the number of
    # targets (MHR on SuperNI and CrossFit: "summed over tokens, divided by batch size"; rows
    # without a target do not count).
    normalization: str = "token_mean"
    # coefficient of log(Z)^2, Z the normalisation constant of the softmax. MoV: 1e-4.
    z_loss: float = 0.0
    # eps in [0, 1). The loss is (1 - eps) * nll + eps * mean over the vocabulary of -log p: the
    # "uniform" definition, in which the target gets its share of eps too (MHR on SuperNI: 0.1). T5X
    # spreads its eps over the other V - 1 classes and subtracts a constant: T5X's eps corresponds
    # to eps * V / (V - 1) here, the gradients are then equal.
    label_smoothing: float = 0.0

    def __post_init__(self):
        errors.check_one_of("LossConfig.normalization", self.normalization, NORMALIZATIONS)
        if not 0.0 <= self.label_smoothing < 1.0:
            raise errors.UserError(
                f"LossConfig.label_smoothing is {self.label_smoothing}, expected 0 <= value < 1."
            )
        errors.check_at_least("LossConfig.z_loss", self.z_loss, 0)


def token_log_probs(
    logits: Float[AnyArray, "b t v"], targets: Int[AnyArray, "b t"]
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """log p(target) and log Z of every position, in float32.

    The target's logit is picked by a masked sum: it fuses with the softmax, differentiates into a
    select instead of a scatter, and works unchanged when the vocabulary is sharded.
    """
    logits = jnp.asarray(logits, jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    is_target = jax.nn.one_hot(targets, logits.shape[-1], dtype=jnp.bool_)
    return jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1) - log_z, log_z


def segment_totals(values: Num[AnyArray, "b t"], batch: Batch) -> Num[Array, "b t"]:
    """At every target position, the sum of `values` over its own target.

    A target is a row, or a segment of it where the batch has decoder_segment_ids (in any order).
    """
    segment_ids = batch.get("decoder_segment_ids")
    if segment_ids is None:
        return jnp.broadcast_to(jnp.sum(values, axis=-1, keepdims=True), values.shape)
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return jnp.sum(jnp.where(same, values[:, None, :], 0), axis=-1)


def token_weights(batch: Batch, pad_id: int = 0) -> Float[Array, "b t"]:
    """decoder_loss_weights, or 1 at every target token but padding where the batch has none."""
    weights = batch.get("decoder_loss_weights")
    if weights is None:
        weights = batch["decoder_target_tokens"] != pad_id
    return jnp.asarray(weights, jnp.float32)


def token_shares(weights: Float[AnyArray, "b t"], batch: Batch) -> Float[Array, "b t"]:
    """Each token's part of its target's weight.

    They add up to one for every target that has any weight, so their sum counts the targets.
    """
    totals = segment_totals(weights, batch)
    return jnp.where(totals > 0, weights / jnp.where(totals > 0, totals, 1.0), 0.0)


def loss_sums(
    config: LossConfig, logits: Float[AnyArray, "b t v"], batch: Batch
) -> tuple[Float[Array, ""], Float[Array, ""], Sums]:
    """(loss sum, normalizer, metric sums); `LossConfig` defines the three normalisations.

    Metric sums may be added over micro-batches; `summarize` turns them into means. An empty batch
    (no target at all) gives zeros.
    """
    targets = batch["decoder_target_tokens"]
    log_probs, log_z = token_log_probs(logits, targets)
    losses = -log_probs
    if config.label_smoothing:
        uniform = log_z - jnp.mean(jnp.asarray(logits, jnp.float32), axis=-1)
        losses = (1.0 - config.label_smoothing) * losses + config.label_smoothing * uniform
    z_losses = config.z_loss * jnp.square(log_z)

    weights = token_weights(batch)
    shares = token_shares(weights, batch)
    num_tokens, num_targets = jnp.sum(weights), jnp.round(jnp.sum(shares))
    scale = shares if config.normalization == "per_sequence" else weights
    normalizer = num_tokens if config.normalization == "token_mean" else num_targets

    is_right = jnp.argmax(logits, axis=-1) == targets
    num_wrong = segment_totals(jnp.where(is_right, 0.0, weights), batch)
    sums = {
        "nll": jnp.sum(-log_probs * weights),
        "z_loss": jnp.sum(z_losses * weights),
        "right_tokens": jnp.sum(jnp.where(is_right, weights, 0.0)),
        "right_targets": jnp.round(jnp.sum(jnp.where(num_wrong == 0, shares, 0.0))),
        "tokens": num_tokens,
        "targets": num_targets,
    }
    return jnp.sum((losses + z_losses) * scale), normalizer, sums


def summarize(sums: Sums, normalizer: Float[Array, ""] | float) -> Sums:
    """Means from added metric sums: what a log line or a table shows.

    Returns nll and z_loss (per token, natural logarithm), accuracy (share of right tokens),
    exact_match (share of targets with every token right), tokens and targets (counts), and every
    router loss (mean over routers, weighted by the normalizer of its micro-batch).
    """
    tokens = jnp.maximum(sums["tokens"], 1e-9)
    means = {
        "nll": sums["nll"] / tokens,
        "z_loss": sums["z_loss"] / tokens,
        "accuracy": sums["right_tokens"] / tokens,
        "exact_match": sums["right_targets"] / jnp.maximum(sums["targets"], 1e-9),
        "tokens": sums["tokens"],
        "targets": sums["targets"],
    }
    for name, value in sums.items():
        if name.startswith("router/"):
            means[name] = value / jnp.maximum(normalizer, 1e-9)
    return means

"""T-Few's three losses: the right answer likely, likelier than the wrong ones, those unlikely.

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
Learning", section 3.2; MHR adapts to P3's test tasks with them too. With p_{c,t} the probability of
token t of choice c and g the right choice of an example:

    language modelling   - log p_{g,t}, as `LossConfig` averages it (T-Few: over the batch's tokens)
    choices              - log softmax(-s)_g, s_c = mean over t of -log p_{c,t}; mean over examples
    unlikelihood         - log(1 - p_{c,t} + 0.01), mean over the tokens of all wrong choices

All choices of an example stand in one decoder row (`scoring.pack_choices`); its input is encoded
once. Padding counts nowhere. The released code lets every masked position add the constant
-log(1.01) to the unlikelihood; it has no gradient, here it is left out.
"""

import dataclasses
import functools

import gin
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from moe_peft import errors
from moe_peft.models import encoder_decoder, losses, scoring

UNLIKELIHOOD_MARGIN = 0.01
GOLD = "gold_choice"  # feature of a batch: Int[b], number of the right choice


@gin.register(module="losses")
@dataclasses.dataclass(frozen=True)
class FewShotLoss:
    """Weights of the three losses; examples without choices have the first one only."""

    # of the right answers' cross entropy. Its normalisation and smoothing are `LossConfig`'s: the
    # token mean for T-Few; on SuperNI and CrossFit, which use this loss alone, "per_example" and
    # 0.1.
    language_modelling: float = 1.0
    choices: float = 1.0  # of the length-normalised choice loss
    unlikelihood: float = 1.0  # of the wrong choices

    def __post_init__(self):
        weights = dataclasses.asdict(self)
        if min(weights.values()) < 0 or not any(weights.values()):
            raise errors.UserError(
                f"FewShotLoss weighs {weights}; expected numbers of at least 0, one of them above."
            )

    @property
    def needs_choices(self) -> bool:
        """Whether wrong answers are looked at."""
        return bool(self.choices or self.unlikelihood)


def choice_loss(
    log_likelihood: Float[losses.AnyArray, "b c"],
    num_tokens: Float[losses.AnyArray, "b c"],
    gold: Int[losses.AnyArray, "b"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum over examples of -log softmax(-s)_g, number of examples with a wrong choice).

    Args:
      log_likelihood: summed over the tokens of each choice.
      num_tokens: of each choice; 0 where an example has no such choice.
      gold: number of the right choice.
    """
    is_there = num_tokens > 0
    per_token = log_likelihood / jnp.maximum(num_tokens, 1.0)
    # Not -inf, whose gradient is not a number where an example has no choice at all.
    log_probs = jax.nn.log_softmax(jnp.where(is_there, per_token, -1e30), axis=-1)
    is_gold = jax.nn.one_hot(gold, is_there.shape[1], dtype=jnp.bool_)
    of_gold = jnp.sum(jnp.where(is_gold & is_there, log_probs, 0.0), axis=-1)
    has_choices = jnp.sum(is_there, axis=-1) > 1
    return -jnp.sum(jnp.where(has_choices, of_gold, 0.0)), jnp.sum(has_choices).astype(jnp.float32)


def unlikelihood_loss(
    log_probs: Float[losses.AnyArray, "b t"], is_wrong: Bool[losses.AnyArray, "b t"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum of -log(1 - p + 0.01) over the tokens that `is_wrong` marks, their number)."""
    # Unmarked positions may hold p = 1 with an infinite slope elsewhere; they are taken out before.
    probs = jnp.exp(jnp.where(is_wrong, log_probs, -1.0))
    terms = -jnp.log(1.0 - probs + UNLIKELIHOOD_MARGIN)
    return jnp.sum(jnp.where(is_wrong, terms, 0.0)), jnp.sum(is_wrong).astype(jnp.float32)


def loss_sums(
    loss: FewShotLoss,
    num_choices: int,
    config: losses.LossConfig,
    logits: Float[losses.AnyArray, "b t v"],
    batch: losses.Batch,
) -> tuple[Float[Array, ""], Float[Array, ""], losses.Sums]:
    """(loss sum, normalizer, metric sums) of a batch with or without choices.

    The normalizer is that of language modelling. The other two losses have their own means over
    the batch and enter times that number, so that the quotient is the weighted sum of the three. K
    micro-batches are therefore one batch for language modelling only; the other means are weighted
    by each micro-batch's normalizer.

    Args:
      loss: weights.
      num_choices: the largest number of choices in the batch, at least.
      config: of language modelling.
      logits: of packed choices.
      batch: see `FewShotModel`.
    """
    if GOLD not in batch:
        loss_sum, normalizer, sums = losses.loss_sums(config, logits, batch)
        return loss.language_modelling * loss_sum, normalizer, sums
    targets, segments = batch["decoder_target_tokens"], batch["decoder_segment_ids"]
    is_real = segments > 0  # Padding is in no choice.
    is_gold = is_real & (segments == batch[GOLD][:, None] + 1)
    weighed = {**batch, "decoder_loss_weights": is_gold.astype(jnp.float32)}
    loss_sum, normalizer, sums = losses.loss_sums(config, logits, weighed)
    loss_sum = loss.language_modelling * loss_sum
    if not loss.needs_choices:
        return loss_sum, normalizer, sums

    log_probs = losses.token_log_probs(logits, targets)[0]
    num_tokens = scoring.sum_by_choice(jnp.asarray(is_real, jnp.float32), segments, num_choices)
    log_likelihood = scoring.sum_by_choice(log_probs, segments, num_choices)
    found = {
        "choices": choice_loss(log_likelihood, num_tokens, batch[GOLD]),
        "unlikelihood": unlikelihood_loss(log_probs, is_real & ~is_gold),
    }
    for name, (total, count) in found.items():
        mean = normalizer * total / jnp.maximum(count, 1.0)
        loss_sum = loss_sum + getattr(loss, name) * mean
        sums[f"few_shot/{name}"] = mean
    return loss_sum, normalizer, sums


@dataclasses.dataclass(frozen=True)
class FewShotModel:
    """An encoder-decoder with T-Few's objective; the interface of `training.step.Model`.

    A batch has encoder_input_tokens, decoder features from `scoring.pack_choices` and
    "gold_choice". Without "gold_choice" it is a batch as anywhere else and only language modelling
    counts.
    """

    model: encoder_decoder.EncoderDecoder  # gives logits
    loss: FewShotLoss = FewShotLoss()  # weights
    num_choices: int = 1  # the largest number of choices in any batch, at least

    def loss_sums(
        self, params: PyTree, batch: losses.Batch, dropout_rng: Array | None = None
    ) -> tuple[Float[Array, ""], Float[Array, ""], losses.Sums]:
        """(loss sum, normalizer, metric sums); see the function `loss_sums`."""
        of_logits = functools.partial(loss_sums, self.loss, self.num_choices)
        return self.model.loss_sums(params, batch, dropout_rng, of_logits)

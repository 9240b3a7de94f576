"""An encoder-decoder with a loss, predictions and scores: what training and evaluation talk to."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from moe_peft import errors, patching, routing
from moe_peft import methods as methods_lib
from moe_peft.models import batches, decoding, losses, scoring, special_ids

Batch = losses.Batch
LossConfig = losses.LossConfig
summarize = losses.summarize

_SEEN_WHILE_DECODING = ("encoder_input_tokens", "task_ids", "sentence_embeddings")


@dataclasses.dataclass(frozen=True)
class EncoderDecoder:
    """A (patched) T5-like module together with its objective.

    Every method is a pure function of its arguments and may be jitted. `params` is the whole
    parameter tree, frozen and trainable merged.

    Example (a batch is a dictionary with T5X's feature names):
      model = EncoderDecoder(method.patch(t5.Transformer(config)), LossConfig(), method)
      params = model.init(jax.random.key(0), jax.tree.map(jnp.shape, batch))
      objective, metrics = model.loss(params, batch)
    """

    # a linen module with T5X's `__call__`, `encode` and `decode`, patched or not
    module: patching.Patched | nn.Module
    loss_config: LossConfig = LossConfig()  # how token losses become the objective
    # gives router losses their weights; without it they do not count
    method: methods_lib.Method | None = None

    @property
    def ids(self) -> special_ids.SpecialIds:
        """The network's ids of padding, end and start."""
        return special_ids.of(self.module)

    def init_variables(self, rng: Array, batch_shapes: Mapping[str, Any]) -> PyTree:
        """Fresh {"params", "params_axes"}; under `jax.eval_shape` nothing is computed.

        `batch_shapes`: feature name to a shape tuple, or to anything with a `.shape`.
        """
        batch = batches.ones(batch_shapes)
        tokens, packing = batches.features(batch)
        variables = self.module.init(
            rng, *tokens, **packing, enable_dropout=False, **self._routing(batch)
        )
        return {k: v for k, v in variables.items() if k in ("params", "params_axes")}

    def init(self, rng: Array, batch_shapes: Mapping[str, Any]) -> PyTree:
        """Fresh parameters; see `init_variables`."""
        return self.init_variables(rng, batch_shapes)["params"]

    def logits(self, params: PyTree, batch: Batch) -> Float[Array, "b t v"]:
        """Teacher-forced logits without dropout, in float32."""
        return self._forward(params, batch, None)[0]

    def loss(
        self, params: PyTree, batch: Batch, dropout_rng: Array | None = None
    ) -> tuple[Float[Array, ""], losses.Sums]:
        """(objective, metric means); see `loss_sums` and `losses.summarize`."""
        loss_sum, normalizer, sums = self.loss_sums(params, batch, dropout_rng)
        objective = loss_sum / jnp.maximum(normalizer, 1e-9)
        return objective, losses.summarize(sums, normalizer)

    def loss_sums(
        self,
        params: PyTree,
        batch: Batch,
        dropout_rng: Array | None = None,
        of_logits: Callable[..., Any] | None = None,
    ) -> tuple[Float[Array, ""], Float[Array, ""], losses.Sums]:
        """(loss sum, normalizer, metric sums), to be added over micro-batches, then divided.

        The normalizer depends on the batch only. For the token losses K micro-batches are exactly
        one batch. A router loss is a mean over the tokens of one forward pass (and over routers);
        it enters as weight * normalizer * that mean, so that after the division micro-batches
        count by their normalizers. A load-balancing loss is not linear in the batch: that of K
        micro-batches is the mean of theirs, as in data-parallel training elsewhere.

        Dropout and stochastic routing happen when `dropout_rng` is given. `of_logits` is another
        objective than `losses.loss_sums`, with its signature.
        """
        logits, router_losses = self._forward(params, batch, dropout_rng)
        of_logits = of_logits or losses.loss_sums
        batch = {**batch, "decoder_loss_weights": self._weights(batch)}
        loss_sum, normalizer, sums = of_logits(self.loss_config, logits, batch)
        for name, weight in self._router_weights().items():
            if name in router_losses:
                weighted_mean = normalizer * router_losses[name]
                loss_sum = loss_sum + weight * weighted_mean
                sums[f"router/{name}"] = weighted_mean
            elif weight:
                raise errors.UserError(
                    f"Method {self.method.name!r} weighs the router loss {name!r} by {weight}, but "
                    f"no router reports it (reported: {', '.join(router_losses) or 'none'})."
                )
        return loss_sum, normalizer, sums

    def score(self, params: PyTree, batch: Batch) -> Float[Array, "b"]:
        """Log-likelihood of each row's target: sum of log p(token) times its loss weight."""
        return jnp.sum(self._target_log_probs(params, batch) * self._weights(batch), axis=-1)

    def exact_match(self, params: PyTree, batch: Batch) -> Bool[Array, "b"]:
        """Whether greedy decoding would give each row's target, without decoding.

        It would exactly when every argmax is right under teacher forcing: up to the first wrong
        token both see the same prefix. The target must hold its end mark.
        """
        is_right = jnp.argmax(self.logits(params, batch), axis=-1) == batch["decoder_target_tokens"]
        return jnp.all(is_right | (self._weights(batch) == 0), axis=-1)

    def score_choices(self, params: PyTree, batch: Batch, num_choices: int) -> scoring.ChoiceScores:
        """Log-likelihoods of all answer choices of each example, its input encoded once.

        Args:
          params: as everywhere.
          batch: encoder_input_tokens [b, s] and, from `scoring.pack_choices`, the decoder features
            with choice c in the segment c + 1. No encoder_segment_ids: every choice sees the whole
            input.
          num_choices: the largest number of choices in the batch, at least.
        """
        if "encoder_segment_ids" in batch:
            raise errors.UserError(
                "Choices are scored for one input per row; this batch packs several inputs "
                "(it has encoder_segment_ids)."
            )
        log_probs = self._target_log_probs(params, batch)
        segment_ids = batch["decoder_segment_ids"]
        is_real = jnp.asarray(segment_ids > 0, jnp.float32)
        return scoring.ChoiceScores(
            log_likelihood=scoring.sum_by_choice(log_probs, segment_ids, num_choices),
            num_tokens=scoring.sum_by_choice(is_real, segment_ids, num_choices),
        )

    def predict(
        self, params: PyTree, batch: Batch, strategy: decoding.Strategy, rng: Array | None = None
    ) -> Int[Array, "b t"]:
        """Answers: ids [b, max_decode_length] with the end mark, padding after it.

        The encoder and the decoder's keys and values of its output are computed once.

        Args:
          params: as everywhere.
          batch: encoder_input_tokens [b, s] and what routers look at; targets are not read.
          strategy: how, such as `decoding.Greedy(max_decode_length=32)`. Hashable, so it may be a
            static argument of jit.
          rng: key for random decoding.
        """
        if strategy.is_random and rng is None:
            raise errors.UserError(f"{type(strategy).__name__} draws tokens and needs an rng.")
        if strategy.max_decode_length is None:
            raise errors.UserError(f"{type(strategy).__name__}.max_decode_length is not set.")
        if "encoder_segment_ids" in batch:
            raise errors.UserError("Answers are decoded for unpacked inputs, not for packed rows.")
        inputs = jnp.asarray(batch["encoder_input_tokens"])
        seen = {k: v for k, v in batch.items() if k in _SEEN_WHILE_DECODING}
        encoded = self.module.apply(
            {"params": params},
            inputs,
            enable_dropout=False,
            method=self.module.encode,
            **self._routing(batch),
        )
        length, times = strategy.max_decode_length, strategy.rows_per_example
        # Makes the empty cache and the keys and values of the encoded text. The compiler drops the
        # rest of this call, whose logits nobody reads.
        first = jnp.zeros((inputs.shape[0], 1), jnp.int32)
        start = functools.partial(self._decode, {"params": params}, encoded, seen, length)
        _, caches = start(first, ["cache", "cross_cache"])
        # Keys and values have four axes, and one more in front where a scan stacks layers.
        axis = max(leaf.ndim for leaf in jax.tree.leaves(caches["cache"])) - 4
        caches = dict(batches.repeat_rows(caches, times, axis))
        cache = caches.pop("cache")
        # The beams of an example share its text: only "cache" follows them around.
        step = functools.partial(
            self._decode,
            {"params": params, **caches},
            *batches.repeat_rows((encoded, seen), times),
            length,
        )

        def tokens_to_logits(ids, cache):
            logits, new = step(ids, ["cache"], cache=cache)
            return logits[:, 0], new["cache"]

        how = {"cache_batch_axis": axis, "rng": rng, "ids": self.ids}
        return strategy(tokens_to_logits, cache, batch_size=inputs.shape[0], **how)

    def _decode(self, variables, encoded, seen, length, ids, mutable, **caches):
        """Calls the decoder with a cache; `seen` is what a batch has while decoding."""
        return self.module.apply(
            {**variables, **caches},
            encoded,
            seen["encoder_input_tokens"],
            ids,
            ids,
            enable_dropout=False,
            decode=True,
            max_decode_length=length,
            method=self.module.decode,
            mutable=mutable,
            **self._routing(seen),
        )

    def _target_log_probs(self, params: PyTree, batch: Batch) -> Float[Array, "b t"]:
        logits = self.logits(params, batch)
        return losses.token_log_probs(logits, batch["decoder_target_tokens"])[0]

    def _weights(self, batch: Batch) -> Float[Array, "b t"]:
        return losses.token_weights(batch, self.ids.pad)

    def _router_weights(self) -> dict[str, float]:
        return {} if self.method is None else self.method.router_loss_weights()

    def _forward(
        self, params: PyTree, batch: Batch, dropout_rng: Array | None
    ) -> tuple[Float[Array, "b t v"], dict[str, Float[Array, ""]]]:
        """Teacher-forced logits and the mean of each kind of router loss."""
        tokens, packing = batches.features(batch)
        call = functools.partial(
            self.module.apply,
            {"params": params},
            *tokens,
            **packing,
            enable_dropout=dropout_rng is not None,
            rngs=None if dropout_rng is None else batches.rngs(dropout_rng),
            **self._routing(batch),
        )
        # Router losses that count for nothing are not computed either: on a CPU they cost more than
        # the routers themselves.
        if not any(self._router_weights().values()):
            return call().astype(jnp.float32), {}
        logits, collected = call(mutable=[routing.losses.COLLECTION])
        return logits.astype(jnp.float32), routing.losses.means(
            collected.get(routing.losses.COLLECTION, {})
        )

    def _routing(self, batch: Batch) -> dict[str, routing.RoutingContext]:
        """The keyword argument that tells a patched module what its routers may look at."""
        if not isinstance(self.module, patching.Patched):
            return {}
        return {"routing": batches.context(batch, self.method, self.ids.pad)}

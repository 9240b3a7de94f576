"""A T5X model with the adapters of a method: one that T5X trains, evaluates and infers with."""

from collections.abc import Mapping
import copy
import dataclasses
import functools
from typing import Any

import flax.core
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree
from t5x import losses as t5x_losses
from t5x import metrics as t5x_metrics
from t5x import models as t5x_models

from moe_peft import errors, methods, patching, routing
from moe_peft.models import batches, special_ids
from moe_peft.t5x import features, saving, trainable
from moe_peft.weights import identity

Batch = Mapping[str, Array]


def model(
    model: t5x_models.EncoderDecoderModel,
    method: methods.Method,
    adapters: str | None = None,
    groups: Mapping[str, float] | None = None,
) -> t5x_models.EncoderDecoderModel:
    """Returns a T5X model that runs with the adapters of a method; the one given is not touched.

    Its class is a subclass of the given one's, so that settings and overridden methods stay. Its
    optimiser sees only what the method trains.

    Args:
      model: as T5X's gin files build it, around `examples/t5`, `examples/scalable_t5` or
        Flaxformer's T5.
      method: of `moe_peft.methods`.
      adapters: file of trained adapters, as `moe-peft export` writes it, to start from; None starts
        from fresh ones.
      groups: multipliers of the learning rate by group, see `trainable.only`.

    Raises:
      UserError: the file is of another method, or the model pads or starts with other ids than T5X.
    """
    _check_ids(model)
    kind = type(f"Adapted{type(model).__name__}", (Adapted, type(model)), {})
    found = kind.__new__(kind)
    found.__dict__.update(model.__dict__)
    found.module = method.patch(model.module)
    found.method = method
    found.adapters = None if adapters is None else _read(adapters, method)
    found.optimizer_def = trainable.only(model.optimizer_def, method, groups)
    found.FEATURE_CONVERTER_CLS = features.converter(model, method)
    return found


def _check_ids(model: t5x_models.EncoderDecoderModel) -> None:
    ids = special_ids.of(model.module)
    pads = [getattr(model, f"{side}_vocabulary", None) for side in ("input", "output")]
    pads = [getattr(vocabulary, "pad_id", 0) for vocabulary in pads]
    if (ids.pad, ids.start) != (0, 0) or any(isinstance(pad, int) and pad > 0 for pad in pads):
        raise errors.UserError(
            f"T5X pads with the id 0 and starts decoders with it. This model has {ids}, its "
            f"vocabularies pad with {pads}. Train it with the built-in trainer instead."
        )


def _read(path: str, method: methods.Method) -> dict[str, Array]:
    saved = saving.read(path)
    identity.check_same_run(
        saved.description, {"method": identity.as_json(method.describe())}, path, ("method",)
    )
    return {name: jnp.asarray(leaf) for name, leaf in patching.flatten(saved.trainable).items()}


class Adapted:
    """What is different about an `EncoderDecoderModel` with adapters; see `model`.

    Every method below runs the model's own, on a copy whose module tells adapters what the batch
    says of its examples.
    """

    method: methods.Method  # says what is adapted
    adapters: Mapping[str, Array] | None  # trained leaves by path that replace fresh ones, or None

    def get_initial_variables(
        self,
        rng: Array,
        input_shapes: Mapping[str, Any],
        input_types: Mapping[str, Any] | None = None,
    ) -> flax.core.FrozenDict:
        """As T5X's, with the leaves of the adapters and their axes."""
        shapes = {name: tuple(shape) for name, shape in input_shapes.items()}
        found = self._routed(batches.ones(shapes))
        variables = super(Adapted, found).get_initial_variables(rng, input_shapes, input_types)
        known = {k: v for k, v in variables.items() if k in ("params", "params_axes")}
        if self.adapters is not None:
            known["params"] = _replaced(known["params"], self.adapters, self.method)
        return flax.core.freeze(known)

    def loss_fn(
        self, params: PyTree, batch: Batch, dropout_rng: Array | None
    ) -> tuple[Float[Array, ""], Any]:
        """As T5X's, plus the method's router losses, each with its weight.

        T5X divides a sum over tokens by a factor of its own, the built-in trainer by the number of
        the tokens (or targets) that count. Router losses are means; they are scaled so that they
        stand to the token loss as they do there.
        """
        weights = {name: w for name, w in self.method.router_loss_weights().items() if w}
        losses = {} if weights else None
        found = self._routed(batch, losses)
        loss, metrics = super(Adapted, found).loss_fn(params, batch, dropout_rng)
        for name, weight in weights.items():
            if name not in losses:
                raise errors.UserError(
                    f"Method {self.method.name!r} weighs the router loss {name!r} by {weight}, but "
                    f"no router reports it (reported: {', '.join(losses) or 'none'})."
                )
            loss = loss + self._scale(batch) * weight * losses[name]
            metrics[f"router/{name}"] = t5x_metrics.AveragePerStep.from_model_output(losses[name])
        return loss, metrics

    def _scale(self, batch: Batch) -> Float[Array, ""] | float:
        """What T5X's objective is times the mean loss of what it sums up."""
        factor, weights = t5x_losses.get_loss_normalizing_factor_and_weights(
            self._loss_normalizing_factor, batch
        )
        if weights is None:
            weights = jnp.greater(batch["decoder_target_tokens"], 0)
        return jnp.sum(jnp.asarray(weights, jnp.float32)) / (1.0 if factor is None else factor)

    def score_batch(self, params: PyTree, batch: Batch, return_intermediates: bool = False) -> Any:
        """As T5X's."""
        found = self._routed(batch)
        return super(Adapted, found).score_batch(params, batch, return_intermediates)

    def predict_batch_with_aux(
        self, params: PyTree, batch: Batch, rng: Array | None = None, **kwargs: Any
    ) -> Any:
        """As T5X's; routers see the text, not the targets."""
        seen = {k: v for k, v in batch.items() if k != "decoder_target_tokens"}
        found = self._routed(seen)
        return super(Adapted, found).predict_batch_with_aux(params, batch, rng=rng, **kwargs)

    def _routed(self, batch: Batch, losses: dict[str, Array] | None = None) -> "Adapted":
        found = copy.copy(self)
        found.module = Routed(self.module, batches.context(batch, self.method), losses)
        return found


@dataclasses.dataclass(frozen=True)
class Routed:
    """A patched module for one batch, called the way T5X calls a module."""

    patched: patching.Patched  # the module
    # of the batch. Where a call has several rows for each example, as in beam search, they lie next
    # to each other, and so are repeated here.
    context: routing.RoutingContext
    losses: dict[str, Array] | None = None  # where router losses of a call go, None for nowhere

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> PyTree:
        """See `Patched.init`."""
        return self.patched.init(rngs, *args, routing=self.context, **kwargs)

    def apply(
        self,
        variables: PyTree,
        *args: Any,
        rngs: Mapping[str, Array] | None = None,
        mutable: Any = False,
        **kwargs: Any,
    ) -> Any:
        """See `Patched.apply`. Dropout also makes routers stochastic that are so in training."""
        if rngs is not None:
            rngs = {**rngs, **batches.rngs(rngs["dropout"])}
        rows = patching.num_rows(args, kwargs)
        call = functools.partial(
            self.patched.apply,
            variables,
            *args,
            rngs=rngs,
            routing=jax.tree.map(lambda leaf: _repeated(leaf, rows), self.context),
            **kwargs,
        )
        if self.losses is None or mutable is not False:
            return call(mutable=mutable)
        outputs, collected = call(mutable=[routing.losses.COLLECTION])
        self.losses.update(routing.losses.means(collected.get(routing.losses.COLLECTION, {})))
        return outputs

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.patched, name)


def _repeated(leaf: Array, rows: int) -> Array:
    return jnp.repeat(leaf, rows // leaf.shape[0], axis=0)


def _replaced(params: PyTree, trained: Mapping[str, Array], method: methods.Method) -> PyTree:
    """The parameters with all leaves that the method trains from elsewhere.

    Raises:
      UserError: those are not the same leaves.
    """
    flat = patching.flatten(params)
    want = {path: leaf.shape for path, leaf in flat.items() if method.is_trainable(path)}
    have = {path: leaf.shape for path, leaf in trained.items()}
    wrong = sorted(path for path in want.keys() | have.keys() if want.get(path) != have.get(path))
    if wrong:
        raise errors.UserError(
            f"The adapters do not fit the model: {len(wrong)} leaves differ, the first is "
            f"{wrong[0]} ({have.get(wrong[0], 'missing')} in the file, "
            f"{want.get(wrong[0], 'missing')} in the model). Does only one of them scan its layers?"
        )
    return patching.trees.unflatten({**flat, **trained})

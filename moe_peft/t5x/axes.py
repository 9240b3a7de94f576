"""Rules for T5X's partitioner: how the axes that only adapters have lie on its mesh."""

from collections.abc import Sequence

import jax
from t5x import partitioning

from moe_peft import methods, patching
from moe_peft.models import encoder_decoder, t5
from moe_peft.partitioning import layout

Rules = Sequence[tuple[str, str | None]]


def rules(
    method: methods.Method,
    first: Rules = (),
    activation_partitioning_dims: int = 1,
    parameter_partitioning_dims: int = 1,
) -> Rules:
    """Returns T5X's standard rules, and one for each axis that the method's adapters add.

    Axes that adapters share with the layers they belong to ("embed", "heads", "mlp") are split as
    those are. Their own ("expert", "rank", "task", "skill", "split") are not split, unless `first`
    says so.

    Args:
      method: of `moe_peft.methods`.
      first: rules that come before all others, such as (("expert", "model"),).
      activation_partitioning_dims: of T5X's standard rules.
      parameter_partitioning_dims: of the same rules.
    """
    standard = partitioning.standard_logical_axis_rules(
        activation_partitioning_dims, parameter_partitioning_dims
    )
    known = {name for name, _ in (*first, *standard)}
    added = [(name, None) for name in own_axes(method) if name not in known]
    return [*map(tuple, first), *standard, *added]


def own_axes(method: methods.Method) -> list[str]:
    """Returns the axes of adapters that no layer of the network has, by the leaves they name."""
    width = 64  # Any split of MHR divides it.
    config = t5.T5Config(
        vocab_size=8,
        emb_dim=width,
        num_heads=2,
        head_dim=width,
        mlp_dim=width,
        num_encoder_layers=1,
        num_decoder_layers=1,
        mlp_activations=("gelu", "linear"),
    )
    network = encoder_decoder.EncoderDecoder(method.patch(t5.Transformer(config)), method=method)
    tokens = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    shapes = dict.fromkeys(tokens, (1, 1)) | {"task_ids": (1,), "sentence_embeddings": (1, 1)}
    variables = jax.eval_shape(lambda rng: network.init_variables(rng, shapes), jax.random.key(0))
    axes = layout.logical_axes(variables)
    base = {name for path, names in axes.items() if not patching.is_adapter(path) for name in names}
    found = {name for path, names in axes.items() if patching.is_adapter(path) for name in names}
    return sorted(name for name in found - base if name is not None)

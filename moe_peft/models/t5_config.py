"""Sizes and options of T5 1.0, 1.1 and their relatives."""

import dataclasses

import gin

from moe_peft import errors, routing
from moe_peft.models import layers

DTYPES = ("float32", "bfloat16")
REMAT_POLICIES = ("none", "minimal", "full")
# Of a field that old descriptions of runs lack: at its default, new ones leave it out too.
LATER = {"is_later": True}


@gin.register(module="models")
@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes and options of a T5."""

    vocab_size: int  # rows of the embedding
    emb_dim: int  # model width d
    num_heads: int  # attention heads; heads * head_dim need not be emb_dim
    head_dim: int  # width of one head
    mlp_dim: int  # feed-forward width f
    num_encoder_layers: int  # at least 1
    num_decoder_layers: int  # at least 1
    # ("relu",) is T5 1.0, ("gelu", "linear") is T5 1.1, ("silu", "linear") is UL2
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    dropout_rate: float = 0.1  # in [0, 1); one mask for all tokens of an example
    # reuse the embedding as output layer (T5 1.0), scaled by d ** -0.5
    logits_via_embedding: bool = False
    # keep attention logits in float32 when activations are bfloat16
    float32_attention_logits: bool = False
    # of activations, "float32" or "bfloat16"; norms, softmax and logits are float32 always (float16
    # overflows in T5's feed-forward blocks)
    dtype: str = "float32"
    # compile one layer and loop over it, with T5X's scanned parameter tree
    scan_layers: bool = False
    # what the backward pass recomputes: "none"; "minimal" keeps the products with weights; "full"
    # keeps only the inputs of a layer
    remat_policy: str = "none"
    # what distances between tokens fall into, each with a bias per head; Ankh has 64
    relpos_buckets: int = dataclasses.field(default=32, metadata=LATER)
    # from which on distances share a bucket, in tokens
    relpos_max_distance: int = dataclasses.field(default=128, metadata=LATER)
    # biases of its own in every layer (UMT5); else a stack shares the first layer's. Scanned layers
    # hold some each anyway
    relpos_in_every_layer: bool = dataclasses.field(default=False, metadata=LATER)
    # what is padding, ends a text and starts the decoder; see `special_ids`
    pad_id: int = dataclasses.field(default=0, metadata=LATER)
    eos_id: int = dataclasses.field(default=1, metadata=LATER)
    start_id: int = dataclasses.field(default=0, metadata=LATER)

    def __post_init__(self) -> None:
        """Refuses what cannot work, before anything is compiled."""
        for field in dataclasses.fields(self)[:7]:
            routing.check_positive(f"T5Config.{field.name}", getattr(self, field.name))
        if isinstance(self.mlp_activations, str) or not self.mlp_activations:
            raise errors.UserError(
                f"T5Config.mlp_activations is {self.mlp_activations!r}; expected a tuple of names "
                "such as ('gelu', 'linear')."
            )
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        for activation in self.mlp_activations:
            errors.check_one_of(
                "T5Config: an entry of mlp_activations", activation, layers.ACTIVATIONS
            )
        self._check_buckets()
        errors.check_one_of("T5Config.dtype", self.dtype, DTYPES)
        errors.check_one_of("T5Config.remat_policy", self.remat_policy, REMAT_POLICIES)
        for name in ("pad_id", "eos_id", "start_id"):
            errors.check_between(f"T5Config.{name}", getattr(self, name), 0, self.vocab_size - 1)
        if self.pad_id == self.eos_id:
            raise errors.UserError(
                f"T5Config.pad_id and eos_id are both {self.pad_id}; texts would end in padding."
            )
        if not 0.0 <= self.dropout_rate < 1.0:
            raise errors.UserError(
                f"T5Config.dropout_rate is {self.dropout_rate}; expected 0 <= rate < 1."
            )

    def _check_buckets(self) -> None:
        """Half of a stack's buckets hold one distance each, in the encoder for either direction."""
        buckets, distance = self.relpos_buckets, self.relpos_max_distance
        routing.check_positive("T5Config.relpos_buckets", buckets)
        routing.check_positive("T5Config.relpos_max_distance", distance)
        if buckets < 4 or buckets % 2:
            raise errors.UserError(
                f"T5Config.relpos_buckets is {buckets}; expected an even number from 4 on."
            )
        if distance <= buckets // 2:
            raise errors.UserError(
                f"T5Config.relpos_max_distance is {distance}; expected more than half of the "
                f"{buckets} buckets."
            )

    @property
    def shares_relpos(self) -> bool:
        """Whether the layers of a stack have one table of position biases together."""
        return not (self.scan_layers or self.relpos_in_every_layer)

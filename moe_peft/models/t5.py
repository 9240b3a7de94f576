"""T5 1.0 and 1.1 encoder-decoder with the parameter names, shapes and axes of T5X.

Unscanned (`scan_layers=False`) the tree is that of T5X's `examples/t5`: `encoder/layers_0/...`,
kernels as matrices, one relative position bias per stack. Scanned it is that of
`examples/scalable_t5`: `encoder/encoder/...` with the layers stacked at axis 1 of every parameter,
3-D attention kernels, a relative position bias in every layer.

Raffel et al. 2020, "Exploring the Limits of Transfer Learning"; 1.1: Shazeer 2020, "GLU Variants".
"""

import dataclasses

from flax import linen as nn
from flax.linen import partitioning
import gin
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from moe_peft import errors
from moe_peft.models import attention, layers

DTYPES = ("float32", "bfloat16")
REMAT_POLICIES = ("none", "minimal", "full")

Ids = Int[Array | np.ndarray, "b t"]
SourceIds = Int[Array | np.ndarray, "b s"]


@gin.register(module="models")
@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes and options of a T5.

    Attributes:
        vocab_size: rows of the embedding, id 0 is padding.
        emb_dim: model width d.
        num_heads: attention heads; heads * head_dim need not be emb_dim.
        head_dim: width of one head.
        mlp_dim: feed-forward width f.
        num_encoder_layers: at least 1.
        num_decoder_layers: at least 1.
        mlp_activations: ("relu",) is T5 1.0, ("gelu", "linear") is T5 1.1.
        dropout_rate: in [0, 1); one mask for all tokens of an example.
        logits_via_embedding: reuse the embedding as output layer (T5 1.0), scaled by d ** -0.5.
        float32_attention_logits: keep attention logits in float32 when activations are bfloat16.
        dtype: of activations, "float32" or "bfloat16"; norms, softmax and logits are float32 always
            (float16 overflows in T5's feed-forward blocks).
        scan_layers: compile one layer and loop over it, with T5X's scanned parameter tree.
        remat_policy: what the backward pass recomputes: "none"; "minimal" keeps the products with
            weights; "full" keeps only the inputs of a layer.
    """

    vocab_size: int
    emb_dim: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    num_encoder_layers: int
    num_decoder_layers: int
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    dropout_rate: float = 0.1
    logits_via_embedding: bool = False
    float32_attention_logits: bool = False
    dtype: str = "float32"
    scan_layers: bool = False
    remat_policy: str = "none"

    def __post_init__(self) -> None:
        """Refuses what cannot work, before anything is compiled."""
        for field in dataclasses.fields(self)[:7]:
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise errors.UserError(
                    f"T5Config.{field.name} is {value!r}; expected a whole number of at least 1."
                )
        if isinstance(self.mlp_activations, str) or not self.mlp_activations:
            raise errors.UserError(
                f"T5Config.mlp_activations is {self.mlp_activations!r}; expected a tuple of names "
                "such as ('gelu', 'linear')."
            )
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        for activation in self.mlp_activations:
            _check_choice("an entry of mlp_activations", activation, tuple(layers.ACTIVATIONS))
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("remat_policy", self.remat_policy, REMAT_POLICIES)
        if not 0.0 <= self.dropout_rate < 1.0:
            raise errors.UserError(
                f"T5Config.dropout_rate is {self.dropout_rate}; expected 0 <= rate < 1."
            )


def _check_choice(field: str, value: object, options: tuple[str, ...]) -> None:
    if value not in options:
        raise errors.UserError(
            f"T5Config: {field} is {value!r}; expected one of {', '.join(options)}."
            f"{errors.near(str(value), options)}"
        )


def _residual(x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    return partitioning.with_sharding_constraint(x, ("batch", "length", "embed"))


class _Layer(nn.Module):
    """What encoder and decoder layers share: the parts, made under T5X's names.

    Attributes:
        deterministic: no dropout.
        decode: use and extend the caches.
        max_decode_length: tokens in a new cache.
    """

    config: T5Config
    deterministic: bool
    decode: bool = False
    max_decode_length: int | None = None

    def norm(self, name: str) -> layers.LayerNorm:
        return layers.LayerNorm(self.config.dtype, name=name)

    def dropout(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        dropout = nn.Dropout(self.config.dropout_rate, broadcast_dims=(-2,))
        return dropout(x, self.deterministic)

    def attention(self, name: str, decode: str = "none") -> attention.Attention:
        cfg = self.config
        return attention.Attention(
            num_heads=cfg.num_heads,
            head_dim=cfg.head_dim,
            dropout_rate=cfg.dropout_rate,
            dtype=cfg.dtype,
            float32_logits=cfg.float32_attention_logits,
            kernel_is_3d=cfg.scan_layers,
            decode=decode if self.decode else "none",
            max_decode_length=self.max_decode_length,
            name=name,
        )

    def mlp(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Adds the feed-forward block."""
        cfg = self.config
        block = layers.Mlp(
            cfg.mlp_dim, cfg.mlp_activations, cfg.dropout_rate, cfg.dtype, name="mlp"
        )
        y = block(self.norm("pre_mlp_layer_norm")(x), self.deterministic)
        return _residual(x + self.dropout(y))


class EncoderLayer(_Layer):
    """Self-attention, then the feed-forward block."""

    @nn.compact
    def __call__(self, x, mask, bias):
        """Returns ([b, t, d], None): carry and output of a scan."""
        if bias is None:
            bias = _attention_bias(self.config, x.shape[1], bidirectional=True)
        y = self.norm("pre_attention_layer_norm")(x)
        y = self.attention("attention")(y, y, mask, bias, self.deterministic)
        x = _residual(x + self.dropout(y))
        return self.mlp(x), None


class DecoderLayer(_Layer):
    """Self-attention, attention to the encoded text, then the feed-forward block."""

    @nn.compact
    def __call__(self, x, mask, bias, encoded, cross_mask):
        """Returns ([b, t, d], None): carry and output of a scan."""
        if bias is None:
            length = self.max_decode_length or x.shape[1]
            bias = _attention_bias(self.config, length, bidirectional=False, decode=self.decode)
        y = self.norm("pre_self_attention_layer_norm")(x)
        y = self.attention("self_attention", "self")(y, y, mask, bias, self.deterministic)
        x = _residual(x + self.dropout(y))
        y = self.norm("pre_cross_attention_layer_norm")(x)
        attend = self.attention("encoder_decoder_attention", "cross")
        y = attend(y, encoded, cross_mask, None, self.deterministic)
        x = _residual(x + self.dropout(y))
        return self.mlp(x), None


def _attention_bias(
    config: T5Config, length: int, *, bidirectional: bool, decode: bool = False
) -> Float[Array, "..."]:
    """Relative position bias of the calling module; while decoding still by distance."""
    module = layers.RelativePositionBias(config.num_heads, bidirectional, name="relpos_bias")
    by_distance = module(length)
    return by_distance if decode else layers.expand_distances(by_distance)


def _apply_layers(stack, layer_class, num_layers, scanned_name, x, *args, **fields):
    """Runs `num_layers` layers in the module `stack`, looped or unrolled, with rematerialisation.

    What layers sow ("intermediates", "router_losses") and the caches are stacked at axis 0 by the
    loop; parameters made in a layer, whoever makes them, at axis 1.
    """
    config = stack.config
    if config.remat_policy != "none":
        minimal = jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims
        layer_class = nn.remat(
            layer_class,
            policy=minimal if config.remat_policy == "minimal" else None,
            prevent_cse=not config.scan_layers,
        )
    if not config.scan_layers:
        for i in range(num_layers):
            x, _ = layer_class(config, **fields, name=f"layers_{i}")(x, *args)
        return x
    is_initializing = stack.is_mutable_collection("params")
    scanned = partitioning.scan_with_axes(
        layer_class,
        variable_axes={
            "params": 1 if is_initializing else partitioning.ScanIn(1),
            "cache": 0,
            "cross_cache": 0,
            "intermediates": 0,
            "router_losses": 0,
        },
        split_rngs={"params": True, "dropout": True, "routing": True},
        in_axes=nn.broadcast,
        length=num_layers,
        axis_name="layers",
    )
    x, _ = scanned(config, **fields, name=scanned_name)(x, *args)
    return x


class _Stack(nn.Module):
    """Embedding, layers, final norm."""

    config: T5Config
    shared_embedding: nn.Module

    def embed(self, tokens: Ids, deterministic: bool) -> Float[Array, "b t d"]:
        return self.dropout(_residual(self.shared_embedding(tokens)), deterministic)

    def dropout(self, x: Float[Array, "b t d"], deterministic: bool) -> Float[Array, "b t d"]:
        return nn.Dropout(self.config.dropout_rate, broadcast_dims=(-2,))(x, deterministic)


class Encoder(_Stack):
    """Reads tokens."""

    @nn.compact
    def __call__(
        self, tokens: Ids, mask: Bool[Array, "..."], deterministic: bool
    ) -> Float[Array, "b t d"]:
        """Returns encoded tokens, normalised."""
        cfg = self.config
        x = self.embed(tokens, deterministic)
        bias = None
        if not cfg.scan_layers:
            bias = _attention_bias(cfg, tokens.shape[1], bidirectional=True)
        x = _apply_layers(
            self,
            EncoderLayer,
            cfg.num_encoder_layers,
            "encoder",
            x,
            mask,
            bias,
            deterministic=deterministic,
        )
        x = layers.LayerNorm(cfg.dtype, name="encoder_norm")(x)
        return self.dropout(x, deterministic)


class Decoder(_Stack):
    """Predicts tokens from earlier ones and the encoded text."""

    @nn.compact
    def __call__(
        self,
        tokens: Ids,
        mask: Bool[Array, "..."] | None,
        encoded: Float[Array, "b s d"],
        cross_mask: Bool[Array, "..."],
        deterministic: bool,
        decode: bool,
        max_decode_length: int | None,
    ) -> Float[Array, "b t v"]:
        """Returns float32 logits of the next token at every position."""
        cfg = self.config
        x = self.embed(tokens, deterministic)
        bias = None
        if not cfg.scan_layers:
            length = max_decode_length or tokens.shape[1]
            bias = _attention_bias(cfg, length, bidirectional=False, decode=decode)
        x = _apply_layers(
            self,
            DecoderLayer,
            cfg.num_decoder_layers,
            "decoder",
            x,
            mask,
            bias,
            encoded,
            cross_mask,
            deterministic=deterministic,
            decode=decode,
            max_decode_length=max_decode_length,
        )
        x = layers.LayerNorm(cfg.dtype, name="decoder_norm")(x)
        x = self.dropout(x, deterministic)
        if cfg.logits_via_embedding:
            return self.shared_embedding.attend(x) * cfg.emb_dim**-0.5
        return layers.Dense(
            features=(cfg.vocab_size,),
            kernel_axes=("embed", "vocab"),
            kernel_shape=(cfg.emb_dim, cfg.vocab_size),
            kernel_init=nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal"),
            dtype=jnp.float32,
            name="logits_dense",
        )(x)


@gin.register(module="models")
class Transformer(nn.Module):
    """T5 encoder-decoder with the call signature of T5X's networks.

    Example:
        module = Transformer(T5Config(vocab_size=32, emb_dim=8, num_heads=2, head_dim=4, mlp_dim=16,
                                      num_encoder_layers=1, num_decoder_layers=1))
        tokens = jnp.ones((1, 4), jnp.int32)
        variables = module.init(jax.random.key(0), tokens, tokens, tokens, enable_dropout=False)
        logits = module.apply(variables, tokens, tokens, tokens, enable_dropout=False)
    """

    config: T5Config

    def setup(self) -> None:
        """Creates the two stacks around one embedding."""
        cfg = self.config
        self.token_embedder = layers.Embed(cfg.vocab_size, cfg.emb_dim, cfg.dtype)
        self.encoder = Encoder(cfg, self.token_embedder)
        self.decoder = Decoder(cfg, self.token_embedder)

    def __call__(
        self,
        encoder_input_tokens: SourceIds,
        decoder_input_tokens: Ids,
        decoder_target_tokens: Ids,
        encoder_segment_ids: SourceIds | None = None,
        decoder_segment_ids: Ids | None = None,
        encoder_positions: SourceIds | None = None,
        decoder_positions: Ids | None = None,
        *,
        enable_dropout: bool = True,
        decode: bool = False,
        max_decode_length: int | None = None,
    ) -> Float[Array, "b t v"]:
        """Returns float32 logits of the next target token at every position.

        Args:
            encoder_input_tokens: ids, 0 is padding.
            decoder_input_tokens: targets shifted right, starting with 0.
            decoder_target_tokens: tell which decoder positions are padding.
            encoder_segment_ids: which example of a packed row a token belongs to, 0 for padding.
            decoder_segment_ids: likewise. Without `encoder_segment_ids` all segments of a row
                attend to the whole encoded text (several targets of one input).
            encoder_positions: unused: biases depend on distances only. Part of T5X's signature.
            decoder_positions: likewise.
            enable_dropout: needs an rng named "dropout".
            decode: make the decoding cache (first call) or use and extend it.
            max_decode_length: tokens in the cache, the length of the first call by default.
        """
        del encoder_positions
        encoded = self.encode(encoder_input_tokens, encoder_segment_ids, enable_dropout)
        return self.decode(
            encoded,
            encoder_input_tokens,
            decoder_input_tokens,
            decoder_target_tokens,
            encoder_segment_ids,
            decoder_segment_ids,
            decoder_positions,
            enable_dropout,
            decode,
            max_decode_length,
        )

    def encode(
        self,
        encoder_input_tokens: SourceIds,
        encoder_segment_ids: SourceIds | None = None,
        enable_dropout: bool = True,
    ) -> Float[Array, "b s d"]:
        """Returns the encoded text; see `__call__`."""
        mask = _key_mask(encoder_input_tokens)
        if encoder_segment_ids is not None:
            mask = mask & _same_segment(encoder_segment_ids, encoder_segment_ids)
        return self.encoder(encoder_input_tokens, mask, not enable_dropout)

    def decode(
        self,
        encoded: Float[Array, "b s d"],
        encoder_input_tokens: SourceIds,
        decoder_input_tokens: Ids,
        decoder_target_tokens: Ids,
        encoder_segment_ids: SourceIds | None = None,
        decoder_segment_ids: Ids | None = None,
        decoder_positions: Ids | None = None,
        enable_dropout: bool = True,
        decode: bool = False,
        max_decode_length: int | None = None,
    ) -> Float[Array, "b t v"]:
        """Returns float32 logits for an encoded text; see `__call__`.

        With `decode=True` and mutable collection "cache", the first call makes the cache; every
        later one takes the next tokens (usually one) and returns their logits. To compute keys and
        values of the encoded text once, make "cross_cache" mutable in the first call, which must
        then see the real `encoded`, and pass it on to the later ones.

        Raises:
            ValueError: packed rows while decoding.
        """
        del decoder_positions
        cross_mask = _key_mask(encoder_input_tokens)
        if decode:
            if encoder_segment_ids is not None or decoder_segment_ids is not None:
                raise ValueError(
                    "Packed rows (segment ids) cannot be decoded; give one example per row."
                )
            mask = None
        else:
            mask = _key_mask(decoder_target_tokens) & _causal_mask(decoder_target_tokens.shape[1])
            if decoder_segment_ids is not None:
                mask = mask & _same_segment(decoder_segment_ids, decoder_segment_ids)
            if encoder_segment_ids is not None:
                if decoder_segment_ids is None:
                    raise ValueError(
                        "encoder_segment_ids came without decoder_segment_ids; give both."
                    )
                cross_mask = cross_mask & _same_segment(decoder_segment_ids, encoder_segment_ids)
        return self.decoder(
            decoder_input_tokens,
            mask,
            encoded,
            cross_mask,
            not enable_dropout,
            decode,
            max_decode_length,
        )


def _key_mask(tokens: Ids) -> Bool[Array, "b 1 1 t"]:
    return jnp.asarray(tokens > 0)[:, None, None, :]


def _causal_mask(length: int) -> Bool[Array, "1 1 t t"]:
    positions = jnp.arange(length)
    return (positions[None, :] <= positions[:, None])[None, None]


def _same_segment(
    query_segments: Int[Array | np.ndarray, "b q"], key_segments: Int[Array | np.ndarray, "b t"]
) -> Bool[Array, "b 1 q t"]:
    return jnp.asarray(query_segments[:, None, :, None] == key_segments[:, None, None, :])

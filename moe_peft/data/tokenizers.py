"""Tokenizers of Hugging Face folders as what SeqIO reads: a SentencePiece model, or bytes.

`spiece.model` is that already. A `tokenizer.json` of T5 holds the same pieces, scores and
normalisation as a SentencePiece unigram model, so the model is made from it. Kudo 2018, "Subword
Regularization"; https://github.com/google/sentencepiece, sentencepiece_model.proto.
"""

import base64
from collections.abc import Callable, Mapping, Sequence
import hashlib
import os
import pathlib
import re
from typing import Any

from etils import epath
from sentencepiece import sentencepiece_model_pb2 as proto

from moe_peft import errors
from moe_peft.weights import safetensors_files

MODEL, JSON, SETTINGS = "spiece.model", "tokenizer.json", "tokenizer_config.json"

_SENTINEL = re.compile(r"<extra_id_\d+>")
# Parts of a normaliser that do what SentencePiece does anyway: spaces are one, and none at the end.
_OF_SPACES = ("Strip", "Replace")
_SPLITS = ("WhitespaceSplit", "Metaspace")


def settings(folder: epath.PathLike) -> Mapping[str, Any]:
    """What the folder's tokenizer_config.json says; nothing where there is none."""
    path = epath.Path(folder) / SETTINGS
    return safetensors_files.read_json(path) if path.exists() else {}


def is_bytes(folder: epath.PathLike) -> bool:
    """Whether the folder's model reads bytes, as ByT5 does."""
    return str(settings(folder).get("tokenizer_class")).startswith("ByT5")


def id_named(told: Mapping[str, Any], name: str, id_of: Callable[[str], int | None]) -> int | None:
    """The id of the token that `settings` call "pad_token" or so; None where they name none."""
    text = lambda token: token.get("content") if isinstance(token, Mapping) else token
    if (token := text(told.get(name))) is None:
        return None
    added = told.get("added_tokens_decoder") or {}
    numbers = [int(number) for number, each in added.items() if text(each) == token]
    return numbers[0] if numbers else id_of(token)


def sentencepiece(folder: epath.PathLike) -> pathlib.Path:
    """The folder's SentencePiece model, a UserError if it has none and none can be made.

    Made from `tokenizer.json` where there is no `spiece.model`; it then lies in the user's cache,
    under a name that tells its content.
    """
    folder = epath.Path(folder)
    if (folder / MODEL).exists():
        return pathlib.Path(folder / MODEL)
    if not (folder / JSON).exists():
        raise errors.UserError(f"{folder} has neither {MODEL} nor {JSON}.")
    content = from_json(folder / JSON)
    name = hashlib.sha256(content).hexdigest()[:16]
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    path = cache / "moe_peft" / f"{name}.model"
    if path.exists() and path.read_bytes() == content:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".partial-{os.getpid()}")
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        raise errors.UserError(
            f"Cannot write the SentencePiece model made from {folder / JSON}: {error}. Set "
            "XDG_CACHE_HOME to a folder that can be written."
        ) from error
    return path


def from_json(path: epath.PathLike) -> bytes:
    """Returns a SentencePiece model that gives the ids of a `tokenizer.json`, without sentinels."""
    path = epath.Path(path)
    read = safetensors_files.read_json(path)
    model = read.get("model") or {}
    if model.get("type") != "Unigram":
        raise _unlike(path, "model.type", model.get("type"), "Unigram, as T5's is")
    if model.get("byte_fallback"):
        raise _unlike(path, "model.byte_fallback", True, "false")
    pieces = [piece for piece in model["vocab"] if not _SENTINEL.fullmatch(piece[0])]
    if [piece for piece, _ in pieces] != [piece for piece, _ in model["vocab"][: len(pieces)]]:
        raise _unlike(path, "model.vocab", "sentinels between words", "sentinels at the end")
    made = proto.ModelProto()
    charsmap = b""  # the table of characters that are read as others
    for part in _parts(read, "normalizer", ("Precompiled", *_OF_SPACES), "Precompiled", path):
        if part["type"] == "Precompiled":
            charsmap = base64.b64decode(part["precompiled_charsmap"])
    made.normalizer_spec.precompiled_charsmap = charsmap
    _parts(read, "pre_tokenizer", _SPLITS, " and ".join(_SPLITS), path)
    for index, (piece, score) in enumerate(pieces):
        added = made.pieces.add(piece=piece, score=score)
        if index == model["unk_id"]:
            added.type = proto.ModelProto.SentencePiece.UNKNOWN
        elif piece in ("<pad>", "</s>", "<s>"):
            added.type = proto.ModelProto.SentencePiece.CONTROL
    ids = {piece: index for index, (piece, _) in enumerate(pieces)}
    spec = made.trainer_spec
    spec.model_type = proto.TrainerSpec.UNIGRAM
    spec.vocab_size, spec.unk_id = len(pieces), model["unk_id"]
    of = lambda piece: ids.get(piece, -1)
    spec.pad_id, spec.eos_id, spec.bos_id = of("<pad>"), of("</s>"), of("<s>")
    return made.SerializeToString()


def _parts(
    read: Mapping[str, Any], name: str, known: Sequence[str], expected: str, path: epath.Path
) -> Sequence[Mapping[str, Any]]:
    """The parts of a normaliser or splitter; a UserError for one that is not of a known type."""
    node, several = read.get(name) or {"type": "Sequence"}, name.replace("_", "") + "s"
    found = node.get(several, ()) if node["type"] == "Sequence" else (node,)
    for part in found:
        if part["type"] not in known:
            raise _unlike(path, name, part["type"], expected)
    return found


def _unlike(path: epath.Path, key: str, value: Any, expected: str) -> errors.UserError:
    return errors.UserError(
        f"{path}: {key} is {value!r}; only {expected} can be made a SentencePiece model. Put the "
        f"model's {MODEL} next to it."
    )

"""Vocabularies of texts that a user brings, without TensorFlow: SentencePiece models, and bytes.

They give the ids of SeqIO's vocabularies; `registration.Configured` is one of those.
"""

from collections.abc import Iterable, Mapping, Sequence
import functools
import hashlib
import pathlib
import types
from typing import Any

import gin
from google.protobuf import message
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as proto

from moe_peft import errors
from moe_peft.data import tokenizers
from moe_peft.weights import hub

BYTES = "bytes"
_END, _UNKNOWN = 1, 2
_FIRST_BYTE = 3  # after padding, end and unknown
_SENTINELS = 100  # where nobody says how many


class Bytes:
    """Padding, end, unknown, 256 bytes, and sentinels, which no text has; as ByT5 reads."""

    def __init__(self, extra_ids: int):
        self.extra_ids = extra_ids

    eos_id, pad_id, unk_id, bos_id, path = _END, 0, _UNKNOWN, None, None
    spells_all = True  # no text has the unknown id
    vocab_size = property(lambda self: _FIRST_BYTE + 256 + self.extra_ids)

    def encode(self, text: str) -> list[int]:
        """Ids of the UTF-8 bytes, without end mark."""
        return [byte + _FIRST_BYTE for byte in text.encode()]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of every text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text up to the first end mark; what is not a byte, or not UTF-8, is left out."""
        found = [i - _FIRST_BYTE for i in _until_end(ids, _END)]
        return bytes(i for i in found if 0 <= i < 256).decode("utf-8", errors="ignore")


class SentencePiece:
    """A SentencePiece model with T5's sentinels, the last of them first, behind its pieces."""

    def __init__(
        self,
        path: pathlib.Path,
        extra_ids: int,
        told: Mapping[str, Any] = types.MappingProxyType({}),
    ):
        """Reads the model; raises what sentencepiece raises where it is none.

        `told` are `tokenizers.settings`, whose padding and end go before the model's own.
        """
        self.path, self.extra_ids = path, extra_ids
        model = proto.ModelProto.FromString(path.read_bytes())
        for number in reversed(range(extra_ids)):
            kind = proto.ModelProto.SentencePiece.USER_DEFINED
            model.pieces.add(piece=f"▁<extra_id_{number}>", score=0.0, type=kind)
        self._processor = sentencepiece.SentencePieceProcessor()
        self._processor.LoadFromSerializedProto(model.SerializeToString())
        self.spells_all = model.trainer_spec.byte_fallback
        own = {"pad_token": self._processor.pad_id(), "eos_token": self._processor.eos_id()}
        named = {name: tokenizers.id_named(told, name, self._id_of) for name in own}
        # -1: there is none.
        self.pad_id, self.eos_id = (own[n] if i is None else i for n, i in named.items())

    def _id_of(self, piece: str) -> int | None:
        found = self._processor.PieceToId(piece)
        return found if self._processor.IdToPiece(found) == piece else None

    unk_id = property(lambda self: self._processor.unk_id())
    bos_id = property(lambda self: self._processor.bos_id())
    vocab_size = property(lambda self: self._processor.GetPieceSize())

    def encode(self, text: str) -> list[int]:
        """Ids of the pieces, without end mark."""
        return self._processor.EncodeAsIds(text)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of every text, several times as fast as one by one."""
        return self._processor.Encode(list(texts))

    def decode(self, ids: Iterable[int]) -> str:
        """The text up to the first end mark; ids without a piece are the unknown one."""
        known = [int(i) if i < self.vocab_size else self.unk_id for i in ids]
        return self._processor.DecodeIds(_until_end(known, self.eos_id))


Vocabulary = Bytes | SentencePiece


def _until_end(ids: Iterable[int], end: int) -> list[int]:
    ids = list(ids)
    return ids[: ids.index(end)] if end in ids else ids


@gin.configurable(module="vocabularies")
def configured(vocabulary: str | None = None) -> str:
    """What gin sets: `vocabularies.configured.vocabulary = "/models/t5/spiece.model"`.

    Args:
      vocabulary: path of T5's SentencePiece model, or of a Hugging Face folder with its tokenizer
        ("hf:/folder" or "/folder"), or "bytes" for the 272 ids of the embedded backbone (padding,
        end, unknown, 256 bytes, 13 sentinels).
    """
    if vocabulary is None:
        raise errors.UserError(
            "VOCABULARY is not set; give the path of T5's SentencePiece model, such as "
            "--gin.VOCABULARY=/models/t5/spiece.model, or --gin.VOCABULARY=bytes."
        )
    return vocabulary


def get(name: str | None = None) -> Vocabulary:
    """The vocabulary of that name, as `configured` takes it; None: the one that gin sets.

    Raises UserError if there is none, or its file is missing or of another kind.
    """
    return _load(configured() if name is None else name)


def _path(name: str) -> pathlib.Path:
    return pathlib.Path(hub.local(name.removeprefix("hf:"))).expanduser()


@functools.cache
def _load(name: str) -> Vocabulary:
    if name == BYTES:
        return Bytes(extra_ids=13)
    path = _path(name)
    told: Mapping[str, Any] = {}
    if path.is_dir():
        if tokenizers.is_bytes(path):
            return Bytes(extra_ids=125)  # ByT5's 384 ids
        told = tokenizers.settings(path)
        path = tokenizers.sentencepiece(path)
    if not path.is_file():
        raise errors.UserError(
            f"VOCABULARY {name!r} is not a file; expected T5's SentencePiece model, a folder with "
            f"a tokenizer, or {BYTES!r}."
        )
    try:
        vocabulary = SentencePiece(path, told.get("extra_ids", _SENTINELS), told)
        vocabulary.encode("a")
    except (message.Error, RuntimeError, OSError) as problem:
        raise errors.UserError(f"VOCABULARY {name!r} is not a SentencePiece model.") from problem
    return vocabulary


@functools.cache
def _digest(name: str) -> str:
    path = _path(name)
    if name == BYTES or tokenizers.is_bytes(path):
        content = BYTES.encode()
    else:
        content = (tokenizers.sentencepiece(path) if path.is_dir() else path).read_bytes()
        if (extra_ids := get(name).extra_ids) != _SENTINELS:
            content += f" {extra_ids}".encode()
    return hashlib.sha256(content).hexdigest()[:12]


def fingerprint(name: str | None = None) -> str:
    """Tells vocabularies apart by their content, for caches of token ids; `name` as in `get`."""
    name = configured() if name is None else name
    get(name)
    return _digest(name)

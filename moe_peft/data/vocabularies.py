"""Vocabularies of texts, without TensorFlow: SentencePiece models, bytes, and folders' tokenizers.

A file and "bytes" give the ids of SeqIO's vocabularies, a folder those of transformers'. For SeqIO
they are wrapped in `seqio_vocabularies.Wrapped`.
"""

from collections.abc import Iterable, Sequence
import functools
import hashlib
import pathlib

import gin
from google.protobuf import message
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as proto

from moe_peft import errors
from moe_peft.data import tokenizer_files, tokenizers
from moe_peft.weights import hub

BYTES = "bytes"
_END, _UNKNOWN = 1, 2
_FIRST_BYTE = 3  # after padding, end and unknown


class Bytes:
    """Padding, end, unknown, 256 bytes, and sentinels, which no text has; as ByT5 reads."""

    def __init__(self, extra_ids: int):
        self.extra_ids = extra_ids

    eos_id, pad_id, unk_id, bos_id = _END, 0, _UNKNOWN, None
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
        found = [i - _FIRST_BYTE for i in tokenizers.until_end(ids, _END)]
        return bytes(i for i in found if 0 <= i < 256).decode("utf-8", errors="ignore")

    def content(self) -> bytes:
        """What the ids depend on."""
        return BYTES.encode()


class SentencePiece:
    """A SentencePiece model with T5's sentinels, the last of them first, behind its pieces."""

    def __init__(self, path: pathlib.Path, extra_ids: int):
        """Reads the model; raises what sentencepiece raises where it is none."""
        self.path, self.extra_ids = path, extra_ids
        model = proto.ModelProto.FromString(path.read_bytes())
        has_own = any(tokenizer_files.SENTINEL.fullmatch(each.piece) for each in model.pieces)
        for number in reversed(range(0 if has_own else extra_ids)):  # mT5's are in the file
            kind = proto.ModelProto.SentencePiece.USER_DEFINED
            model.pieces.add(piece=f"▁<extra_id_{number}>", score=0.0, type=kind)
        self._processor = sentencepiece.SentencePieceProcessor()
        self._processor.LoadFromSerializedProto(model.SerializeToString())
        self.spells_all = model.trainer_spec.byte_fallback

    pad_id = property(lambda self: self._processor.pad_id())  # -1: there is none
    eos_id = property(lambda self: self._processor.eos_id())
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
        return self._processor.DecodeIds(tokenizers.until_end(known, self.eos_id))

    def content(self) -> bytes:
        """What the ids depend on."""
        return self.path.read_bytes()


Vocabulary = Bytes | SentencePiece | tokenizers.Tokenizer | tokenizers.ByT5


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
    if path.is_dir():
        return tokenizers.of_folder(path)
    if not path.is_file():
        raise errors.UserError(
            f"VOCABULARY {name!r} is not a file; expected T5's SentencePiece model, a folder with "
            f"a tokenizer, or {BYTES!r}."
        )
    try:
        vocabulary = SentencePiece(path, extra_ids=100)
        vocabulary.encode("a")
    except (message.Error, RuntimeError, OSError) as problem:
        raise errors.UserError(f"VOCABULARY {name!r} is not a SentencePiece model.") from problem
    return vocabulary


@functools.cache
def _digest(name: str) -> str:
    return hashlib.sha256(_load(name).content()).hexdigest()[:12]


def fingerprint(name: str | None = None) -> str:
    """Tells vocabularies apart by their content, for caches of token ids; `name` as in `get`."""
    return _digest(configured() if name is None else name)

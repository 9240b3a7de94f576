"""The vocabulary of tasks whose texts a user brings: chosen in gin, looked up when it is used."""

import functools
import hashlib
import pathlib

import gin
from google.protobuf import message
import seqio

from moe_peft import errors
from moe_peft.data import tokenizers

BYTES = "bytes"


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


def get() -> seqio.Vocabulary:
    """The vocabulary that gin sets; a UserError if there is none, or its file is missing."""
    return _load(configured())


def _path(name: str) -> pathlib.Path:
    return pathlib.Path(name.removeprefix("hf:")).expanduser()


@functools.cache
def _load(name: str) -> seqio.Vocabulary:
    if name == BYTES:
        return seqio.ByteVocabulary(extra_ids=13)
    path = _path(name)
    if path.is_dir():
        if tokenizers.is_bytes(path):
            return seqio.ByteVocabulary(extra_ids=125)  # ByT5's 384 ids
        path = tokenizers.sentencepiece(path)
    if not path.is_file():
        raise errors.UserError(
            f"VOCABULARY {name!r} is not a file; expected T5's SentencePiece model, a folder with "
            f"a tokenizer, or {BYTES!r}."
        )
    vocabulary = seqio.SentencePieceVocabulary(str(path), extra_ids=100)
    try:
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
    return hashlib.sha256(content).hexdigest()[:12]


def fingerprint() -> str:
    """Tells vocabularies apart by their content, for caches of token ids."""
    get()
    return _digest(configured())


class Configured(seqio.Vocabulary):
    """Stands for `get()` in tasks that are registered before gin has been read."""

    def __eq__(self, other):
        return isinstance(other, Configured)

    def __hash__(self):
        return hash(Configured)

    extra_ids = property(lambda self: get().extra_ids)
    bos_id = property(lambda self: get().bos_id)
    eos_id = property(lambda self: get().eos_id)
    unk_id = property(lambda self: get().unk_id)
    vocab_size = property(lambda self: get().vocab_size)  # each kind counts sentinels its own way
    _base_vocab_size = property(lambda self: get()._base_vocab_size)

    _encode = lambda self, text: get()._encode(text)
    _decode = lambda self, ids: get()._decode(ids)
    _encode_tf = lambda self, text: get()._encode_tf(text)
    _decode_tf = lambda self, ids: get()._decode_tf(ids)

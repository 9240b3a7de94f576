"""The vocabularies of Hugging Face folders: ids are those of transformers' fast tokenizers.

A text that spells a special or added token gets its id. ByT5, which has no fast tokenizer, reads as
its Python one does.
"""

from collections.abc import Iterable, Sequence
import json
import re

from etils import epath

from moe_peft import errors
from moe_peft.data import tokenizer_files

_FIRST_BYTE, _BYTES = 3, 256  # after padding, end and unknown


class Tokenizer:
    """What `tokenizers` reads: unigrams or pairs, of characters or bytes."""

    def __init__(self, folder: epath.PathLike):
        """Reads the files; a UserError where there are none, or they are of no known kind."""
        files = tokenizer_files.Folder(folder)
        self._fast = fast = tokenizer_files.fast(files)
        id_of = lambda role: fast.token_to_id(files.roles.get(role, {"content": ""})["content"])
        self.pad_id, self.eos_id = id_of("pad_token"), id_of("eos_token")
        self.unk_id, self.bos_id = id_of("unk_token"), id_of("bos_token")
        if self.eos_id is None:
            raise errors.UserError(
                f"{folder}: the end mark {files.roles['eos_token']['content']!r} is not a token; "
                f"say which is as eos_token in {tokenizer_files.SETTINGS}."
            )
        ids = fast.get_vocab()
        self.vocab_size = max(ids.values()) + 1
        self.extra_ids = _num_sentinels(ids)
        self.spells_all = tokenizer_files.spells_all(fast)
        # Batches end rows themselves; what comes before a text, such as RoBERTa's <s>, stays.
        self._num_ends = int(fast.encode("").ids[-1:] == [self.eos_id])

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without end mark."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of every text, on all cores."""
        found = (each.ids for each in self._fast.encode_batch_fast(list(texts)))
        return [ids[: len(ids) - self._num_ends] for ids in found]

    def decode(self, ids: Iterable[int]) -> str:
        """The text up to the first end mark, special tokens left out, spaces as they are."""
        return self._fast.decode(until_end(ids, self.eos_id), skip_special_tokens=True)

    def content(self) -> bytes:
        """What the ids depend on."""
        return f"{self._fast.to_str()} {self.eos_id}".encode()


class ByT5:
    """UTF-8 bytes after padding, end and unknown; sentinels and added tokens follow."""

    pad_id, eos_id, unk_id, bos_id = 0, 1, 2, None
    spells_all = True

    def __init__(self, folder: epath.PathLike):
        """Reads how the folder's tokens are called, if it says so."""
        files = tokenizer_files.Folder(folder)
        three = ("pad_token", "eos_token", "unk_token")
        self._tokens = {number: files.roles[role] for number, role in enumerate(three)}
        self._tokens |= files.added
        known = [token["content"] for token in self._tokens.values()]
        for token in files.tokens(known, is_piece=lambda name: True):
            if token["content"] not in known:
                self._tokens[_BYTES + len(self._tokens)] = token
        self._ids = {token["content"]: number for number, token in self._tokens.items()}
        longest_first = sorted(map(re.escape, self._ids), key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(longest_first)})")
        self.vocab_size = max(_FIRST_BYTE + _BYTES - 1, *self._tokens) + 1
        self.extra_ids = _num_sentinels(self._ids)

    def encode(self, text: str) -> list[int]:
        """Ids of the bytes, without end mark: one that the text ends with is the row's."""
        parts = list(filter(None, self._pattern.split(text)))
        for place in range(len(parts)):
            self._part(parts, place)
        ids = []
        for part in parts:
            known = self._ids.get(part)
            ids += [byte + _FIRST_BYTE for byte in part.encode()] if known is None else [known]
        return ids[:-1] if ids[-1:] == [self.eos_id] else ids

    def _part(self, parts: list[str], place: int) -> None:
        """Takes white space from around a token, or makes it text where it is not a word."""
        if parts[place] not in self._ids:
            return
        token = self._tokens[self._ids[parts[place]]]
        before, after = place - 1, place + 1
        if after < len(parts) and token.get("rstrip"):
            parts[after] = parts[after].lstrip()
        if before >= 0 and token.get("lstrip"):
            parts[before] = parts[before].rstrip()
        if not token.get("single_word"):
            return
        if before >= 0 and parts[before] and parts[before][-1] != " ":
            parts[before], parts[place] = parts[before] + parts[place], ""
        elif after < len(parts) and parts[after] and parts[after][0] != " ":
            parts[after], parts[place] = parts[place] + parts[after], ""

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of every text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text up to the first end mark, without special tokens and what is not UTF-8."""
        found = []
        for number in until_end(ids, self.eos_id):
            if token := self._tokens.get(number):
                found.append(b"" if token.get("special") else token["content"].encode())
            elif 0 <= number - _FIRST_BYTE < _BYTES:
                found.append(bytes([number - _FIRST_BYTE]))
        return b"".join(found).decode("utf-8", errors="ignore")

    def content(self) -> bytes:
        """What the ids depend on."""
        return json.dumps(self._tokens, sort_keys=True).encode()


def of_folder(folder: epath.PathLike) -> Tokenizer | ByT5:
    """The vocabulary of a folder; UserError as `Tokenizer` raises it."""
    is_bytes = tokenizer_files.Folder(folder).class_name == tokenizer_files.BYT5
    return (ByT5 if is_bytes else Tokenizer)(folder)


def until_end(ids: Iterable[int], end: int) -> list[int]:
    """The ids before the first end mark."""
    ids = [int(number) for number in ids]
    return ids[: ids.index(end)] if end in ids else ids


def _num_sentinels(tokens: Iterable[str]) -> int:
    return sum(bool(tokenizer_files.SENTINEL.fullmatch(token)) for token in tokens)

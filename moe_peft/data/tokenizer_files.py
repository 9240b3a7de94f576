"""The tokenizer files of a Hugging Face folder: what its tokens are called, and what reads texts.

`tokenizer.json` is read as it is written, also next to other files, as transformers does. Where
there is none, the same is made of `spiece.model`, or of `vocab.json` and `merges.txt`.
"""

from collections.abc import Callable, Iterable, Mapping
import json
import re
from typing import Any

from etils import epath
from google.protobuf import message
from sentencepiece import sentencepiece_model_pb2 as proto

from moe_peft import errors
from moe_peft.weights import safetensors_files

JSON, MODEL, PIECES, MERGES = "tokenizer.json", "spiece.model", "vocab.json", "merges.txt"
SETTINGS = "tokenizer_config.json"
SENTINEL = re.compile(r"▁?<extra_id_\d+>")

_ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_OF_T5 = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
_OF_ROBERTA = {"bos_token": "<s>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
_FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
T5, BYT5, ROBERTA = "T5Tokenizer", "ByT5Tokenizer", "RobertaTokenizer"
_EXTRA_IDS = {T5: 100, "MT5Tokenizer": 100, BYT5: 125}  # sentinels that a folder need not list

Token = Mapping[str, Any]  # what makes a tokenizers.AddedToken
_Piece = proto.ModelProto.SentencePiece


class Folder:
    """What a folder says of its tokens. Files of older versions count where newer ones lack."""

    def __init__(self, folder: epath.PathLike):
        """Reads the small files."""
        self.path = epath.Path(folder)
        own = self._read(SETTINGS)
        config = self._read("config.json")
        decoder = own.get("added_tokens_decoder")
        own |= {} if decoder is not None else self._read("special_tokens_map.json")
        self.class_name = self._class_name(own, config)
        # White space around ByT5's own goes with them, where files do not say otherwise.
        bare = {"lstrip": True, "rstrip": True} if self.class_name == BYT5 else {}
        usual = _OF_T5 | (_OF_ROBERTA if self.class_name == ROBERTA else {})
        self._named = {role: bare | _token(own[role]) for role in _ROLES if own.get(role)}
        # All that have a role, those included that no file names.
        self.roles = {role: bare | _token(name) for role, name in usual.items()} | self._named
        extra = own.get("extra_special_tokens") or own.get("additional_special_tokens") or ()
        extra = extra.values() if isinstance(extra, Mapping) else extra
        self.extra = [_token(token) for token in extra]
        self.has_prefix = bool(own.get("add_prefix_space"))
        given = own.get("extra_ids")
        self.num_sentinels = _EXTRA_IDS.get(self.class_name, 0) if given is None else int(given)
        special = {token["content"] for token in (*self.extra, *self._named.values())}
        if decoder is not None:
            found = {int(number): token for number, token in decoder.items()}
        else:
            flags = lambda name: {"special": name in special, "normalized": name not in special}
            added = self._read("added_tokens.json")
            found = {number: {"content": name} | flags(name) for name, number in added.items()}
        is_named = lambda number: found[number]["content"] in special
        self.added = {number: _token(found[number], is_named(number)) for number in sorted(found)}

    def _class_name(self, own: Mapping[str, Any], config: Mapping[str, Any]) -> str:
        """Transformers' class without its "Fast"; of a folder that names none, by its files."""
        if found := own.get("tokenizer_class") or config.get("tokenizer_class"):
            return found.removesuffix("Fast")
        if self.has(JSON):
            return T5 if config.get("model_type") in ("t5", "mt5") else ""
        return T5 if self.has(MODEL) else ROBERTA

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return (self.path / name).exists()

    def _read(self, name: str) -> dict[str, Any]:
        return dict(safetensors_files.read_json(self.path / name)) if self.has(name) else {}

    def tokens(self, known: Iterable[str], is_piece: Callable[[str], bool]) -> Iterable[Token]:
        """Tokens to add, in their order, besides those known.

        What the files do not name counts only where it is a piece of the vocabulary already.
        """
        yield from self.added.values()
        known = {*known, *(token["content"] for token in self.added.values())}
        usual = [*self.roles.values()] if self.class_name in (*_EXTRA_IDS, ROBERTA) else []
        if not any(SENTINEL.fullmatch(token["content"]) for token in self.extra):
            usual += [_token(f"<extra_id_{number}>") for number in range(self.num_sentinels)]
        usual = [token for token in usual if is_piece(token["content"])]
        for token in (*self._named.values(), *self.extra, *usual):
            if token["content"] not in known:
                known.add(token["content"])
                yield token


def _token(token: str | Token, is_named: bool = True) -> Token:
    """The token's text and flags; one with a name is special."""
    if isinstance(token, str):
        return {"content": token, "special": True, "normalized": False}
    found = {flag: token[flag] for flag in _FLAGS if flag in token}
    return found | ({"special": True} if is_named else {})


def fast(folder: Folder) -> Any:
    """The folder's `tokenizers.Tokenizer`; a UserError where no files tell it."""
    import tokenizers

    extra = []
    if folder.has(JSON):
        made = _of_json(folder.path / JSON)
    elif folder.has(MODEL):
        made, extra = _of_pieces(folder)
    elif folder.has(PIECES) and folder.has(MERGES):
        made = _of_merges(folder)
    else:
        raise errors.UserError(
            f"{folder.path} has none of {JSON}, {MODEL}, or {PIECES} and {MERGES}, and its "
            f"{SETTINGS} does not name ByT5Tokenizer."
        )
    made.no_truncation()
    made.no_padding()
    known = [token.content for token in made.get_added_tokens_decoder().values()]
    is_piece = lambda name: made.token_to_id(name) is not None
    tokens = {token["content"]: token for token in folder.tokens(known, is_piece)}
    if not folder.extra:
        tokens = {token["content"]: token for token in extra} | tokens
    made.add_tokens([tokenizers.AddedToken(**token) for token in tokens.values()])
    return made


def spells_all(made: Any) -> bool:
    """Whether no text has the unknown id: the tokenizer falls back on bytes."""
    told = json.loads(made.to_str())
    return bool(told["model"].get("byte_fallback")) or "ByteLevel" in str(told["pre_tokenizer"])


def _of_json(path: epath.Path) -> Any:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(path.read_text())
    except Exception as error:  # the library has no class of its own
        reason = " ".join(str(error).split())[:200]
        raise errors.UserError(
            f"{path} is not a tokenizer that tokenizers {tokenizers.__version__} reads: {reason}."
        ) from error


def _of_pieces(folder: Folder) -> tuple[Any, list[Token]]:
    """A tokenizer of a SentencePiece model, and the tokens that the model itself sets apart."""
    try:
        model = proto.ModelProto.FromString((folder.path / MODEL).read_bytes())
    except message.Error as error:
        raise errors.UserError(f"{folder.path / MODEL} is not a SentencePiece model.") from error
    makers = {proto.TrainerSpec.UNIGRAM: _unigram, proto.TrainerSpec.BPE: _bpe}
    if model.trainer_spec.model_type not in makers:
        kind = proto.TrainerSpec.ModelType.Name(model.trainer_spec.model_type)
        raise errors.UserError(f"{folder.path / MODEL} is of {kind}; expected UNIGRAM or BPE.")
    apart = {_Piece.CONTROL: True, _Piece.USER_DEFINED: False}
    extra = [
        {"content": piece.piece, "special": apart[piece.type], "normalized": False}
        for piece in model.pieces
        if piece.type in apart
    ]
    return makers[model.trainer_spec.model_type](model, folder), extra


def _unigram(model: Any, folder: Folder) -> Any:
    """As T5 reads: any white space parts words, and sentinels follow the pieces, the last first."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    pieces += [(f"<extra_id_{number}>", 0.0) for number in reversed(range(folder.num_sentinels))]
    spec = model.trainer_spec
    made = tokenizers.Tokenizer(models.Unigram(pieces, spec.unk_id, spec.byte_fallback))
    if model.normalizer_spec.precompiled_charsmap:
        made.normalizer = normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap)
    words = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    made.pre_tokenizer = pre_tokenizers.Sequence(words)
    made.decoder = decoders.Metaspace()
    return made


def _bpe(model: Any, _: Folder) -> Any:
    """As sentencepiece reads: two neighbours join that are a piece, the best score first."""
    import tokenizers
    from tokenizers import decoders, models, normalizers

    spec, rules = model.trainer_spec, model.normalizer_spec
    ids = {piece.piece: number for number, piece in enumerate(model.pieces)}
    joined = [piece for piece in model.pieces if piece.type == _Piece.NORMAL]
    known, merges = {piece.piece for piece in joined}, []
    for piece in sorted(joined, key=lambda piece: -piece.score):
        parts = ((piece.piece[:n], piece.piece[n:]) for n in range(1, len(piece.piece)))
        merges += [pair for pair in parts if known.issuperset(pair)]
    unknown = model.pieces[spec.unk_id].piece
    made = tokenizers.Tokenizer(
        models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=spec.byte_fallback)
    )
    steps = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        ends, several = tokenizers.Regex(r"\A +| +\z"), tokenizers.Regex(" {2,}")
        steps += [normalizers.Replace(ends, ""), normalizers.Replace(several, " ")]
    steps.append(normalizers.Replace(" ", "▁"))
    steps += [normalizers.Prepend("▁")] if rules.add_dummy_prefix else []
    made.normalizer = normalizers.Sequence(steps)
    texts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*texts, decoders.Strip(" ", 1, 0)])
    return made


def _of_merges(folder: Folder) -> Any:
    """As RoBERTa reads: pairs of bytes, the ends of a text marked."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    made = tokenizers.Tokenizer(
        models.BPE.from_file(*(str(folder.path / name) for name in (PIECES, MERGES)))
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=folder.has_prefix)
    made.decoder = decoders.ByteLevel()
    names = [folder.roles[role]["content"] for role in ("sep_token", "cls_token")]
    ends = [(name, made.token_to_id(name)) for name in names]
    if any(number is None for _, number in ends):
        raise errors.UserError(f"{folder.path / PIECES} lacks one of {', '.join(names)}.")
    made.post_processor = processors.RobertaProcessing(*ends, add_prefix_space=folder.has_prefix)
    return made

"""Folders with small tokenizers of every kind that is read, trained on lines of our own."""

import io
import json
import pathlib

import script_lines
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as proto
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

OF_T5 = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
OF_ROBERTA = OF_T5 | {"bos_token": "<s>", "cls_token": "<s>"}
OF_ROBERTA |= {"sep_token": "</s>", "mask_token": "<mask>"}
# Tokens that a user adds, one for each flag; lines have them in the middle of words, too.
ADDED = {
    "<left>": {"lstrip": True, "normalized": False},
    "<right>": {"rstrip": True, "normalized": False},
    "<word>": {"single_word": True, "normalized": False},
    "<NORMAL>": {"normalized": True},
    "<plain>": {"normalized": False, "special": True},
}


def _write(path: pathlib.Path, content) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _flags(content: str, **given) -> dict:
    """All flags of an added token, as they are written in a file."""
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"content": content, **dict.fromkeys(names, False), **given}


def _training_lines() -> list[str]:
    return script_lines.lines(1_500, seed=1, plain=True)


def _sentencepiece(kind: str, size: int, **settings) -> bytes:
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_training_lines()),
        model_writer=made,
        model_type=kind,
        vocab_size=size,
        character_coverage=0.98,
        minloglevel=2,
        num_threads=1,
        **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, **settings},
    )
    return made.getvalue()


def spiece(folder: pathlib.Path) -> None:
    """As google/t5-v1_1-*: only a SentencePiece model, of unigrams."""
    (folder / "spiece.model").write_bytes(_sentencepiece("unigram", 1_500))
    _write(folder / "config.json", {"model_type": "t5"})
    _write(folder / "tokenizer_config.json", {**OF_T5, "tokenizer_class": "T5Tokenizer"})


def spiece_with_sentinels(folder: pathlib.Path) -> None:
    """As google/mt5-*: the model itself has the sentinels, and none is added."""
    sentinels = [f"<extra_id_{number}>" for number in reversed(range(100))]
    content = _sentencepiece("unigram", 1_600, user_defined_symbols=sentinels)
    model = proto.ModelProto.FromString(content)
    ordinary = [piece for piece in model.pieces if piece.type != 4]
    sentinels = [piece for piece in model.pieces if piece.type == 4]
    for piece in sentinels:
        piece.piece = f"▁{piece.piece}"
    pieces = [*ordinary, *sentinels]
    del model.pieces[:]
    model.pieces.extend(pieces)
    (folder / "spiece.model").write_bytes(model.SerializeToString())
    _write(folder / "config.json", {"model_type": "mt5"})
    settings = {**OF_T5, "extra_ids": 0, "additional_special_tokens": None}
    _write(folder / "tokenizer_config.json", {**settings, "tokenizer_class": "T5Tokenizer"})
    _write(folder / "special_tokens_map.json", OF_T5)


def spiece_bpe(folder: pathlib.Path) -> None:
    """A SentencePiece model of BPE whose unknown characters are bytes."""
    content = _sentencepiece("bpe", 2_000, byte_fallback=True)
    (folder / "spiece.model").write_bytes(content)
    (folder / "tokenizer.model").write_bytes(content)  # where transformers looks
    _write(folder / "config.json", {"model_type": "umt5"})
    settings = {**OF_T5, "extra_ids": 0, "tokenizer_class": "TokenizersBackend"}
    _write(folder / "tokenizer_config.json", settings)


def json_unigram(folder: pathlib.Path) -> None:
    """As google/flan-t5-*: tokenizer.json, a model, and tokens that a user added."""
    content = _sentencepiece("unigram", 1_500)
    (folder / "spiece.model").write_bytes(_sentencepiece("unigram", 1_550))  # not the one in use
    model = proto.ModelProto.FromString(content)
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    sentinels = [f"<extra_id_{number}>" for number in range(100)]
    pieces += [(name, 0.0) for name in reversed(sentinels)]
    made = tokenizers.Tokenizer(models.Unigram(pieces, 2, False))
    made.normalizer = normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap)
    words = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    made.pre_tokenizer = pre_tokenizers.Sequence(words)
    made.decoder = decoders.Metaspace()
    made.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    names = [*OF_T5.values(), *sentinels]
    made.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in names])
    made.add_tokens([tokenizers.AddedToken(name, **flags) for name, flags in ADDED.items()])
    made.save(str(folder / "tokenizer.json"))
    _write(folder / "config.json", {"model_type": "t5"})
    settings = {**OF_T5, "extra_ids": 100, "additional_special_tokens": sentinels}
    _write(folder / "tokenizer_config.json", {**settings, "tokenizer_class": "T5Tokenizer"})


def _byte_pairs() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1_500,
        show_progress=False,
        special_tokens=["<pad>", "<s>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator(_training_lines(), trainer)
    return made


def merges(folder: pathlib.Path) -> None:
    """As Salesforce/codet5-*: vocab.json and merges.txt, the older files beside them."""
    made = _byte_pairs()
    made.model.save(str(folder))
    sentinels = [f"<extra_id_{number}>" for number in range(100)]
    _write(folder / "config.json", {"model_type": "t5"})
    settings = {**OF_ROBERTA, "add_prefix_space": False, "tokenizer_class": "RobertaTokenizer"}
    settings["additional_special_tokens"] = sentinels
    _write(folder / "tokenizer_config.json", settings)
    mask = _flags("<mask>", lstrip=True)
    del mask["special"]
    _write(folder / "special_tokens_map.json", {**OF_ROBERTA, "mask_token": mask})
    size = made.get_vocab_size()
    added = {name: size + place for place, name in enumerate([*reversed(sentinels), "<NORMAL>"])}
    _write(folder / "added_tokens.json", added)


def json_bytes(folder: pathlib.Path) -> None:
    """As Salesforce/codet5p-*: tokenizer.json of byte pairs, flags in tokenizer_config.json."""
    made = _byte_pairs()
    ends = (("</s>", 2), ("<s>", 1))
    made.post_processor = processors.RobertaProcessing(*ends, add_prefix_space=False)
    made.add_tokens([tokenizers.AddedToken(name, **flags) for name, flags in ADDED.items()])
    made.save(str(folder / "tokenizer.json"))
    _write(folder / "config.json", {"model_type": "t5"})
    decoder = {
        made.token_to_id(name): _flags(name, special=True)
        for name in ("<pad>", "<s>", "</s>", "<unk>")
    }
    decoder[made.token_to_id("<mask>")] = _flags("<mask>", lstrip=True, special=True)
    for name, flags in ADDED.items():
        decoder[made.token_to_id(name)] = _flags(name, **flags)
    settings = {**OF_ROBERTA, "add_prefix_space": False, "tokenizer_class": "RobertaTokenizer"}
    settings["added_tokens_decoder"] = {str(number): flags for number, flags in decoder.items()}
    _write(folder / "tokenizer_config.json", settings)


def byt5(folder: pathlib.Path) -> None:
    """As google/byt5-*: no vocabulary at all."""
    named = {
        role: {"__type": "AddedToken", **_flags(name, normalized=True)}
        for role, name in OF_T5.items()
    }
    for flags in named.values():
        del flags["special"]
    sentinels = [f"<extra_id_{number}>" for number in range(125)]
    settings = {**named, "extra_ids": 125, "additional_special_tokens": sentinels}
    _write(folder / "tokenizer_config.json", {**settings, "tokenizer_class": "ByT5Tokenizer"})
    _write(folder / "config.json", {"model_type": "t5", "tokenizer_class": "ByT5Tokenizer"})
    _write(folder / "special_tokens_map.json", {**OF_T5, "additional_special_tokens": sentinels})


def byt5_added(folder: pathlib.Path) -> None:
    """ByT5 as transformers saves it, with tokens that a user added."""
    sentinels = [f"<extra_id_{number}>" for number in range(125)]
    around = {"lstrip": True, "rstrip": True, "special": True}
    decoder = {number: _flags(name, **around) for number, name in enumerate(OF_T5.values())}
    decoder |= {259 + n: _flags(name, special=True) for n, name in enumerate(sentinels)}
    decoder |= {384 + n: _flags(name, **flags) for n, (name, flags) in enumerate(ADDED.items())}
    settings = {
        "added_tokens_decoder": {str(number): flags for number, flags in decoder.items()},
        "additional_special_tokens": [*sentinels, "<plain>"],
        "extra_ids": 0,
    }
    _write(folder / "tokenizer_config.json", {**settings, "tokenizer_class": "ByT5Tokenizer"})
    _write(folder / "config.json", {"model_type": "t5", "tokenizer_class": "ByT5Tokenizer"})


KINDS = {
    function.__name__: function
    for function in (
        *(spiece, spiece_with_sentinels, spiece_bpe, json_unigram, merges, json_bytes),
        *(byt5, byt5_added),
    )
}


def make(folder: pathlib.Path, kind: str) -> pathlib.Path:
    """The folder with a tokenizer of that kind."""
    folder.mkdir()
    KINDS[kind](folder)
    return folder

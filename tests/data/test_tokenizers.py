"""Tokenizers of folders give the ids of SentencePiece through SeqIO."""

import base64
import json
import pathlib
import shutil

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as proto
import seqio

from moe_peft import errors
from moe_peft.data import tokenizers, vocabularies

SPIECE = pathlib.Path(seqio.__file__).parent / "test_data/sentencepiece/sentencepiece.model"
TEXTS = [
    "The quick brown fox, 1,234 times; isn't it?",
    "  spaces   in\tthe middle \n and at the end  ",
    "naïve café ﬁsh №5 ½ Ｆｕｌｌ ｗｉｄｔｈ",
    "日本語 and Ελληνικά and \U0001f600",
    "</s> in <pad> words",
    "",
]


@pytest.fixture
def spiece_folder(tmp_path):
    folder = tmp_path / "spiece"
    folder.mkdir()
    shutil.copy(SPIECE, folder / "spiece.model")
    return folder


@pytest.fixture
def settings():
    """A tokenizer.json with the pieces of SeqIO's test model, as transformers writes it."""
    model = proto.ModelProto.FromString(SPIECE.read_bytes())
    vocab = [[piece.piece, piece.score] for piece in model.pieces]
    vocab += [[f"<extra_id_{index}>", 0.0] for index in range(99, -1, -1)]
    charsmap = base64.b64encode(model.normalizer_spec.precompiled_charsmap).decode()
    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Precompiled", "precompiled_charsmap": charsmap},
                {"type": "Strip", "strip_left": False, "strip_right": True},
            ],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "WhitespaceSplit"}, {"type": "Metaspace"}],
        },
        "model": {"type": "Unigram", "unk_id": model.trainer_spec.unk_id, "vocab": vocab},
    }


@pytest.fixture
def json_folder(tmp_path, settings, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "json"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    return folder


def expected_ids(text):
    return sentencepiece.SentencePieceProcessor(model_file=str(SPIECE)).encode(text)


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_folders_give_the_ids_of_sentencepiece(spiece_folder, json_folder, prefix):
    for folder in (spiece_folder, json_folder):
        vocabulary = vocabularies._load(f"{prefix}{folder}")
        plain = seqio.SentencePieceVocabulary(str(SPIECE), extra_ids=100)
        assert vocabulary.vocab_size == plain.vocab_size
        assert (vocabulary.eos_id, vocabulary.pad_id, vocabulary.unk_id) == (
            plain.eos_id,
            plain.pad_id,
            plain.unk_id,
        )
        for text in TEXTS:
            assert vocabulary.encode(text) == expected_ids(text), text
            assert vocabulary.decode(expected_ids(text)) == plain.decode(expected_ids(text))


def test_the_model_is_made_once(json_folder, tmp_path):
    path = tokenizers.sentencepiece(json_folder)
    assert path.parent == tmp_path / "cache" / "moe_peft"
    written = path.stat().st_mtime_ns
    assert tokenizers.sentencepiece(json_folder) == path
    assert path.stat().st_mtime_ns == written
    path.write_bytes(b"damaged")
    tokenizers.sentencepiece(json_folder)
    assert path.read_bytes() == tokenizers.from_json(json_folder / "tokenizer.json")
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_fingerprints_tell_content_apart(spiece_folder, json_folder):
    by_folder = vocabularies._digest(str(spiece_folder))
    assert by_folder == vocabularies._digest(str(SPIECE))
    assert by_folder != vocabularies._digest(str(json_folder))  # another file of the same pieces


def test_bytes(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    vocabulary = vocabularies._load(str(tmp_path))
    assert vocabulary.vocab_size == 384
    assert vocabulary.encode("hé") == [107, 198, 172]  # as transformers' ByT5Tokenizer


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model", {"type": "BPE"}, "model.type is 'BPE'; only Unigram"),
        ("normalizer", {"type": "Lowercase"}, "normalizer is 'Lowercase'; only Precompiled"),
        ("pre_tokenizer", {"type": "ByteLevel"}, "pre_tokenizer is 'ByteLevel'; only Whitespace"),
    ],
)
def test_tokenizers_that_sentencepiece_is_not(json_folder, settings, key, value, words):
    (json_folder / "tokenizer.json").write_text(json.dumps({**settings, key: value}))
    with pytest.raises(errors.UserError, match=f"tokenizer.json: {words}.*spiece.model next to it"):
        tokenizers.sentencepiece(json_folder)


def test_folders_without_a_tokenizer(tmp_path):
    with pytest.raises(errors.UserError, match="has neither spiece.model nor tokenizer.json"):
        vocabularies._load(str(tmp_path))
    with pytest.raises(errors.UserError, match="is not a file; expected T5's SentencePiece model"):
        vocabularies._load(str(tmp_path / "nothing"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_ids_are_those_of_transformers(spiece_folder, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tokenizer = transformers.T5Tokenizer.from_pretrained(str(spiece_folder), extra_ids=100)
    tokenizer.save_pretrained(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "spiece.model").exists()
    texts = [text for text in TEXTS if "<" not in text]  # transformers reads </s> as the mark
    for folder in (spiece_folder, tmp_path / "saved"):
        vocabulary = vocabularies._load(str(folder))
        for text in texts:
            assert tokenizer(text, add_special_tokens=False).input_ids == vocabulary.encode(text)
        sentinel = tokenizer.convert_tokens_to_ids("<extra_id_0>")
        assert sentinel == vocabulary.vocab_size - 1

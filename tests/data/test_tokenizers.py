"""Tokenizers of folders give the ids and texts of transformers' fast ones, as they were stored."""

import itertools
import json
import shutil
import unicodedata

from make_tokenizers_golden import FEW, FILE, digest, digest_of_folder
import pytest
import script_lines
import tokenizer_folders

from moe_peft import errors
from moe_peft.data import tokenizers, vocabularies

STORED = json.loads(FILE.read_text())
LINES = script_lines.lines()


@pytest.fixture(scope="module", params=tokenizer_folders.KINDS)
def folder(request, tmp_path_factory):
    """A folder of each kind."""
    return tokenizer_folders.make(tmp_path_factory.mktemp("made") / request.param, request.param)


@pytest.fixture
def made(tmp_path):
    """Makes a folder of one kind."""
    return lambda kind: tokenizer_folders.make(tmp_path / kind, kind)


def change(path, **settings):
    """Sets keys of a JSON file."""
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**found, **settings}))


def test_the_lines_are_those_that_were_compared():
    assert len(LINES) == 10_000
    assert len(script_lines.SCRIPTS) == 20
    assert digest(LINES) == "60f4a93a319c3e244480140f"


def test_ids_and_texts_are_those_of_transformers(folder):
    expected = STORED[folder.name]
    if digest_of_folder(folder) != expected["folder"]:
        pytest.skip("these versions of sentencepiece and tokenizers train other pieces")
    vocabulary = vocabularies.get(str(folder))
    end = [vocabulary.eos_id]
    assert [vocabulary.encode(text) + end for text in FEW] == expected["few"]
    ids = [row + end for row in vocabulary.encode_all(LINES)]
    assert digest(ids) == expected["ids"]
    assert digest([vocabulary.decode(row) for row in ids]) == expected["texts"]
    assert vocabulary.vocab_size == expected["size"]


def test_one_text_is_read_as_many(folder):
    vocabulary = vocabularies.get(str(folder))
    some = LINES[:200]
    assert [vocabulary.encode(text) for text in some] == vocabulary.encode_all(some)
    assert vocabulary.encode_all([]) == []


@pytest.mark.parametrize(
    ("kind", "ids", "extra_ids"),
    [
        ("spiece", (0, 1, 2, None), 100),
        ("spiece_with_sentinels", (0, 1, 2, None), 100),
        ("spiece_bpe", (0, 1, 2, None), 0),
        ("json_unigram", (0, 1, 2, None), 100),
        ("merges", (0, 2, 3, 1), 100),
        ("json_bytes", (0, 2, 3, 1), 0),
        ("byt5", (0, 1, 2, None), 125),
    ],
)
def test_special_ids(made, kind, ids, extra_ids):
    found = vocabularies.get(str(made(kind)))
    assert (found.pad_id, found.eos_id, found.unk_id, found.bos_id) == ids
    assert found.extra_ids == extra_ids
    assert max(max(row, default=0) for row in found.encode_all(LINES[:100])) < found.vocab_size


def test_decoding_ends_at_the_end_mark_and_leaves_special_tokens_out(folder):
    vocabulary = vocabularies.get(str(folder))
    ids = vocabulary.encode("the answer")
    around = [vocabulary.pad_id, *ids, vocabulary.eos_id, *ids, vocabulary.vocab_size + 300]
    assert vocabulary.decode(around) == "the answer"
    assert vocabulary.decode([*ids, vocabulary.vocab_size + 300]) == "the answer"
    assert vocabulary.decode([]) == ""


def test_byt5_adds_three_to_a_byte(made):
    vocabulary = vocabularies.get(str(made("byt5")))
    assert vocabulary.vocab_size == 384
    assert vocabulary.encode("hé<extra_id_0>") == [107, 198, 172, 259]
    assert vocabulary.encode("h </s>") == [107]  # the row's own end mark
    assert vocabulary.encode("h </s></s>") == [107, 1]
    assert vocabulary.decode([107, 198, 172, 0, 259, 198]) == "hé"


def test_tokenizer_json_comes_before_other_files(made):
    folder = made("json_unigram")
    both = vocabularies.get(str(folder)).encode_all(LINES[:100])
    (folder / "spiece.model").unlink()
    assert tokenizers.of_folder(folder).encode_all(LINES[:100]) == both
    other = made("spiece")
    shutil.copy(other / "spiece.model", folder)
    (folder / "tokenizer.json").unlink()
    assert tokenizers.of_folder(folder).encode_all(LINES[:100]) != both


def test_older_files_name_tokens(made):
    folder = made("merges")
    plain = tokenizers.of_folder(folder)
    change(folder / "special_tokens_map.json", eos_token="<s>", mask_token="the")
    found = tokenizers.of_folder(folder)
    assert (plain.eos_id, found.eos_id) == (2, 1)
    change(folder / "added_tokens.json", **{"<new>": plain.vocab_size})
    found = tokenizers.of_folder(folder)
    assert found.vocab_size == plain.vocab_size + 1
    assert plain.vocab_size in found.encode("a<new>b")


def test_what_no_file_names_makes_no_vocabulary_longer(made):
    folder = made("json_unigram")
    path = folder / "tokenizer.json"
    settings = json.loads(path.read_text())
    settings["model"]["vocab"] = settings["model"]["vocab"][:1500]
    settings["added_tokens"] = settings["added_tokens"][:3]
    path.write_text(json.dumps(settings))
    (folder / "tokenizer_config.json").unlink()
    assert tokenizers.of_folder(folder).vocab_size == 1500


def test_a_folder_without_settings(made):
    folder = made("spiece")
    with_settings = tokenizers.of_folder(folder)
    for name in ("tokenizer_config.json", "config.json"):
        (folder / name).unlink()
    assert tokenizers.of_folder(folder).content() == with_settings.content()


def test_fingerprints_tell_added_tokens_apart(made):
    folder = made("json_bytes")
    before = vocabularies.fingerprint(str(folder))
    assert vocabularies.fingerprint(f"hf:{folder}") == before
    change(folder / "tokenizer_config.json", eos_token="<s>")
    vocabularies._load.cache_clear(), vocabularies._digest.cache_clear()
    assert vocabularies.fingerprint(str(folder)) != before


def test_lengths_of_a_file_do_not_matter(made):
    """Settings of a file that cut or fill rows are not the vocabulary's."""
    folder = made("json_unigram")
    path = folder / "tokenizer.json"
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    fill = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
    change(path, truncation=cut, padding={**fill, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"})
    found = tokenizers.of_folder(folder)
    assert len(found.encode("a")) < 4
    assert len(found.encode("the answer is quickly running to and from")) > 4


def test_folders_that_no_tokenizer_is_made_of(made, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.UserError, match="has none of tokenizer.json, spiece.model, or voc"):
        vocabularies.get(str(tmp_path / "empty"))
    folder = made("json_bytes")
    (folder / "tokenizer.json").write_text('{"model": {"type": "Unheard"}}')
    with pytest.raises(errors.UserError, match="tokenizer.json is not a tokenizer that tok"):
        vocabularies.get(str(folder))
    folder = made("json_unigram")
    change(folder / "tokenizer_config.json", eos_token=None, pad_token="<pad>")
    change(folder / "tokenizer_config.json", tokenizer_class="TokenizersBackend")
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("</s>", "<end>"))
    with pytest.raises(errors.UserError, match="end mark '</s>' is not a token; say which"):
        vocabularies.get(str(folder))
    folder = made("spiece")
    (folder / "spiece.model").write_bytes(b"not a model")
    with pytest.raises(errors.UserError, match="spiece.model is not a SentencePiece model"):
        vocabularies.get(str(folder))
    (folder / "spiece.model").write_bytes(tokenizer_folders._sentencepiece("char", 1_500))
    with pytest.raises(errors.UserError, match="is of CHAR; expected UNIGRAM or BPE"):
        vocabularies.get(str(folder))
    folder = made("merges")
    change(folder / "special_tokens_map.json", cls_token="<nowhere>")
    with pytest.raises(errors.UserError, match="vocab.json lacks one of </s>, <nowhere>"):
        vocabularies.get(str(folder))


def is_joined(text):
    """Whether a mark follows what the normalisation changes, or another mark."""
    for before, mark in itertools.pairwise(text.replace("\uff9e", "\u3099")):
        is_changed = before.isspace() or unicodedata.normalize("NFKC", before) != before
        is_changed |= unicodedata.category(before)[0] == "M" or before in "\u2581\u200b\u200d\ufeff"
        if is_changed and (unicodedata.category(mark)[0] == "M" or mark in "\u200c\u200d"):
            return True
    return "\x85" in text


@pytest.mark.parametrize("kind", ["spiece", "spiece_with_sentinels"])
def test_where_a_folder_differs_from_its_model_read_by_seqio(kind, made):
    """Tokens in texts, U+0085, and marks that are read with what they follow; nothing else."""
    folder = made(kind)
    ours = vocabularies.get(str(folder))
    of_seqio = vocabularies.get(str(folder / "spiece.model"))
    tokens = ("</s>", "<pad>", "<unk>", "<extra_id_")
    differ = {text for text in LINES if ours.encode(text) != of_seqio.encode(text)}
    plain = [text for text in LINES if not any(token in text for token in tokens)]
    plain = [text for text in plain if not is_joined(text)]
    assert len(plain) > 3_000
    assert len(differ) > 1_000
    assert ours.vocab_size == of_seqio.vocab_size == 1_600
    assert [text for text in plain if text in differ] == []


def test_seqio_gets_the_same_ids(made):
    import tensorflow as tf

    from moe_peft.data import seqio_vocabularies

    folder = made("json_unigram")
    ours = vocabularies.get(str(folder))
    wrapped = seqio_vocabularies.Wrapped(lambda: ours)
    ids = {"vocab_size", "extra_ids", "eos_id", "pad_id", "unk_id", "bos_id"}
    assert {name: getattr(wrapped, name) for name in ids} == {n: getattr(ours, n) for n in ids}
    some = [text for text in LINES[:300] if "\x00" not in text]
    dataset = tf.data.Dataset.from_tensor_slices(some).map(wrapped.encode_tf)
    found = [row.tolist() for row in dataset.as_numpy_iterator()]
    assert found == ours.encode_all(some) == [wrapped.encode(text) for text in some]
    rows = tf.ragged.constant(found, dtype=tf.int32).to_tensor()
    texts = [text.decode() for text in wrapped.decode_tf(rows).numpy()]
    assert texts == [ours.decode(row) for row in found] == [wrapped.decode(row) for row in found]
    assert wrapped.decode_tf(rows[0]).numpy().decode() == texts[0]
    again, other = tokenizers.of_folder(folder), vocabularies.get("bytes")
    assert wrapped == seqio_vocabularies.Wrapped(lambda: again)
    assert wrapped not in (
        seqio_vocabularies.Wrapped(lambda: other),
        seqio_vocabularies.Configured(),
        None,
    )

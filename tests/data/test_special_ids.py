"""Special ids of vocabularies, and how the data of a run meets a network's."""

import json
import types

import letters_t5
import numpy as np
import pytest
import seqio

from moe_peft import errors
from moe_peft.data import lookup, pipeline, vocabularies
from moe_peft.models import special_ids

MADLAD = special_ids.SpecialIds(1, 2, 0)


@pytest.fixture
def folder(tmp_path):
    """A tokenizer as that of MADLAD-400."""
    (tmp_path / "spiece.model").write_bytes(letters_t5.tokenizer(MADLAD))

    def write(**told):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
        vocabularies._load.cache_clear()
        vocabularies._digest.cache_clear()
        return str(tmp_path)

    return write


@pytest.mark.parametrize(
    ("told", "pad_id", "eos_id"),
    [
        ({}, None, 2),  # as the model has it
        ({"pad_token": "<s>"}, 1, 2),
        ({"pad_token": {"content": "<s>"}, "eos_token": "</s>"}, 1, 2),
        ({"pad_token": "[PAD]", "added_tokens_decoder": {"40": {"content": "[PAD]"}}}, 40, 2),
        ({"pad_token": "nowhere", "eos_token": "c"}, 40, 6),  # added, as transformers does
    ],
)
def test_a_folder_tells_padding_and_end(folder, told, pad_id, eos_id):
    found = vocabularies.get(folder(extra_ids=0, **told))
    assert (found.pad_id, found.eos_id, found.unk_id) == (pad_id, eos_id, 0)
    assert found.vocab_size == max(3 + len(letters_t5.LETTERS), (pad_id or 0) + 1)
    assert found.encode("a%b") == [3, 4, 0, 5]
    pad = pad_id or 0
    assert lookup.ids_of_vocabulary(found) == special_ids.SpecialIds(pad, eos_id, pad)


def test_as_many_sentinels_as_the_folder_says(folder):
    sizes = {}
    for told in ({}, {"extra_ids": 100}, {"extra_ids": 300}, {"extra_ids": 0}):
        name = folder(**told)
        found = vocabularies.get(name)
        sizes[json.dumps(told)] = (found.vocab_size, vocabularies.fingerprint(name))
    assert [size for size, _ in sizes.values()] == [140, 140, 340, 40]
    fingerprints = [each for _, each in sizes.values()]
    assert fingerprints[0] == fingerprints[1]
    assert len(set(fingerprints)) == 3


def vocabulary(**values):
    found = {"vocab_size": 10, "unk_id": 2, "pad_id": 0, "eos_id": 1}
    return types.SimpleNamespace(**{**found, **values})


@pytest.mark.parametrize(
    ("found", "ids", "words"),
    [
        (vocabulary(), special_ids.T5, None),
        (vocabulary(pad_id=-1, eos_id=None), special_ids.T5, None),  # says nothing
        (vocabulary(pad_id=None, eos_id=2, unk_id=0), MADLAD, None),
        (vocabulary(eos_id=2, unk_id=0, spells_all=True), special_ids.SpecialIds(0, 2, 0), None),
        (vocabulary(eos_id=2), special_ids.T5, "id 2 for the end, and the model 1"),
        (vocabulary(eos_id=None), MADLAD, "id 0 for padding, and the model 1"),
        (vocabulary(pad_id=None, eos_id=None), MADLAD, "id 1 for the end, and the model 2"),
        (vocabulary(unk_id=0), special_ids.T5, "unknown pieces would not be seen"),
    ],
)
def test_a_vocabulary_must_agree_with_the_network(found, ids, words):
    if words is None:
        lookup.check_special_ids(found, ids, "rows")
        return
    with pytest.raises(errors.UserError, match=words) as caught:
        lookup.check_special_ids(found, ids, "rows")
    assert "\n" not in str(caught.value)


def test_seqios_streams_are_refused_where_it_pads_otherwise():
    rows = seqio.FunctionDataSource(lambda split, shuffle_files, seed=None: None, splits=["train"])
    feature = seqio.Feature(seqio.ByteVocabulary())
    name = "special_ids_streamed"
    if name not in seqio.TaskRegistry.names():
        features = {"inputs": feature, "targets": feature}
        seqio.TaskRegistry.add(name, source=rows, preprocessors=[], output_features=features)
    with pytest.raises(errors.UserError, match=f"'{name}' is read by SeqIO, which pads and starts"):
        pipeline.train_batches(name, 2, {"inputs": 4, "targets": 4}, 0, ids=MADLAD)


def test_a_tokenizer_json_without_padding(tmp_path):
    vocab = [["<unk>", 0.0], ["<s>", 0.0], ["</s>", 0.0], ["▁", -1.0], ["a", -1.0]]
    model = {"type": "Unigram", "unk_id": 0, "vocab": vocab}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"extra_ids": 0, "pad_token": "<s>"})
    )
    found = vocabularies.get(str(tmp_path))
    assert (found.pad_id, found.eos_id, found.unk_id) == (1, 2, 0)
    np.testing.assert_array_equal(found.encode("aZ"), [4, 0])

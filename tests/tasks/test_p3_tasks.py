import itertools

import gin
import make_samples
import numpy as np
import pytest
import seqio

from moe_peft import errors
from moe_peft.data import fewshot, pipeline, samples, vocabularies
from moe_peft.data.p3 import ids, records
from moe_peft.tasks import p3

LENGTHS = {"inputs": 64, "targets": 32}


@pytest.fixture(scope="module", params=["tfrecord", "parquet"])
def folder(request, tmp_path_factory):
    place = tmp_path_factory.mktemp(request.param)
    make_samples.write_p3(place / "p3", request.param)
    return place


@pytest.fixture(autouse=True)
def _settings(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_PEFT_CACHE", str(tmp_path))
    gin.clear_config()
    gin.bind_parameter("places.configured.folder", str(folder))
    gin.bind_parameter("vocabularies.configured.vocabulary", "bytes")
    ids.opened.cache_clear()
    yield
    gin.clear_config()


def batches(count, name="p3_t0", **options):
    found = pipeline.train_batches(name, 8, LENGTHS, 0, **options)
    return list(itertools.islice(found, count))


def test_ids_by_template_and_by_data_set():
    seen = {(int(t), int(w)) for b in batches(30) for t, w in zip(b["task_ids"], b["template_ids"])}
    assert seen == {(2 * d + w, w) for d in range(samples.TRAIN_TASKS) for w in range(2)}
    gin.bind_parameter("p3.configured.task_ids", "dataset")
    seen = {(int(t), int(w)) for b in batches(30) for t, w in zip(b["task_ids"], b["template_ids"])}
    assert seen == {(d, w) for d in range(samples.TRAIN_TASKS) for w in range(2)}


def test_rows_and_rates_of_both_rules():
    tasks = pipeline.tasks_of("p3_t0")
    mixture = seqio.MixtureRegistry.get("p3_t0")
    sizes = [task.num_input_examples("train") for task in tasks]
    assert [mixture.get_rate(task) for task in tasks] == sizes
    first = tasks[0].source.rows("train")
    assert tasks[0].splits == ("train", "validation")
    gin.bind_parameter("p3.configured.cap_rule", "t_few")
    gin.bind_parameter("p3.configured.validation_examples", 3)
    capped = [task.num_input_examples("train") for task in tasks]
    assert capped == [size - 3 for size in sizes]
    assert [mixture.get_rate(task) for task in tasks] == capped
    apart, kept = tasks[0].source.rows("validation"), tasks[0].source.rows("train")
    assert len(apart) == 3
    assert all((first.inputs[i + 3] == kept.inputs[i]).all() for i in range(len(kept)))
    assert all((first.inputs[i] == apart.inputs[i]).all() for i in range(3))


def test_wordings_of_an_item_are_side_by_side():
    tasks = pipeline.tasks_of("p3_heldout_published")
    assert len(tasks) == samples.TEST_TASKS
    for task in tasks:
        for split in ("train", "validation"):
            found = task.source.rows(split)
            assert len(found) >= 4
            assert found.scalars["template_ids"].tolist() == [0, 1] * (len(found) // 2)
            for i in range(0, len(found), 2):
                assert (found.targets[i] == found.targets[i + 1]).all()
                assert found.answer_choices[i] == found.answer_choices[i + 1]
                assert len(found.answer_choices[i]) == samples.CHOICES
                assert vocabularies.get().decode(found.targets[i]) in found.answer_choices[i]
                assert len(found.inputs[i]) != len(found.inputs[i + 1])


def test_a_template_of_some_items_only(folder):
    found = p3._stored
    try:
        p3._stored = lambda task, split: _cut(found(task, split), 3 if "second" in task else 4)
        task = pipeline.tasks_of("p3_heldout")[0]
        assert task.source.rows("validation").scalars["template_ids"].tolist() == [0] * 4 + [1] * 3
        assert task.source.rows("train").scalars["template_ids"].tolist() == [0] * 4
        gin.bind_parameter("p3.configured.common_templates_only", True)
        assert task.source.rows("validation").scalars["template_ids"].tolist() == [0] * 4
    finally:
        p3._stored = found


def _cut(stored, count):
    return type(stored)(
        stored.inputs.slice(0, count),
        stored.targets.slice(0, count),
        [stored.answer_choices[i] for i in range(count)],
    )


def test_split_that_t_few_reports():
    assert p3._source_split("anli_r1", "t_few") == "test"
    assert p3._source_split("storycloze", "t_few") == "test"
    assert p3._source_split("storycloze", "train") == "validation"
    assert p3._source_split("rte", "t_few") == "validation"
    assert p3._source_split("anli_r1", "validation") == "validation"
    task = pipeline.tasks_of("p3_heldout")[0]
    assert task.splits == ("train", "validation", "t_few")
    assert len(task.source.rows("t_few")) == len(task.source.rows("validation"))


def test_evaluation_has_choices():
    (batch, *_) = pipeline.eval_examples("p3_heldout", LENGTHS, "validation", 8)
    assert {example.template_id for example in batch.examples} == {0, 1}
    for example in batch.examples:
        assert example.targets in example.answer_choices
    trained = 2 * samples.TRAIN_TASKS
    assert set(batch.features["task_ids"]) <= set(range(trained, trained + samples.TEST_TASKS + 1))


def test_published_ids_of_another_vocabulary():
    import pathlib

    model = pathlib.Path(seqio.__file__).parent / "test_data/sentencepiece/sentencepiece.model"
    gin.bind_parameter("vocabularies.configured.vocabulary", str(model))
    with pytest.raises(errors.UserError, match=r"not those of VOCABULARY.*retokenize = True"):
        batches(1)
    gin.bind_parameter("p3.configured.retokenize", True)
    (batch,) = batches(1)
    assert np.max(batch["encoder_input_tokens"]) < 126


def test_second_reading_needs_no_records(monkeypatch):
    first = batches(3)
    ids.opened.cache_clear()
    monkeypatch.setattr(records, "read", None)
    for one, other in zip(first, batches(3)):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_official_tasks_are_registered():
    names = list(seqio.TaskRegistry.names())
    official = p3.names.official()
    assert all(f"p3_{task}" in names for d in official.training for task in d.tasks)
    assert all(f"p3_{found.name}" in names for found in official.held_out)
    with pytest.raises(errors.UserError, match="'glue_qqp_answer' is not in any mixture of"):
        seqio.TaskRegistry.get("p3_glue_qqp_answer").source.rows("train")


def test_few_shot_draws_items_and_keeps_their_wordings():
    task = fewshot.Task("p3_cldr_month", LENGTHS, "t_few", with_choices=True)
    sizes = fewshot.Sizes(shots={"p3_.*": 3}, wordings={"p3_cldr_.*": 2, ".*": 5})
    shots, validation, wordings = task.draw(sizes, 42)
    assert (len(shots), len(validation), wordings) == (6, 0, 2)
    for i in range(0, 6, 2):
        first, second = shots.examples[i : i + 2]
        assert (first.template_id, second.template_id) == (0, 1)
        assert first.targets == second.targets
        assert first.answer_choices == second.answer_choices
        assert len(shots.features[fewshot.CHOICES][i]) == samples.CHOICES


def test_raw_rows_give_the_batches_of_the_records():
    published = batches(4)
    evaluated = list(pipeline.eval_examples("p3_heldout_published", LENGTHS, "validation", 8))
    gin.bind_parameter("p3.configured.source", "raw")
    for one, other in zip(published, batches(4)):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
    again = list(pipeline.eval_examples("p3_heldout_published", LENGTHS, "validation", 8))
    assert [batch.examples for batch in again] == [batch.examples for batch in evaluated]
    gin.bind_parameter("p3.configured.source", "published")
    with pytest.raises(errors.UserError, match="'story_cloze_2016_plain_story_score_eval' has no"):
        list(pipeline.eval_examples("p3_storycloze", LENGTHS, "validation", 8))


def test_t_few_rule_reads_no_more_than_its_cap(monkeypatch):
    gin.bind_parameter("p3.configured.cap_rule", "t_few")
    gin.bind_parameter("p3.configured.validation_examples", 2)
    monkeypatch.setattr(p3.names, "MAX_EXAMPLES", 20)
    for source in ("published", "raw"):
        gin.bind_parameter("p3.configured.source", source)
        task = pipeline.tasks_of("p3_t0")[0]
        assert len(task.source.rows("train")) == 20 // 2 - 2
        stored = p3._stored(task.name.removeprefix("p3_"), "train", 10)
        assert len(stored) == 10


def test_a_set_that_is_smaller_than_it_should_be_is_told(folder, caplog):
    task = pipeline.tasks_of("p3_t0")[0].name.removeprefix("p3_")
    prompt = p3._table().prompts[task]
    size = len(p3._stored(task, "validation"))
    assert not caplog.records
    ids.opened.cache_clear()
    prompt.of.published.rows["validation"] = size + 1
    p3._stored(task, "validation")
    assert f"{task} has {size} rows there, {size + 1} in P3." in caplog.text
    prompt.of.published.rows.clear()


def test_stories_are_scored_by_their_endings():
    assert pipeline.tasks_of("p3_storycloze")[0].splits == ("test", "validation", "train", "t_few")
    found = list(pipeline.eval_examples("p3_storycloze", LENGTHS, "t_few", 8))
    examples = [example for batch in found for example in batch.examples]
    assert len(examples) == 16
    assert all(len(example.answer_choices) == 2 for example in examples)
    assert {example.answer_choices.index(example.targets) for example in examples} == {0, 1}
    assert [example.template_id for example in examples] == [0, 1] * 8
    shots = fewshot.Task("p3_storycloze", LENGTHS, "t_few", with_choices=True)
    drawn, _, _ = shots.draw(fewshot.Sizes(shots=3, wordings=2), 42)
    assert {example.inputs[:2] for example in drawn.examples} <= {"An", "Bo"}  # of validation

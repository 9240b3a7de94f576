"""SuperNI and CrossFit as tasks, on the samples."""

import collections
import itertools
import json
import pathlib
import shutil
import time

import gin
import numpy as np
import pytest
import seqio

from moe_peft import errors
from moe_peft.data import (
    feature_converter,
    fewshot,
    lookup,
    pipeline,
    registration,
    samples,
    vocabularies,
)
from moe_peft.data import rows as rows_lib
from moe_peft.data.crossfit import files
from moe_peft.data.superni import files as superni_files
from moe_peft.evaluation import metrics
from moe_peft.tasks import crossfit, superni

LENGTHS = {"inputs": 300, "targets": 64}


@pytest.fixture(autouse=True)
def _settings(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MOE_PEFT_CACHE", str(_folder(tmp_path_factory).parent / "cache"))
    gin.clear_config()
    gin.bind_parameter("places.configured.folder", str(_folder(tmp_path_factory)))
    gin.bind_parameter("vocabularies.configured.vocabulary", "bytes")
    for name, count in (("train", 16), ("validation", 6), ("test", 8)):
        gin.bind_parameter(f"superni.configured.{name}_examples", count)
    yield
    gin.clear_config()


_written = []


def _folder(tmp_path_factory):
    if not _written:
        _written.append(tmp_path_factory.mktemp("data"))
        samples.write(_written[0])
    return _written[0]


def texts(batch, name):
    vocabulary = pipeline.vocabulary(name)
    return [
        (vocabulary.decode(x.tolist()), vocabulary.decode(y.tolist()))
        for x, y in zip(batch["encoder_input_tokens"], batch["decoder_target_tokens"])
    ]


def test_registering_reads_nothing_and_is_fast(monkeypatch):
    monkeypatch.delenv("MOE_PEFT_DATA", raising=False)
    gin.clear_config()
    start = time.process_time()
    for module in (superni, crossfit):
        for registry in (seqio.MixtureRegistry, seqio.TaskRegistry):
            for name in [n for n in registry.names() if n.startswith(module.PREFIX + "_")]:
                registry.remove(name)
        module.register()
    assert time.process_time() - start < 2
    names = list(seqio.TaskRegistry.names())
    assert sum(name.startswith("superni_") for name in names) == 875
    assert sum(name.startswith("crossfit_") for name in names) == 160
    assert len(pipeline.tasks_of("superni_mhr")) == 20
    assert len(pipeline.tasks_of("superni_poly_s")) == 16


@pytest.mark.parametrize("name", ["superni_train", "crossfit_train"])
def test_missing_settings_are_one_line(name, monkeypatch, tmp_path):
    monkeypatch.delenv("MOE_PEFT_DATA", raising=False)
    benchmark = name.split("_")[0]
    gin.bind_parameter("places.configured.folder", None)
    with pytest.raises(errors.UserError, match="DATA_DIR is not set.*MOE_PEFT_DATA.*samples"):
        pipeline.train_batches(name, 4, LENGTHS, 0)
    gin.bind_parameter("places.configured.folder", str(tmp_path))
    with pytest.raises(errors.UserError, match=f"no folder {tmp_path}/{benchmark}; expected"):
        pipeline.train_batches(name, 4, LENGTHS, 0)
    monkeypatch.setenv("MOE_PEFT_DATA", str(_written[0]))
    gin.bind_parameter("places.configured.folder", None)
    next(pipeline.train_batches(name, 4, LENGTHS, 0))
    gin.bind_parameter("vocabularies.configured.vocabulary", None)
    with pytest.raises(errors.UserError, match="VOCABULARY is not set"):
        pipeline.train_batches(name, 4, LENGTHS, 0)
    gin.bind_parameter("vocabularies.configured.vocabulary", str(tmp_path / "spiece.model"))
    with pytest.raises(errors.UserError, match="spiece.model' is not a file"):
        pipeline.train_batches(name, 4, LENGTHS, 0)


@pytest.mark.parametrize(
    ("module", "name", "first"), [(superni, "superni_train", 0), (crossfit, "crossfit_train", 0)]
)
def test_training_batches_tell_tasks_apart(module, name, first):
    seen = {}
    for batch in itertools.islice(pipeline.train_batches(name, 8, LENGTHS, 0), 20):
        assert batch["task_ids"].dtype == np.int32
        for task_id, text in zip(batch["task_ids"], texts(batch, name)):
            seen.setdefault(int(task_id), set()).add(text)
    ids = module.task_ids()
    assert sorted(seen) == list(range(first, samples.TRAIN_TASKS))
    for task, task_id in ids.items():
        if task_id in seen:
            source = seqio.TaskRegistry.get(
                module.registration.task_name(module.PREFIX, task)
            ).source.rows("train")
            vocabulary = vocabularies.get()
            rows = {
                (vocabulary.decode(source.inputs[i]), vocabulary.decode(source.targets[i]))
                for i in range(len(source))
            }
            assert seen[task_id] <= rows


def test_superni_prompt_and_settings_reach_the_rows():
    (batch,) = itertools.islice(pipeline.train_batches("superni_train", 2, LENGTHS, 0), 1)
    for inputs, _ in texts(batch, "superni_train"):
        assert inputs.startswith("Task definition: ")
        assert inputs.endswith("\nOutput:")
    gin.bind_parameter("superni.configured.prompt", "definition_pos2")
    (batch,) = itertools.islice(pipeline.train_batches("superni_train", 2, LENGTHS, 0), 1)
    assert "Positive Example 1 -" in texts(batch, "superni_train")[0][0]


def test_superni_cut_prompt_keeps_its_end():
    gin.bind_parameter("superni.configured.max_input_tokens", 80)
    lengths = {"inputs": 80, "targets": 64}
    (batch,) = itertools.islice(pipeline.train_batches("superni_train", 4, lengths, 0), 1)
    assert (batch["encoder_input_tokens"][:, -1] == 1).all()
    assert all(inputs.endswith("\nOutput:") for inputs, _ in texts(batch, "superni_train"))


def test_superni_second_reading_needs_no_task_file(monkeypatch):
    superni._all_rows.cache_clear()
    tasks = pipeline.tasks_of("superni_test")
    first = [task.source.rows(split) for task in tasks for split in task.splits]
    assert any(len(found.references[0]) for found in first)
    superni._all_rows.cache_clear()
    monkeypatch.setattr(superni.files, "read", None)
    again = [task.source.rows(split) for task in tasks for split in task.splits]
    assert len(again) == 2 * samples.TEST_TASKS
    for one, other in zip(first, again):
        for i in range(len(one)):
            assert one.inputs[i].tolist() == other.inputs[i].tolist()
            assert one.targets[i].tolist() == other.targets[i].tolist()
            assert one.references[i] == other.references[i]
    # Other settings are other rows, and a file that changed is read again.
    gin.bind_parameter("superni.configured.test_examples", 7)
    with pytest.raises(TypeError):
        tasks[0].source.rows("test")
    gin.bind_parameter("superni.configured.test_examples", 8)
    superni._all_rows.cache_clear()
    (path,) = (_written[0] / "superni" / "tasks").glob(f"{tasks[0].name[len('superni_') :]}.json")
    path.write_text(path.read_text() + "\n")
    with pytest.raises(TypeError):
        tasks[0].source.rows("test")


def test_superni_test_tasks_keep_their_first_instances_for_the_report():
    tasks = pipeline.tasks_of("superni_test")
    assert len(tasks) == samples.TEST_TASKS
    for task in tasks:
        test, train = task.source.rows("test"), task.source.rows("train")
        seen = {tuple(test.inputs[i]) for i in range(len(test))}
        assert len(seen) == 8
        assert not seen & {tuple(train.inputs[i]) for i in range(len(train))}
        assert set(test.scalars["task_ids"]) <= set(range(6, 9))


def test_crossfit_pools_and_samples():
    tasks = pipeline.tasks_of("crossfit_test")
    assert len(tasks) == samples.TEST_TASKS
    for task in tasks:
        source = task.source
        sampled = [source.num_input_examples(f"train_{seed}") for seed in crossfit.files.SEEDS]
        assert source.num_input_examples("train") == sum(sampled)
        text = vocabularies.get().decode(source.rows("train_13").inputs[0])
        assert text.startswith(" [cldr-")
        gin.bind_parameter("crossfit.configured.with_task_name", False)
        assert "[cldr-" not in vocabularies.get().decode(source.rows("train_13").inputs[0])
        gin.bind_parameter("crossfit.configured.with_task_name", True)
    with pytest.raises(errors.UserError, match="no split 'train_14'.*Did you mean 'train_42'"):
        source.rows("train_14")


def test_a_sentencepiece_vocabulary():
    import pathlib

    model = pathlib.Path(seqio.__file__).parent / "test_data/sentencepiece/sentencepiece.model"
    gin.bind_parameter("vocabularies.configured.vocabulary", str(model))
    (batch,) = itertools.islice(pipeline.train_batches("superni_train", 4, LENGTHS, 0), 1)
    assert pipeline.vocabulary("superni_train").vocab_size == vocabularies.get().vocab_size == 126
    assert "month in" in texts(batch, "superni_train")[0][0]
    wrong = _written[0] / "no.model"
    wrong.write_text("no model")
    gin.bind_parameter("vocabularies.configured.vocabulary", str(wrong))
    with pytest.raises(errors.UserError, match="is not a SentencePiece model"):
        pipeline.train_batches("superni_train", 4, LENGTHS, 0)


def test_evaluation_reads_the_same_rows():
    for name in ("superni_test", "crossfit_test"):
        (batch, *_) = pipeline.eval_examples(name, LENGTHS, "test", 4)
        assert batch.examples[0].task.startswith(name.split("_")[0])
        assert batch.features["task_ids"][0] >= samples.TRAIN_TASKS


def test_every_accepted_answer_is_kept_as_its_file_has_it(tmp_path):
    folder = pathlib.Path(gin.query_parameter("places.configured.folder"))
    shutil.copytree(folder, tmp_path / "data")
    gin.bind_parameter("places.configured.folder", str(tmp_path / "data"))
    path = next((tmp_path / "data" / "superni" / "tasks").glob("task9007_*.json"))
    content = json.loads(path.read_text())
    content["Instances"][0]["output"] = ["one {x}", " two\n", "three"]
    path.write_text(json.dumps(content))
    (task,) = pipeline.tasks_of(f"superni_{path.stem}")
    found = task.source.rows("test").references
    assert found[0] == ("one {x}", " two\n", "three")
    assert found[1] == tuple(content["Instances"][1]["output"])
    gin.bind_parameter("superni.configured.references", "one")
    (one,) = task.source.rows("test").references[0]
    assert one in content["Instances"][0]["output"]

    (task, *_) = pipeline.tasks_of("crossfit_test")
    name = task.name.removeprefix("crossfit_").replace("cldr_", "cldr-", 1)
    for path in (tmp_path / "data" / "crossfit" / name).glob("*_test.tsv"):
        path.write_text("q\tyes\tja\t\nr\tno\n")
    rows = task.source.rows("test")
    assert rows.references == [("yes", "ja", ""), ("no",)]
    (batch,) = pipeline.eval_examples(task.name, LENGTHS, "test", 4)
    assert batch.examples[0].accepted == ("yes", "ja", "")


def test_tasks_know_how_their_benchmark_reports_them():
    reporting = lambda name: lookup.reporting(seqio.TaskRegistry.get(name))
    table = files.table()
    want = {"glue-cola": "matthews", "quoref": "qa_f1", "ag_news": "macro_f1"}
    assert {name: files.METRICS[table[name].metric] for name in want} == want
    assert reporting("crossfit_glue_cola").metric == "matthews"
    assert reporting("crossfit_app_reviews") == rows_lib.Reporting("pearson", "app_reviews")
    rte = reporting("superni_task1344_glue_entailment_classification")
    assert rte == rows_lib.Reporting("exact_match_normalized", "Textual Entailment")
    titles = reporting("superni_task1356_xlsum_title_generation")
    assert titles == rows_lib.Reporting("rouge_l", "Title Generation")
    by_metric = collections.Counter(
        lookup.reporting(seqio.TaskRegistry.get(registration.task_name("superni", name))).metric
        for name, listed in superni_files.table().items()
        if "test" in listed.sets
    )
    assert by_metric == {"exact_match_normalized": 73, "rouge_l": 46}
    own = [lookup.reporting(task).metric for task in pipeline.tasks_of("crossfit_test")]
    assert own == ["macro_f1", "rouge_l_crossfit", "qa_f1"]
    assert set(files.METRICS.values()) < set(metrics.METRICS)


def test_a_metric_that_crossfit_does_not_have(tmp_path):
    (tmp_path / "crossfit").mkdir()
    content = {"train": [], "dev": [], "test": ["x"], "metrics": {"x": "Rouge-1"}}
    (tmp_path / "crossfit" / "random.json").write_text(json.dumps(content))
    gin.bind_parameter("places.configured.folder", str(tmp_path))
    with pytest.raises(errors.UserError, match="metric of 'x' is 'Rouge-1'.*mean 'Rouge-L'"):
        pipeline.tasks_of("crossfit_test")


def test_a_few_shot_run_takes_the_rows_of_its_sample():
    name = pipeline.tasks_of("crossfit_test")[0].name
    source = seqio.TaskRegistry.get(name).source
    task = fewshot.Task(name, LENGTHS, "test", False, "train_{seed}", "validation_{seed}")
    for seed in (13, 100):
        shots, validation, wordings = task.draw(fewshot.Sizes(None), seed)
        assert wordings == 1
        texts = lambda encoded: sorted(example.inputs for example in encoded.examples)
        rows = lambda split: sorted(
            vocabularies.get().decode(source.rows(split).inputs[i])
            for i in range(source.num_input_examples(split))
        )
        assert texts(shots) == rows(f"train_{seed}")
        assert texts(validation) == rows(f"validation_{seed}")
    with pytest.raises(errors.UserError, match="no split 'train_14'"):
        task.draw(fewshot.Sizes(None), 14)


@pytest.mark.parametrize("name", ["superni_train", "crossfit_test"])
def test_seqio_itself_reads_a_mixture(name):
    converter = feature_converter.RoutingEncDecFeatureConverter()
    dataset = seqio.get_dataset(name, LENGTHS, converter, "train", shuffle=False, verbose=False)
    (example,) = dataset.take(1).as_numpy_iterator()
    assert example["encoder_input_tokens"].shape == (300,)
    assert example["task_ids"] in range(samples.TRAIN_TASKS + 4)

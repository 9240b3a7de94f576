"""Files with a mistake in them: one line with file and row, or rows skipped and counted."""

import json
import logging
import pickle

import gin
import make_samples
import numpy as np
import p3_writing
import pytest

from moe_peft import errors
from moe_peft.data import bad_rows, pipeline, samples
from moe_peft.data.crossfit import files as crossfit_files
from moe_peft.data.p3 import held_out, ids, names, records
from moe_peft.data.superni import files as superni_files
from moe_peft.tasks import crossfit, p3, superni  # noqa: F401 (registers)

LENGTHS = {"inputs": 96, "targets": 32}


@pytest.fixture(autouse=True)
def _settings(monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_PEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bad_rows, "_skipped", type(bad_rows._skipped)())
    gin.clear_config()
    gin.bind_parameter("places.configured.folder", str(tmp_path))
    gin.bind_parameter("vocabularies.configured.vocabulary", "bytes")
    for cached in (ids.opened, superni._all_rows, superni._task_ids, crossfit._read):
        cached.cache_clear()
    yield
    gin.clear_config()


def skip():
    gin.bind_parameter("bad_rows.configured.action", "skip")


def stops(read, message):
    """Reading stops with one line."""
    with pytest.raises(errors.UserError, match=message) as caught:
        read()
    assert "\n" not in str(caught.value)


def counts():
    """(file's name, reason, rows) of all that was skipped."""
    return [(path.split("/")[-1], why, n) for (path, why), n in bad_rows.skipped().items()]


def test_superni_instance_without_a_field(tmp_path, caplog):
    samples.write(tmp_path)
    (path, *_) = sorted((tmp_path / "superni" / "tasks").glob("*.json"))
    content = json.loads(path.read_text())
    whole = len(content["Instances"])
    del content["Instances"][1]["input"], content["Instances"][4]["input"]
    content["Instances"][7]["output"] = []
    path.write_text(json.dumps(content))
    read = lambda: superni_files.read(tmp_path / "superni", path.stem)
    stops(read, rf"{path.name}, Instances\[1\]: 'input' is missing")
    skip()
    with caplog.at_level(logging.WARNING):
        assert len(read().instances) == whole - 3
    assert counts() == [
        (path.name, "'input' is missing; expected text", 2),
        (path.name, "'output' needs at least one text and nothing else", 1),
    ]
    assert len(caplog.messages) == 2  # one of each kind, at once
    assert "Instances[1]" in caplog.messages[0]
    # What every prompt of a task is made of cannot be skipped.
    del content["Definition"]
    path.write_text(json.dumps(content))
    stops(read, "the whole file: 'Definition' is missing")
    path.write_text(path.read_text()[:300])
    stops(read, r"is not JSON \(cut off\?\)")


def test_crossfit_broken_row(tmp_path):
    samples.write(tmp_path)
    name = crossfit_files.partition(tmp_path / "crossfit")["train"][0]
    path = crossfit_files.path_of(tmp_path / "crossfit", name, 13, "train")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], "broken in", "two", *lines[2:]]) + "\n")
    task = f"crossfit_{crossfit.registration.task_name('x', name)[2:]}"
    pipeline.tasks_of("crossfit_train")
    read = lambda: pipeline.get(task).source.rows("train_13")
    stops(read, rf"{path.name}, row 3: 1 column, expected an input, a tab.*: 'broken in'\.")
    skip()
    assert len(read()) == len(lines)
    ((file, reason, count),) = counts()
    assert (file, reason[:8], count) == (path.name, "1 column", 2)
    gin.bind_parameter("bad_rows.configured.action", "stop")
    stops(read, "row 3")  # not what was read in the other mode


def p3_folder(tmp_path, form="tfrecord"):
    make_samples.write_p3(tmp_path / "p3", form)
    return tmp_path / "p3"


def test_p3_truncated_tfrecord_and_its_cache(tmp_path, caplog):
    folder = p3_folder(tmp_path)
    task = names.of_folder(folder).training[0].tasks[0]
    (path,) = records.split_files(folder / task, "train")
    total = len(list(records.read(folder / task, "train")))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    pipeline.tasks_of("p3_t0")
    read = lambda: pipeline.get(f"p3_{task}").source.rows("train")
    stops(read, rf"{path.name}, row \d+: the file is damaged from here on: \w+")
    assert not list((tmp_path / "cache" / "p3").glob("*"))
    skip()
    kept = len(read())
    assert 0 < kept < total
    first = counts()
    assert sum(count for *_, count in first) == total - kept
    # From the cache, in another process, it is said again.
    ids.opened.cache_clear()
    bad_rows._skipped.clear()
    with caplog.at_level(logging.WARNING):
        assert len(read()) == kept
    assert counts() == first
    assert f"Skipped {total - kept} bad rows" in caplog.text
    assert "when the cache was made" in caplog.text
    gin.bind_parameter("bad_rows.configured.action", "stop")
    stops(read, "damaged from here on")


@pytest.mark.parametrize("form", p3_writing.FORMS)
def test_p3_rows_without_targets(tmp_path, monkeypatch, form):
    folder = p3_folder(tmp_path, form)
    task = names.of_folder(folder).training[0].tasks[0]
    rows = list(records.read(folder / task, "train"))
    row_of = p3_writing._row
    bare = lambda record: row_of(record) | ({"targets": []} if record is rows[2] else {})
    monkeypatch.setattr(p3_writing, "_row", bare)
    p3_writing.write_task(tmp_path / "p3" / "damaged", {"train": rows}, form)
    read = lambda: list(records.read(folder / "damaged", "train"))
    stops(read, "row 2: 'targets' is missing")
    skip()
    assert len(read()) == len(rows) - 1
    assert [count for *_, count in counts()] == [1]


def choice(example, number, is_correct):
    ids = np.arange(3, dtype=np.int32)
    return records.Record("q", f"a{number}", ids, ids, (), (example, number), is_correct)


def test_p3_example_that_lacks_a_choice(tmp_path):
    rows = [choice(e, c, c == e % 3) for e in range(4) for c in range(3)]
    del rows[7]  # the second choice of the third example, a wrong one
    stops(lambda: held_out.examples(rows, "x"), r"x, example 2: only the choices \[0, 2\]")
    skip()
    assert [found.idx[0] for found in held_out.examples(rows, "x")] == [0, 1, 3]
    # A row that cannot be read takes its whole example along, be it the last choice.
    bad_rows._skipped.clear()
    last = [choice(e, c, c == 0) for e in range(4) for c in range(3)]

    def found():
        for number, record in enumerate(last):
            if number == 11:
                bad_rows.skip_row(bad_rows.BadRow("file", "row 11", "damaged"))
            else:
                yield record

    assert [example.idx[0] for example in held_out.examples(found(), "x")] == [0, 1, 2]
    assert counts() == [("file", "damaged", 1), ("x", "only the choices [0, 1] are there", 1)]


def test_p3_wordings_are_not_matched_after_skipping(tmp_path):
    folder = p3_folder(tmp_path)
    found = names.of_folder(folder).held_out[0]
    for split in ("train", "validation"):
        (path,) = records.split_files(folder / found.tasks[1], split)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 4 // 5])
    pipeline.tasks_of("p3_heldout")
    source = pipeline.get(f"p3_{found.name}").source
    skip()
    ids = source.rows("validation").scalars["template_ids"].tolist()
    assert ids == sorted(ids)  # wording after wording, so that none is taken for another item's
    stops(lambda: source.rows("train"), "rows of its 'train' files were skipped.*data check")


def test_p3_task_without_choices(tmp_path):
    folder = p3_folder(tmp_path)
    table = names.of_folder(folder)
    ranked = folder / table.held_out[0].tasks[0]
    rows = list(records.read(folder / table.training[0].tasks[0], "train"))
    for path in ranked.iterdir():
        path.unlink()
    ranked.rmdir()
    p3_writing.write_task(ranked, {"validation": rows}, "tfrecord")
    pipeline.tasks_of("p3_heldout")
    read = lambda: pipeline.get(f"p3_{table.held_out[0].name}").source.rows("validation")
    stops(read, r"'validation', row 0: 'idx' is missing; has this task answer choices\?")
    skip()
    stops(read, "'validation' has no row left. Skipped .* bad rows: .*'idx' is missing")


def test_duplicated_task_names(tmp_path):
    samples.write(tmp_path)
    lists = tmp_path / "superni" / "splits" / "default"
    train, test = (lists / f"{split}_tasks.txt" for split in ("train", "test"))
    name = train.read_text().split()[2]
    test.write_text(test.read_text() + f"{name}\n")
    stops(lambda: superni.task_ids(), f"train_tasks.txt and test_tasks.txt both name '{name}'")
    train.write_text(train.read_text() + f"{name}.json\n")
    stops(lambda: superni.task_ids(), f"train_tasks.txt names '{name}' twice, in rows 3 and 7")

    path = tmp_path / "crossfit" / crossfit_files.PARTITION_FILE
    content = json.loads(path.read_text())
    content["test"].append(content["train"][0])
    path.write_text(json.dumps(content))
    crossfit_files.partition.cache_clear()
    stops(lambda: crossfit_files.partition(path.parent), "twice .train and test.")

    path = tmp_path / "p3" / names.TABLE_FILE
    content = json.loads(path.read_text())
    content["training"].append(content["training"][0])
    path.write_text(json.dumps(content))
    names.of_folder.cache_clear()
    stops(lambda: names.of_folder(path.parent), "tasks.json cannot be used .*is there twice")


@pytest.mark.parametrize("benchmark", ["superni", "crossfit", "p3"])
def test_wrong_split_name(tmp_path, benchmark):
    samples.write(tmp_path)
    mixture = {"p3": "p3_t0"}.get(benchmark, f"{benchmark}_train")
    for action in ("stop", "skip"):
        gin.bind_parameter("bad_rows.configured.action", action)
        read = lambda: pipeline.train_batches(mixture, 4, LENGTHS, 0, split="trian")
        stops(read, "has no split 'trian'; it has .*Did you mean 'train'")


def test_a_bad_row_goes_from_process_to_process():
    row = bad_rows.BadRow("x.tsv", "row 3", "1 column", "'a'")
    copy = pickle.loads(pickle.dumps(row))
    assert isinstance(copy, errors.UserError)
    assert str(copy) == "x.tsv, row 3: 1 column: 'a'."

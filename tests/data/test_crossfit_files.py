import json

import pytest

from moe_peft import errors
from moe_peft.data import samples
from moe_peft.data.crossfit import files


@pytest.fixture
def folder(tmp_path):
    samples.write(tmp_path)
    return tmp_path / "crossfit"


def test_table_is_the_random_partition(tmp_path):
    groups = files.partition(tmp_path)
    assert {group: len(names) for group, names in groups.items()} == {
        "train": 120,
        "dev": 20,
        "test": 20,
    }
    assert len(set().union(*groups.values())) == 160
    metrics = [files.table()[name].metric for name in groups["test"]]
    assert {name: metrics.count(name) for name in set(metrics)} == {
        "Classification-F1": 8,
        "ACC": 6,
        "EM": 3,
        "QA-F1": 1,
        "Rouge-L": 1,
        "Matthew-Correlation": 1,
    }
    shots = [listed.shots for listed in files.table().values()]
    assert (shots.count(16), shots.count(32)) == (82, 78)
    assert all(len(listed.test_md5) == 32 for listed in files.table().values())


def test_rows_as_written(folder):
    name = files.partition(folder)["test"][0]
    train = files.read(files.path_of(folder, name, 13, "train"))
    dev = files.read(files.path_of(folder, name, 13, "dev"))
    assert len(train) == len(dev) > 5
    assert not set(train) & set(dev)
    tests = [files.read(files.path_of(folder, name, seed, "test")) for seed in files.SEEDS]
    assert all(test == tests[0] for test in tests)


def test_columns(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text("a question \tyes\tYES\r\nanother\t\n", encoding="utf-8")
    assert files.read(path) == [
        files.Row("a question ", ("yes", "YES")),
        files.Row("another", ("",)),
    ]


def test_a_broken_row_is_named(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text("a\tb\nbroken\nc\td\n")
    with pytest.raises(errors.UserError, match=r"x.tsv, row 2: 1 column, .*: 'broken'"):
        files.read(path)
    path.write_text("")
    with pytest.raises(errors.UserError, match=r"x.tsv, row 1: 1 column, .*: ''"):
        files.read(path)
    path.write_bytes(b"a\t\xff\n")
    with pytest.raises(errors.UserError, match="cannot be read"):
        files.read(path)


def test_files_are_found_by_task_sample_and_part(folder):
    name = files.partition(folder)["train"][0]
    near = folder / name / f"{name}_more_32_13_train.tsv"
    near.write_text("a\tb\n")
    assert files.path_of(folder, name, 13, "train").name == f"{name}_32_13_train.tsv"
    with pytest.raises(errors.UserError, match="There is no file .*_99_train.tsv"):
        files.path_of(folder, name, 99, "train")
    with pytest.raises(errors.UserError, match=f"Did you mean '{name}'"):
        files.path_of(folder, name + "x", 13, "train")
    (folder / name / f"{name}_16_13_train.tsv").write_text("a\tb\n")
    with pytest.raises(errors.UserError, match="expected one file for sample 13"):
        files.path_of(folder, name, 13, "train")


def test_a_partition_of_ones_own(folder):
    path = folder / files.PARTITION_FILE
    content = json.loads(path.read_text())
    groups = {group: tuple(sorted(content[group])) for group in files.GROUPS}
    assert files.partition(folder) == groups
    del content["dev"]
    path.write_text(json.dumps(content))
    files.partition.cache_clear()
    with pytest.raises(errors.UserError, match="expected JSON with the lists train, dev, test"):
        files.partition(folder)

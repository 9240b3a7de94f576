"""What a check of benchmark files finds, one planted mistake at a time."""

import json
import re
import tracemalloc

import numpy as np
import pytest

from moe_peft.cli import main
from moe_peft.data import samples
from moe_peft.data.checking import check, fingerprints, parts
from moe_peft.data.crossfit import files as crossfit_files
from moe_peft.data.p3 import names, records


@pytest.fixture
def root(tmp_path):
    samples.write(tmp_path)
    return tmp_path


def findings(root, name, with_hashes=False):
    return check.check(name, root / name, with_hashes).findings


def the_one(root, name, rule):
    """The only finding but those for information; of this rule."""
    (found,) = [f for f in findings(root, name) if f.rule in check.FAILING]
    assert found.rule == rule
    return found


@pytest.mark.parametrize("name", ["superni", "crossfit", "p3"])
def test_samples_are_whole(root, name):
    found = check.check(name, root / name)
    assert not [f for f in found.findings if f.rule in check.FAILING]
    training = [group for group in found.groups.values() if group.group == parts.TRAINING]
    assert all(len(group.tasks) == {"p3": 12}.get(name, 6) for group in training)
    for group in found.groups.values():
        assert group.missing == 0
        assert len(group.digest) == 16
        assert group.size == sum((root / name / file).stat().st_size for file in group.files)


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def superni_files(root):
    paths = sorted((root / "superni" / "tasks").glob("*.json"))
    return paths[: samples.TRAIN_TASKS], paths[samples.TRAIN_TASKS :]


def test_missing_files(root):
    (first, *_), _ = superni_files(root)
    first.unlink()
    found = the_one(root, "superni", "missing")
    assert (first.stem in found.where, f"no file {first}" in found.message) == (True, True)
    (root / "superni" / "splits" / "default" / "test_tasks.txt").unlink()
    assert "test_tasks.txt" in the_one(root, "superni", "missing").message
    name = crossfit_files.partition(root / "crossfit")["test"][0]
    crossfit_files.path_of(root / "crossfit", name, 42, "dev").unlink()
    assert "_42_dev.tsv" in the_one(root, "crossfit", "missing").message
    task = names.of_folder(root / "p3").training[0].tasks[1]
    (root / "p3" / task / "COMPLETED").unlink()
    assert "no file COMPLETED" in the_one(root, "p3", "missing").message


def test_damaged_rows_and_files(root):
    (first, second, *_), _ = superni_files(root)
    edit_json(first, lambda c: [c["Instances"][i].pop("output") for i in (0, 3)])
    found = the_one(root, "superni", "damaged")
    assert (found.where, found.count) == (str(first), 2)
    assert "'output' is missing" in found.message
    second.write_text(second.read_text()[:99])
    assert [f.rule for f in findings(root, "superni")] == ["damaged", "damaged"]
    task = names.of_folder(root / "p3").training[0].tasks[1]
    (path,) = records.split_files(root / "p3" / task, "train")
    path.write_bytes(path.read_bytes()[:-20])
    found = the_one(root, "p3", "damaged")
    assert "damaged from here on" in found.message
    assert found.where == str(path)


def test_leaks_into_reported_examples(root):
    (first, *_), (test, *_) = superni_files(root)
    shown = json.loads(test.read_text())["Instances"][:3]
    # Other letters, other spaces: the same question.
    shouted = [{**s, "input": f" {s['input'].upper()}  "} for s in shown]
    shouted[2]["output"] = ["another answer"]
    edit_json(first, lambda c: c["Instances"].extend(shouted))
    found = the_one(root, "superni", "leak")
    assert found.where == first.stem
    assert found.count == 3
    assert f"3 inputs are reported ones of {test.stem}, 2 of them with" in found.message
    assert fingerprints.normalise(shown[0]["input"]) in found.message


def test_leaks_from_a_tasks_own_shots(root):
    folder = root / "crossfit"
    one, other = crossfit_files.partition(folder)["test"][:2]
    shots = crossfit_files.path_of(folder, one, 13, "train")
    for name in (one, other):
        test = crossfit_files.path_of(folder, name, 13, "test").read_text().splitlines()[0]
        shots.write_text(shots.read_text() + test + "\n")
    found = the_one(root, "crossfit", "leak")  # the other task's is no matter
    assert (found.where, found.count) == (one, 1)
    assert "its own reported ones" in found.message


def test_information(root):
    name = crossfit_files.partition(root / "crossfit")["train"][0]
    path = crossfit_files.path_of(root / "crossfit", name, 13, "train")
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    (found,) = findings(root, "crossfit")
    assert (found.rule, found.count, found.where) == ("duplicate", 1, f"{name} (train_13)")
    for path in sorted((root / "superni" / "tasks").glob("*.json"))[:1]:
        official = "task363_sst2_polarity_classification"
        path.rename(path.with_name(f"{official}.json"))
        listed = root / "superni" / "splits" / "default" / "train_tasks.txt"
        listed.write_text(listed.read_text().replace(path.stem, official))
    (found,) = findings(root, "superni")
    assert (found.rule, found.where) == ("count", f"{official} (train)")
    assert "are published" in found.message


def test_a_file_that_is_not_the_published_one(root):
    folder, official = root / "crossfit", "superglue-rte"
    old = crossfit_files.partition(folder)["test"][0]
    for path in (folder / old).iterdir():
        path.rename(path.with_name(path.name.replace(old, official)))
    (folder / old).rename(folder / official)
    edit_json(
        folder / crossfit_files.PARTITION_FILE,
        lambda groups: groups["test"].append(groups["test"].remove(old) or official),
    )
    crossfit_files.partition.cache_clear()
    found = findings(root, "crossfit", with_hashes=True)
    assert [f.rule for f in found] == ["hash"] * len(crossfit_files.SEEDS)
    assert found[0].message.endswith(crossfit_files.table()[official].test_md5)
    assert not findings(root, "crossfit", with_hashes=False)


def test_fingerprints_agree_for_texts_that_do():
    reported = fingerprints.Reported()
    examples = [parts.Example(f"Question {i}?", (f"{i}",)) for i in range(100)]
    prints = np.array([fingerprints.of_example(e) for e in examples], np.uint64)
    assert len(np.unique(prints)) == 200
    reported.add("a", prints[:60, 0].tolist(), prints[:60, 1].tolist())
    reported.add("b", prints[50:, 0].tolist(), prints[50:, 1].tolist())
    asked = [parts.Example("question  55? ", ("x",)), parts.Example("QUESTION 99?", ("99",))]
    asked.append(parts.Example("question 100?", ("x",)))
    prints = np.array([fingerprints.of_example(e) for e in asked], np.uint64)
    found = list(reported.find(prints[:, 0], prints[:, 1]))
    assert found == [(0, "a", False), (0, "b", False), (1, "b", True)]


def test_memory_is_that_of_fingerprints(monkeypatch):
    def part(count):
        read = lambda: (parts.Example(f"{i} {'long' * 500}", ("x",)) for i in range(count))
        return parts.Part("big", parts.TRAINING, "train", False, lambda: (), read)

    def peak(count):
        monkeypatch.setitem(parts.BENCHMARKS, "cldr", lambda folder: [part(count)])
        tracemalloc.start()
        found = check.check("cldr", None)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert found.groups["training", "train"].examples == count
        return most

    monkeypatch.setattr(check, "_CHUNK", 256)
    small, large = peak(1_000), peak(5_000)
    assert large - small < 40 * 4_000  # of 8 MB of texts


def run(capsys, *arguments):
    code = main.main(["data", "check", *map(str, arguments)])
    return code, capsys.readouterr()


def test_command(root, capsys):
    code, printed = run(capsys, root)
    assert code == 0
    assert printed.out.count("nothing to fix") == 3
    assert "check p3: " in printed.err
    (first, *_), (test, *_) = superni_files(root)
    shown = json.loads(test.read_text())["Instances"][0]
    edit_json(first, lambda c: c["Instances"].append(shown))
    code, printed = run(capsys, root, "--benchmark", "superni", "--no_hashes")
    assert code == 1
    assert "leak: an input to train on is an input that scores are made of (fails)" in printed.out
    code, printed = run(capsys, root, "--benchmark", "superni", "--ignore", "leak", "--json")
    found = json.loads(printed.out)
    assert (code, found["failures"], found["rules"]["leak"]) == (0, 0, 1)
    (group, *_) = found["benchmarks"]["superni"]["groups"]
    assert len(group["files"]) == group["tasks"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere"], "no folder /nowhere/superni; expected a checkout of .*A data folder holds"),
        (["--benchmark", "crosfit"], "--benchmark is 'crosfit'.*Did you mean 'crossfit'"),
        (["--ignore", "leaks"], "--ignore is 'leaks'.*Did you mean 'leak'"),
    ],
)
def test_command_mistakes(tmp_path, capsys, arguments, message):
    folder = [] if arguments[0] == "/nowhere" else [tmp_path]
    code, printed = run(capsys, *folder, *arguments)
    assert code == main.USER_ERROR
    (line,) = printed.err.splitlines()
    assert re.search(message, line)


def test_a_benchmark_that_was_asked_for_must_be_there(root, capsys):
    for path in (root / "crossfit").rglob("*"):
        if path.is_file():
            path.unlink()
    (root / "crossfit").rename(root / "other")
    assert run(capsys, root, "--no_hashes")[0] == 0
    code, printed = run(capsys, root, "--benchmark", "crossfit")
    assert code == main.USER_ERROR
    assert "no folder" in printed.err

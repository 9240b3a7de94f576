"""Rows of a user's own files as tasks."""

import itertools
import json
import pathlib
import subprocess
import sys

import gin
import numpy as np
import pytest
import seqio

from moe_peft import errors
from moe_peft.data import (
    bad_rows,
    evaluation_data,
    files,
    identity,
    lookup,
    pipeline,
    plain_files,
    registration,
    vocabularies,
)

LENGTHS = {"inputs": 24, "targets": 16}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder for each test."""
    monkeypatch.setenv("MOE_PEFT_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    gin.clear_config()


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def pairs(count, start=0, **more):
    rows = range(start, start + count)
    return [{"inputs": f"question {n}", "targets": f"answer {n}", **more} for n in rows]


def examples(own, split="train"):
    """Rows of all tasks of a split, as text."""
    found = []
    for task in own.tasks:
        rows = task.rows(split) if split in task.splits else ()
        found += [evaluation_data.example(task, rows, i) for i in range(len(rows))]
    return found


def asked(own, split="train"):
    return [example.inputs for example in examples(own, split)]


def message(*data, split="train", **settings):
    """What reading says, in one line."""
    with pytest.raises(errors.UserError) as caught:
        examples(files.Files(*data, **settings), split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Where rows are


def test_one_file_keeps_a_part_apart(tmp_path):
    own = files.Files(write(tmp_path / "my rows.jsonl", pairs(200)), eval_fraction=0.2)
    train, held_out = asked(own), asked(own, "validation")
    assert sorted(train + held_out) == sorted(row["inputs"] for row in pairs(200))
    assert 20 < len(held_out) < 60
    assert len(own.stored("validation") or ()) == len(held_out)
    assert str(own) == own.tasks[0].name == "my_rows_held_out"
    assert own.title == "my rows.jsonl"
    assert list(own.tasks[0].splits) == ["train", "validation"]


def test_a_question_is_on_the_same_side_whatever_is_around_it(tmp_path):
    rows = pairs(100)
    side = lambda rows, name: set(
        asked(files.Files(write(tmp_path / name, rows), eval_fraction=0.3), "validation")
    )
    held_out = side(rows, "a.jsonl")
    assert held_out
    assert side(rows[::-1], "b.jsonl") == held_out
    more = [*pairs(50, start=100), *rows, *({**row, "targets": "other"} for row in rows)]
    old = {row["inputs"] for row in rows}
    assert side(more, "c.jsonl") & old == held_out


def test_all_rows_train_without_a_fraction(tmp_path):
    own = files.Files(write(tmp_path / "a.jsonl", pairs(9)), eval_fraction=0)
    assert len(asked(own)) == 9
    assert list(own.tasks[0].splits) == ["train"]
    assert len(own.stored("validation") or ()) == 0
    assert own.stored("validation") is None
    with pytest.raises(errors.UserError, match="eval_fraction is 0.95"):
        files.Files("a.jsonl", eval_fraction=0.95)


def test_several_files_and_files_of_their_own_to_evaluate_on(tmp_path):
    paths = [write(tmp_path / f"{n}.jsonl", pairs(3, start=3 * n)) for n in range(2)]
    own = files.Files(paths, eval_data=write(tmp_path / "dev.jsonl", pairs(2, start=6)))
    assert asked(own) == [row["inputs"] for row in pairs(6)]
    assert asked(own, "validation") == [row["inputs"] for row in pairs(2, start=6)]
    assert str(own) == "dev"
    assert asked(files.Files(pathlib.Path(paths[0]), eval_fraction=0)) == asked(own)[:3]
    assert asked(files.Files(map(pathlib.Path, paths), eval_fraction=0)) == asked(own)


@pytest.mark.parametrize("dev", ["dev", "validation", "valid_1", "eval"])
def test_a_folder_names_its_splits(tmp_path, dev):
    for number, name in enumerate(("train-00", "train-01", dev, "test")):
        write(tmp_path / "data" / f"{name}.jsonl", pairs(1, start=number))
    write(tmp_path / "data" / "README.md", ["no rows"])
    own = files.Files(str(tmp_path / "data"))
    numbers = {split: [int(text.split()[1]) for text in asked(own, split)] for split in own.files}
    assert numbers == {"train": [0, 1], "validation": [2], "test": [3]}
    # As files to evaluate on, or without files called train, all of them are the split.
    assert len(asked(files.Files(eval_data=str(tmp_path / "data")), "validation")) == 4
    for name in ("train-00", "train-01"):
        (tmp_path / "data" / f"{name}.jsonl").unlink()
    assert len(asked(files.Files(str(tmp_path / "data"), eval_fraction=0))) == 2


def test_splits_by_name(tmp_path):
    one, two = (write(tmp_path / f"{n}.jsonl", pairs(1, start=n)) for n in range(2))
    own = files.Files({"train": one, "test": [two, one]})
    assert [asked(own), len(asked(own, "test"))] == [["question 0"], 2]
    said = "A split of data is 'dev'; expected one of train, validation, test."
    assert message({"train": one, "dev": two}).startswith(said)
    assert "no file of the split 'train'" in message([])
    assert "no file of the split 'test'" in message({"test": []})
    assert "has no split 'train'; it has test" in said_by(files.Files({"test": two}))


def said_by(own, split="train"):
    with pytest.raises(errors.UserError) as caught:
        lookup.tasks_with(own, split)
    return str(caught.value)


# Cells


@pytest.mark.parametrize("suffix", plain_files.SUFFIXES)
def test_every_form_makes_the_same_rows(tmp_path, suffix):
    import pyarrow
    from pyarrow import csv, parquet

    rows = [{"inputs": f'q "{n}", ü\n', "targets": ["a", f"b{n}"]} for n in range(4)]
    path = tmp_path / f"a{suffix}"
    as_json = [{**row, "targets": json.dumps(row["targets"])} for row in rows]
    if suffix == ".jsonl":
        write(path, rows)
    elif suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        options = csv.WriteOptions(delimiter={".csv": ",", ".tsv": "\t"}[suffix])
        csv.write_csv(pyarrow.Table.from_pylist(as_json), path, options)
    found = examples(files.Files(str(path), eval_fraction=0))
    assert [(each.inputs, list(each.references)) for each in found] == [
        tuple(row.values()) for row in rows
    ]


def test_other_columns_and_a_template(tmp_path):
    rows = [{"q": "Why?", "meta.from": "{x}", "label": 3, "share": 0.5}]
    path = write(tmp_path / "a.jsonl", rows)
    template = "{{json}} {meta.from}: {q} {share} {q}"
    columns = {"targets_column": "label", "inputs_template": template, "eval_fraction": 0}
    (found,) = examples(files.Files(path, **columns))
    assert (found.inputs, found.targets) == ("{json} {x}: Why? 0.5 Why?", "3")
    columns |= {"inputs_template": None, "inputs_column": "q"}
    (found,) = examples(files.Files(path, **columns))
    assert found.inputs == "Why?"


@pytest.mark.parametrize(
    "template", ["{", "}", "{}", "{q:>5}", "{q!r}", "{q", "no column", "{{q}}"]
)
def test_braces_that_do_not_match(tmp_path, template):
    path = write(tmp_path / "a.jsonl", [{"q": "a", "targets": "b"}])
    said = message(path, inputs_template=template)
    assert said.startswith(f"The template {template!r} ")


def test_every_accepted_answer_is_kept_and_one_is_drawn(tmp_path):
    rows = [{"inputs": f"q{n}", "targets": ["a", "b", "c"]} for n in range(60)]
    path = write(tmp_path / "a.jsonl", [*rows, {"inputs": "one", "targets": ["only"]}])
    *found, one = examples(files.Files(path, eval_fraction=0))
    assert {each.references for each in found} == {("a", "b", "c")}
    assert {each.targets for each in found} == {"a", "b", "c"}
    assert (one.targets, one.references, one.accepted) == ("only", ("only",), ("only",))
    again = examples(files.Files(path, eval_fraction=0, seed=1))
    assert [e.targets for e in again[:-1]] != [e.targets for e in found]


def test_choices(tmp_path):
    rows = [
        {"inputs": "a", "targets": "yes", "choices": ["no", "yes"]},
        {"inputs": "b", "targets": "free"},
        {"inputs": "c", "targets": 2, "choices": [1, 2]},
    ]
    found = examples(files.Files(write(tmp_path / "a.jsonl", rows), eval_fraction=0))
    assert [each.answer_choices for each in found] == [("no", "yes"), (), ("1", "2")]
    table = tmp_path / "a.csv"
    table.write_text('inputs,targets,choices\na,b,"[""a"", ""b""]"\n')
    (found,) = examples(files.Files(str(table), eval_fraction=0))
    assert found.answer_choices == ("a", "b")
    table.write_text("inputs,targets,choices\na,b,[a; b]\n")
    assert "line 2: 'choices' is not a list of texts." in message(str(table), eval_fraction=0)


BAD = {
    "null": ({"inputs": None, "targets": "a"}, "'inputs' is missing."),
    "absent": ({"inputs": "a"}, "'targets' is missing."),
    "NaN": ('{"inputs": "a", "targets": NaN}', "'targets' is missing."),
    "bool": ({"inputs": True, "targets": "a"}, "'inputs' is not a text: bool."),
    "object": ({"inputs": {"a": 1}, "targets": "a"}, "'inputs' is not a text: dict."),
    "empty": ({"inputs": "a", "targets": ""}, "'targets' is empty."),
    "none": ({"inputs": "a", "targets": []}, "'targets' is an empty list."),
    "empties": ({"inputs": "a", "targets": ["b", ""]}, "'targets' is empty."),
    "nested": ({"inputs": "a", "targets": [["b"]]}, "'targets' is not a text: list."),
    "choices": (
        {"inputs": "a", "targets": "b", "choices": ["c", "d"]},
        "the answer is not among the choices: 'b', ['c', 'd'].",
    ),
    "text": ({"inputs": "a", "targets": "b", "choices": "b"}, "'choices' is not a list of texts."),
    "half": ({"inputs": "a\ud800", "targets": "b"}, "'inputs' has half a character: '\\ud800'."),
    "json": ("{", "not JSON: Expecting property name enclosed in double quotes."),
}


@pytest.mark.parametrize(("row", "said"), BAD.values(), ids=BAD)
def test_a_bad_row_stops_or_is_counted_once(tmp_path, row, said):
    path = write(tmp_path / "a.jsonl", [*pairs(30), row, *pairs(30, start=30)])
    for split in ("train", "validation"):  # neither leaves it out in silence
        assert message(path, split=split, eval_fraction=0.5) == f"{path}, line 31: {said}"
    gin.bind_parameter("bad_rows.configured.action", "skip")
    for count in (1, 0):  # made, then read from the cache
        with bad_rows.counting() as skipped:
            own = files.Files(path, eval_fraction=0.5)
            assert len(asked(own)) + len(asked(own, "validation")) == 60
            assert own.lengths()
            examples(files.Files(path, eval_fraction=0.5))
        assert sum(skipped.values()) == count


def test_what_was_skipped_is_told_by_the_next_process(tmp_path):
    path = write(tmp_path / "a.jsonl", [*pairs(3), "{"])
    program = (
        "import gin, sys; from moe_peft.data import bad_rows, files\n"
        "gin.bind_parameter('bad_rows.configured.action', 'skip')\n"
        "own = files.Files(sys.argv[1], eval_fraction=0.5)\n"
        "own.lengths(), files.Files(sys.argv[1], eval_fraction=0.5).lengths()\n"
        "print(list(bad_rows.skipped().values()))"
    )
    run = [sys.executable, "-c", program, path]
    for _ in range(2):
        assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == "[1]\n"


def test_columns_that_are_missing(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"input": "a", "label": "b", "domain": "c"}])
    said = message(path)
    assert "has no column 'targets'; it has 'input', 'label', 'domain'." in said
    assert said.endswith("Name the column with --targets_column.")
    said = message(path, targets_column="label")
    assert said.endswith("Did you mean 'input'? Name the column with --inputs_column.")
    said = message(path, targets_column="label", inputs_template="{inptu}")
    assert said.endswith("Did you mean 'input'? Name the column with --inputs_template.")
    said = message(path, targets_column="label", inputs_column="input", task_column="domian")
    assert said.endswith("Did you mean 'domain'? Name the column with --task_column.")
    assert path in said


def test_mistakes_name_the_file(tmp_path):
    write(tmp_path / "train.jsonl", pairs(2))
    assert "Did you mean 'train.jsonl'?" in message(str(tmp_path / "tran.jsonl"))
    (tmp_path / "empty").mkdir()
    assert "has no file that ends in .jsonl" in message(str(tmp_path / "empty"))


# Tasks

SOME = [*pairs(6, task="b c"), *pairs(3, start=6, task="a"), *pairs(1, start=9, task=7)]


def test_rows_of_each_name_are_a_task(tmp_path):
    own = files.Files(write(tmp_path / "a.jsonl", SOME), eval_fraction=0)
    assert own.names == ("7", "a", "b c")
    assert [task.name for task in own.tasks] == ["7", "a", "b_c"]
    assert [task.reporting.group for task in own.tasks] == ["7", "a", "b c"]
    assert [own.get_rate(task) for task in own.tasks] == [1, 3, 6]
    assert asked(own) == [row["inputs"] for row in (*SOME[9:], *SOME[6:9], *SOME[:6])]
    for number, task in enumerate(own.tasks):
        assert set(task.rows("train").scalars["task_ids"].tolist()) == {number}
    batch = next(pipeline.train_batches(own, 64, LENGTHS, 0))
    counts = np.bincount(batch["task_ids"])
    assert counts.argsort().tolist() == [0, 1, 2]
    text = vocabularies.get("bytes").decode
    names = {row["inputs"]: str(row["task"]) for row in SOME}
    for ids, tokens in zip(batch["task_ids"], batch["encoder_input_tokens"], strict=True):
        assert own.names[ids] == names[text(tokens.tolist())]


def test_tasks_of_other_files_come_last(tmp_path):
    train = write(tmp_path / "a.jsonl", SOME)
    dev = write(tmp_path / "dev.jsonl", [*pairs(1, task="0"), *pairs(1, task="a")])
    assert files.Files(train, eval_data=dev).names == ("7", "a", "b c", "0")
    assert files.Files(eval_data=dev).names == ("0", "a")
    assert files.Files(eval_data=dev, task_names=["z", "a"]).names == ("z", "a", "0")
    pathlib.Path(train).unlink()  # the names of a run are known, its training files are gone
    own = files.Files(train, eval_data=dev, task_names=("7", "a", "b c"))
    assert [e.task for e in examples(own, "validation")] == ["a", "0"]


def test_rows_without_a_task(tmp_path):
    rows = [*SOME, {**pairs(1)[0], "task": None}, {**pairs(1)[0], "task": True}]
    path = write(tmp_path / "a.jsonl", rows)
    assert message(path, eval_fraction=0).endswith("line 11: 'task' is missing.")
    gin.bind_parameter("bad_rows.configured.action", "skip")
    own = files.Files(path, eval_fraction=0)
    assert own.names == ("7", "a", "b c")
    with bad_rows.counting() as skipped:
        assert len(examples(own)) == 10
    assert sorted(reason for _, reason in skipped) == ["'task' is missing", "'task' is not a text"]


def test_a_task_that_was_not_trained(tmp_path):
    own = files.Files(task_names=("reviews", "news"))
    ask = lambda name: own.question(tmp_path / "q", "line 1", {"inputs": "a", "task": name})
    assert ask("news").task == 1
    assert ask(None).task is None
    with pytest.raises(bad_rows.BadRow, match=r"not trained: 'new'\. Did you mean 'news'\?$"):
        ask("new")
    with pytest.raises(bad_rows.BadRow, match=r"line 1: the task was not trained: 'x'\.$"):
        ask("x")


def test_names_that_are_reported_alike_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [*pairs(1, task="a b"), *pairs(1, task="a_b")])
    assert "column 'task' are reported as 'a_b'" in message(path)


# The cache


def test_the_second_reading_makes_nothing(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [*SOME, *pairs(40, start=10, task="a")])
    first = examples(files.Files(path)) + examples(files.Files(path), "validation")

    def made(*_):
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr(vocabularies.Bytes, "encode_all", made)
        patch.setattr(files.Files, "_example", made)
        patch.setattr(files, "_opened", {})  # as in another process
        again = examples(files.Files(path)) + examples(files.Files(path), "validation")
    assert again == first
    write(tmp_path / "a.jsonl", [*SOME, *pairs(40, start=10, task="b")])
    changed = files.Files(path, eval_fraction=0)
    assert changed.names == ("7", "a", "b", "b c")
    assert len(examples(changed)) == 50


def test_other_settings_are_other_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"inputs": "a", "targets": "b", "other": "c"}])
    read = lambda **settings: asked(files.Files(path, eval_fraction=0, **settings))
    assert [read(), read(inputs_column="other"), read()] == [["a"], ["c"], ["a"]]


# Batches


def equal(one, two):
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("rows", [pairs(50), SOME * 5], ids=["one", "tasks"])
def test_batches_go_on_and_are_shared_out(tmp_path, rows, pack):
    own = files.Files(write(tmp_path / "a.jsonl", rows))
    batches = lambda **more: pipeline.train_batches(own, 8, LENGTHS, 3, pack=pack, **more)
    whole = list(itertools.islice(batches(), 12))
    for one, two in zip(whole[7:], batches(start_batch=7), strict=False):
        equal(one, two)
    shards = [batches(shard_index=i, shard_count=2) for i in range(2)]
    for batch, *parts in zip(whole, *shards, strict=False):
        equal(batch, {name: np.concatenate([part[name] for part in parts]) for name in batch})
    assert ("task_ids" in whole[0]) == (own.has_tasks and not pack)


def test_evaluation_has_every_row_once(tmp_path):
    own = files.Files(eval_data=write(tmp_path / "a.jsonl", SOME))
    batches = list(pipeline.eval_examples(own, LENGTHS, batch_size=4))
    found = [example for batch in batches for example in batch.examples]
    assert sorted(e.inputs for e in found) == sorted(row["inputs"] for row in SOME)
    ids = np.concatenate([batch.features["task_ids"] for batch in batches])[:10]
    assert [own.tasks[i].name for i in ids] == [example.task for example in found]


def test_lengths_are_those_of_the_longest_rows(tmp_path):
    rows = [{"inputs": "a" * 30, "targets": "b" * 7}, {"inputs": "c", "targets": "d" * 8}]
    own = files.Files(write(tmp_path / "a.jsonl", rows), eval_fraction=0)
    assert own.longest() == (31, 9)
    assert own.lengths() == {"inputs": 32, "targets": 16}
    rows[0] = {"inputs": "a" * 3000, "targets": "b" * 3000}
    own = files.Files(write(tmp_path / "b.jsonl", rows), eval_fraction=0)
    assert own.lengths() == files.LONGEST


def test_the_description_of_a_run_has_no_paths(tmp_path):
    def described(folder, rows=SOME, **settings):
        own = files.Files(write(tmp_path / folder / f"{folder}.jsonl", rows), **settings)
        return identity.describe(own, LENGTHS, 4, 0)

    first = described("one")
    assert described("two") == first
    assert str(tmp_path) not in json.dumps(first)
    changed = [{**SOME[0], "targets": "another"}, *SOME[1:]]
    assert described("three", changed) != first
    assert described("four", seed=1) != first


# SeqIO


@pytest.mark.parametrize("rows", [pairs(9), SOME], ids=["one", "tasks"])
def test_seqio_gives_the_same_ids(tmp_path, rows):
    own = files.Files(write(tmp_path / "my-rows.jsonl", rows), eval_fraction=0)
    name = registration.add_files(own)
    assert name == "my_rows"
    try:
        dataset = seqio.get_dataset(
            name,
            LENGTHS,
            seqio.EncDecFeatureConverter(pack=False),
            shuffle=False,
            num_epochs=1,
        )
        features = ("encoder_input_tokens", "decoder_target_tokens", "decoder_input_tokens")
        row = lambda batch, i=None: tuple(
            tuple(np.asarray(batch[f] if i is None else batch[f][i]).tolist()) for f in features
        )
        theirs = {row(batch) for batch in dataset.take(40).as_numpy_iterator()}
        batch = next(pipeline.train_batches(own, 64, LENGTHS, 0))
        assert theirs <= {row(batch, i) for i in range(64)}
        assert len(theirs) > 6
        for task, subtask in zip(own.tasks, lookup.tasks_of(name), strict=True):
            found = list(subtask.get_dataset(LENGTHS, "train", shuffle=False).as_numpy_iterator())
            own_rows = task.rows("train")
            assert [each["inputs"].tolist() for each in found] == [
                [*own_rows.inputs[i].tolist(), 1] for i in range(len(own_rows))
            ]
            ids = {int(each.get("task_ids", -1)) for each in found}
            assert ids == ({task.number} if own.has_tasks else {-1})
    finally:
        for registry in (seqio.MixtureRegistry, seqio.TaskRegistry):
            for each in [n for n in registry.names() if n.startswith("my_rows")]:
                registry.remove(each)


# Without TensorFlow

PROGRAM = """
import sys
from moe_peft.api import model
from moe_peft.data import files, identity, pipeline
from moe_peft.evaluation import evaluate, infer
from moe_peft.training import train
own = files.Files(sys.argv[1], eval_fraction=0.5)
lengths = own.lengths()
next(pipeline.train_batches(own, 4, lengths, 0))
list(pipeline.eval_examples(own, lengths))
identity.describe(own, lengths, 4, 0)
infer.read(__import__("pathlib").Path(sys.argv[1]), own)
print([name for name in ("tensorflow", "seqio") if name in sys.modules])
"""


def test_own_files_need_no_tensorflow(tmp_path):
    path = write(tmp_path / "a.jsonl", pairs(20, task="a"))
    run = [sys.executable, "-c", PROGRAM, path]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == "[]\n"


SPIECE = pathlib.Path(seqio.__file__).parent / "test_data/sentencepiece/sentencepiece.model"


def test_an_answer_counts_as_the_vocabulary_spells_it(tmp_path):
    """White space that it joins is no mistake; characters that it lacks are."""
    spelled, unknown = "a  nice\tl", "a 日 l"
    rows = [{"inputs": "one", "targets": spelled}, {"inputs": "two", "targets": unknown}]
    own = files.Files(str(write(tmp_path / "a.jsonl", rows)), str(SPIECE), eval_fraction=0)
    (batch,) = pipeline.eval_examples(own, {"inputs": 16, "targets": 16}, "train", 4)
    one, two = batch.examples
    vocabulary = vocabularies.get(str(SPIECE))
    again = vocabulary.decode(vocabulary.encode(spelled))
    assert again != spelled
    assert {spelled, again} <= set(one.accepted)
    assert two.accepted == (unknown,)
    assert own.num_unspelled() == 1

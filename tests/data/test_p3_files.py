import dataclasses
import json
import pathlib

import numpy as np
import p3_writing
import pytest

from moe_peft import errors
from moe_peft.data import row_store, rows, samples
from moe_peft.data.p3 import held_out, names, records


def record(text, idx=None, is_correct=False, choices=()):
    ids = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    return records.Record(f"in {text}", text, ids + 3, ids + 4, choices, idx, is_correct)


def plain(found):
    return [
        {
            **dataclasses.asdict(line),
            "input_ids": line.input_ids.tolist(),
            "target_ids": line.target_ids.tolist(),
        }
        for line in found
    ]


def test_counts_and_caps_of_t0():
    table = names.official()
    count = lambda mixture: sum(len(d.tasks) for d in table.mixture(mixture))
    assert [len(table.mixture(name)) for name in names.MIXTURES] == [38, 48, 54]
    assert [count(name) for name in names.MIXTURES] == [313, 392, 464]
    t0 = table.mixture("t0")
    total = lambda rule: sum(d.cap(rule) * len(d.templates) for d in t0)
    assert total("t0") == 17_277_798
    assert total("t_few") == 10_606_443
    capped = {(d.name, d.subset): d.cap("t0") for d in t0 if d.cap("t0") != d.train_size}
    assert sorted(capped.values()) == [55_555, 55_555, 71_428, 100_000, 125_000]
    assert len({task for d in table.training for task in d.tasks}) == 464


def test_names():
    assert names.task("super_glue", "copa", "…What could happen next, C1 or C2?") == (
        "super_glue_copa__What_could_happen_next_C1_or_C2_"
    )
    assert names.task("anli", None, "can we infer") == "anli_can_we_infer"
    assert names.task("cos_e", "v1.11", "question_description_option_text") == (
        "cos_e_v1.11_question_description_option_text"
    )
    assert names.task("super_glue", "wsc.fixed", "p is/are r") == "super_glue_wsc.fixed_p_is_are_r"


def test_held_out_sets():
    sets = {found.name: found for found in names.official().held_out}
    assert list(sets)[:4] == ["anli_r1", "anli_r2", "anli_r3", "cb"]
    counts = {name: len(found.tasks) for name, found in sets.items()}
    assert list(counts.values()) == [15, 15, 15, 15, 10, 10, 10, 12, 5, 4, 5]
    assert sum(counts.values()) == 116
    assert sum(n for name, n in counts.items() if name not in names.NOT_PUBLISHED) == 111
    assert sets["anli_r2"].tasks[0] == "anli_GPT_3_style_r2_score_eval"
    trained = {d.name for d in names.official().mixture("t0")}
    assert not trained & {"anli", "super_glue", "winogrande", "hellaswag", "story_cloze"}


@pytest.mark.parametrize("form", p3_writing.FORMS)
def test_what_is_written_is_read(tmp_path, form):
    found = [record("eins"), record(" zwölf\n", choices=("a", "ü b")), record("")]
    splits = {"train": found, "validation": found[:1], "test": []}
    p3_writing.write_task(tmp_path / "x_y", splits, form)
    folder = records.task_folder(tmp_path, "x_y")
    assert records.splits(folder) == ("train", "validation")
    assert records.split_files(folder, "test") == []
    back = list(records.read(folder, "train"))
    if form == "parquet":  # one schema for all rows
        assert all(line.answer_choices == () for line in back)
        back = [
            dataclasses.replace(line, answer_choices=f.answer_choices)
            for line, f in zip(back, found)
        ]
    assert plain(back) == plain(found)


@pytest.mark.parametrize("form", p3_writing.FORMS)
def test_ranked_rows(tmp_path, form):
    found = [record("a", (7, 0)), record("b", (7, 1), True), record("c", (2, 0), True)]
    p3_writing.write_task(tmp_path / "data" / "x", {"validation": found}, form)
    folder = records.task_folder(tmp_path, "x")
    assert plain(records.read(folder, "validation")) == plain(found)
    first, second = held_out.examples(records.read(folder, "validation"), "x")
    assert (first.targets, first.answer_choices) == ("c", ("c",))
    assert (second.targets, second.answer_choices, second.idx) == ("b", ("a", "b"), (7, 1))


def test_order_of_rows_does_not_matter():
    found = [record(f"{i} {j}", (i, j), i == j) for i in range(3) for j in range(3)]
    shuffled = [found[i] for i in np.random.default_rng(1).permutation(9)]
    assert plain(held_out.examples(shuffled, "x")) == plain(held_out.examples(found, "x"))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([record("a", (0, 0), True), record("b", (0, 2))], r"example 0: only the choices \[0, 2\]"),
        ([record("a", (0, 0)), record("b", (0, 1))], "example 0: no choice is right"),
        ([record("a", (0, 0), True), record("b", (0, 0))], r"row 1: idx \(0, 0\) is there twice"),
        ([record("a", (0, 0), True), record("b")], "row 1: 'idx' is missing"),
    ],
)
def test_damaged_groups(found, message):
    with pytest.raises(errors.UserError, match=f"x.*{message}"):
        held_out.examples(found, "x")


def test_damaged_folders(tmp_path):
    found = [record(str(i)) for i in range(20)]
    p3_writing.write_task(tmp_path / "x_y", {"train": found}, "tfrecord")
    folder = tmp_path / "x_y"
    with pytest.raises(errors.UserError, match="'x_z' has no folder in .*Did you mean 'x_y'"):
        records.task_folder(tmp_path, "x_z")
    (path,) = records.split_files(folder, "train")
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(
        errors.UserError,
        match=r"00001, row 19: .* damaged from here on: trunc",
    ):
        list(records.read(folder, "train"))
    path.write_bytes(whole[: len(whole) // 20 * 10])
    with pytest.raises(errors.UserError, match="damaged|10 rows, stats.train.json says 20"):
        list(records.read(folder, "train"))
    path.write_bytes(whole)
    (folder / "stats.train.json").write_text('{"examples": 21}')
    with pytest.raises(errors.UserError, match="20 rows, stats.train.json says 21; cut off"):
        list(records.read(folder, "train"))
    (folder / "stats.train.json").write_text("{")
    with pytest.raises(errors.UserError, match="stats.train.json cannot be used"):
        list(records.read(folder, "train"))
    (folder / "stats.train.json").unlink()
    path.rename(folder / "train.tfrecord-00000-of-00002")
    with pytest.raises(errors.UserError, match="1 of the 2 files of 'train'"):
        records.split_files(folder, "train")
    (folder / "COMPLETED").unlink()
    with pytest.raises(errors.UserError, match="no file COMPLETED"):
        records.task_folder(tmp_path, "x_y")


def test_damaged_parquet(tmp_path):
    p3_writing.write_task(tmp_path / "x", {"train": [record("a")]}, "parquet")
    (path,) = records.split_files(tmp_path / "x", "train")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(errors.UserError, match="cannot be read as Parquet"):
        list(records.read(tmp_path / "x", "train"))


def lines():
    for i in range(5):
        yield row_store.Line(np.arange(i), np.arange(2 * i), ("ja", "né")[: i % 3])


def test_row_store(tmp_path):
    made = []

    def make():
        made.append(1)
        return lines()

    for _ in range(2):
        found = row_store.stored(tmp_path, "x", ("key", 1), make)
        assert [found.inputs[i].tolist() for i in range(5)] == [list(range(i)) for i in range(5)]
        assert found.targets.lengths.tolist() == [0, 2, 4, 6, 8]
        assert list(found.answer_choices) == [line.answer_choices for line in lines()]
        assert not found.inputs.flat.flags.owndata
        assert not found.inputs.flat.flags.writeable
    assert len(made) == 1
    row_store.stored(tmp_path, "x", ("key", 2), make)
    assert len(made) == 2


def test_row_store_keeps_nothing_of_a_failure(tmp_path):
    def make():
        yield row_store.Line(np.arange(3), np.arange(3))
        raise errors.UserError("row 2 is bad")

    with pytest.raises(errors.UserError, match="row 2 is bad"):
        row_store.stored(tmp_path, "x", (), make)
    assert not list(tmp_path.iterdir())
    assert len(row_store.stored(tmp_path, "x", (), lambda: ()).inputs) == 0


def test_joined_and_woven():
    parts = [
        rows.Ragged.from_sequences([np.array([10 * t + i] * (i + 1)) for i in range(3)])
        for t in range(2)
    ]
    joined, woven = held_out.Joined(parts), held_out.Woven(parts)
    assert [joined[i][0] for i in range(6)] == [0, 1, 2, 10, 11, 12]
    assert [woven[i][0] for i in range(6)] == [0, 10, 1, 11, 2, 12]
    for found in (joined, woven):
        assert found.lengths.tolist() == [len(found[i]) for i in range(6)]
        again = rows.Ragged(found.flat, found.ends)
        assert all((again[i] == found[i]).all() for i in range(6))


def test_table_of_ones_own(tmp_path):
    samples.write(tmp_path)
    table = names.of_folder(tmp_path / "p3")
    assert len(table.training) == samples.TRAIN_TASKS
    assert len(table.held_out) == samples.TEST_TASKS + 1  # and StoryCloze
    assert names.of_folder(tmp_path) is names.official()
    content = json.loads((tmp_path / "p3" / names.TABLE_FILE).read_text())
    del content["training"][0]["templates"]
    (tmp_path / names.TABLE_FILE).write_text(json.dumps(content))
    names.of_folder.cache_clear()
    with pytest.raises(errors.UserError, match=r"tasks.json cannot be used \(KeyError"):
        names.of_folder(tmp_path)


@pytest.mark.skipif(not pathlib.Path("/proc/self/fd").is_dir(), reason="counts in /proc")
def test_row_store_keeps_no_file_open(tmp_path):
    # A mixture has hundreds of tasks, and many systems allow a thousand open files.
    open_files = lambda: len(list(pathlib.Path("/proc/self/fd").iterdir()))
    before = open_files()
    found = [row_store.stored(tmp_path, f"task{i}", (), lines) for i in range(50)]
    assert open_files() - before < 10
    assert all(each.inputs[4].tolist() == [0, 1, 2, 3] for each in found)

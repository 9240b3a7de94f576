"""Examples as the model sees them: the arrays of training, printed."""

import json
import re

import gin
import pytest

from moe_peft.cli import commands as settings
from moe_peft.cli import main
from moe_peft.data import bad_rows, pipeline, samples

SETTINGS = ["--gin.DATA_DIR=embedded:samples", "--gin.VOCABULARY=bytes"]


@pytest.fixture(autouse=True)
def _clean():
    yield
    gin.clear_config()


def show(capsys, *arguments):
    code = main.main(["data", "show", *arguments])
    return code, capsys.readouterr()


def test_a_task_in_its_own_order(capsys):
    arguments = ("cldr_month_de", "--split", "validation", "--start", "8", "--count", "2")
    code, printed = show(capsys, *arguments, "--json")
    first, second = json.loads(printed.out)
    assert code == 0
    assert (first["row"], second["row"], first["of"]) == (8, 9, 48)
    rows = pipeline.get("cldr_month_de").source.rows("validation")
    assert first["inputs"]["ids"] == [*rows.inputs[8].tolist(), 1]
    assert first["inputs"]["length"] == first["inputs"]["whole"] == len(rows.inputs[8]) + 1
    assert first["task_id"] == rows.scalars["task_ids"][8]
    assert first["targets"]["text"] in {
        text for text, _, is_target in first["choices"] if is_target
    }
    assert ["Mai", 4, False] in first["choices"]
    _, printed = show(capsys, *arguments)
    assert "cldr_month_de  row 8 of 48  task id" in printed.out
    assert f"{first['inputs']['length']} tokens: 81 " in printed.out.replace("\n", " ")
    assert " ... " in printed.out
    assert "(the target)" in printed.out
    assert " ... " not in show(capsys, *arguments, "--all_ids")[1].out


@pytest.mark.parametrize("benchmark", ["superni", "crossfit", "p3"])
def test_a_mixture_in_the_order_of_training(benchmark, capsys):
    mixture = {"p3": "p3_t0"}.get(benchmark, f"{benchmark}_train")
    settings = ["--gin_file", f"samples/{benchmark}.gin"]
    code, printed = show(capsys, mixture, *settings, "--count", "8", "--json")
    assert code == 0
    found = json.loads(printed.out)
    lengths = gin.query_parameter("FEATURE_LENGTHS/gin.macro.value")
    lengths = {name: 96 if not isinstance(n, int) else n for name, n in lengths.items()}
    if benchmark == "superni":
        lengths["inputs"] = 192
    batch = next(pipeline.train_batches(mixture, 8, lengths, 0))
    for i, example in enumerate(found):
        assert example["task_id"] == batch["task_ids"][i]
        for name, side in (("encoder_input", "inputs"), ("decoder_target", "targets")):
            ids = batch[f"{name}_tokens"][i]
            assert example[side]["ids"] == ids[: example[side]["length"]].tolist()
            assert not ids[example[side]["length"] :].any()


def test_what_is_cut_is_said(capsys):
    lengths = """--gin.FEATURE_LENGTHS={"inputs": 10, "targets": 4}"""
    _, printed = show(capsys, "cldr_day_pl", lengths, "--count", "1")
    assert re.search(r"10 tokens, cut from \d\d: (\d+ ){9}1 *$", printed.out, re.M)


def test_a_packed_row(capsys):
    lengths = """--gin.FEATURE_LENGTHS={"inputs": 120, "targets": 60}"""
    code, printed = show(capsys, "cldr_train", lengths, "--packed", "--json")
    found = json.loads(printed.out)
    assert code == 0
    assert found["capacity"] == [120, 60]
    assert len(found["segments"]) > 1
    assert all(side["ids"][-1] == 1 for sides in found["segments"] for side in sides)
    _, printed = show(capsys, "cldr_train", lengths, "--packed")
    used = sum(inputs["length"] for inputs, _ in found["segments"])
    assert f"{used} of 120 tokens" in printed.out


def test_tasks_that_only_the_files_name(capsys):
    code, printed = show(capsys, "p3_cldr_month", "--split", "validation", *SETTINGS)
    assert code == 0
    assert printed.out.count("choice  ") == 3 * samples.CHOICES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cldr_mont_de"], "No task or mixture is called 'cldr_mont_de'.*Did you mean 'cldr_month"),
        (["cldr_day_pl", "--split", "test"], "has no split 'test'; it has train, validation"),
        (["cldr_day_pl", "--start", "9999"], "examples in its split 'train'; --start is 9999"),
        (["cldr_month_de", "--count", "0"], "--count is 0; expected 1 or more"),
        (["cldr_train", "--packed"], "Packing needs the length of a row"),
        (["superni_train", "--gin.DATA_DIR=embedded:samples"], "VOCABULARY is not set"),
        (["cldr_month_de", "--gin.SPLIT=train"], "nothing in this run reads it: SPLIT"),
    ],
)
def test_mistakes(capsys, arguments, message):
    code, printed = show(capsys, *arguments)
    assert code == main.USER_ERROR
    (line,) = printed.err.splitlines()
    assert re.search(message, line)


def test_help_has_examples(capsys):
    assert list(settings.DATA_COMMANDS) == ["data prepare", "data show"]
    for name in settings.DATA_COMMANDS:
        with pytest.raises(SystemExit):
            main.main([*name.split(), "--help"])
        assert f"moe-peft {name} " in capsys.readouterr().out


def test_skipped_rows_are_told_at_the_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bad_rows, "_skipped", type(bad_rows._skipped)())
    samples.write(tmp_path)
    path = sorted((tmp_path / "crossfit").glob("cldr-month_*/*_13_train.tsv"))[0]
    path.write_text(path.read_text() + "broken\nin two\n")
    name = "crossfit_" + re.sub(r"[^\w.]+", "_", path.parent.name)
    arguments = (name, "--split", "train_13", "--count", "1", "--gin.VOCABULARY=bytes")
    code, printed = show(capsys, *arguments, f"--gin.DATA_DIR={tmp_path}")
    assert code == main.USER_ERROR
    (line,) = printed.err.splitlines()
    assert f"{path}, row " in line
    code, printed = show(capsys, *arguments, f"--gin.DATA_DIR={tmp_path}", "--gin.BAD_ROWS=skip")
    assert code == 0
    assert f"Skipped 2 bad rows: {path}: 1 column" in printed.err.splitlines()[-1]

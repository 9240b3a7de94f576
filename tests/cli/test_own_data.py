"""A user's own file, T5 and machine by flags: train, eval, infer, export, and what goes wrong."""

import json
import os
import pathlib
import re
import shutil

import gin
import jax
import own_data
import pytest

from moe_peft.cli import main
from moe_peft.partitioning import mesh as mesh_lib
from moe_peft.weights import backbone, saved_run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a T5, files, and a run of three steps."""
    folder = tmp_path_factory.mktemp("own")
    own_data.t5_folder(folder / "t5")
    own_data.write(folder / "train.jsonl", own_data.rows(60))
    own_data.write(folder / "dev.jsonl", own_data.rows(8, start=100))
    own_data.write(folder / "test.jsonl", own_data.rows(6, start=200))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_PEFT_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        patch.setattr(mesh_lib, "all_devices", lambda: jax.devices()[:1])
        assert main.main([*TRAIN, "--eval_data", "dev.jsonl", "--out", "runs/reviews"]) == 0
    yield folder
    gin.clear_config()


TRAIN = [
    *("train", "--method", "ia3", "--backbone", "hf:./t5", "--data", "train.jsonl"),
    *("--steps", "3", "--batch_size", "4"),
]


@pytest.fixture(autouse=True)
def _here(place, monkeypatch):
    monkeypatch.setenv("MOE_PEFT_CACHE", str(place / "cache"))
    monkeypatch.chdir(place)
    yield
    gin.clear_config()


def run(capsys, *arguments):
    """(exit code, standard error) of one command."""
    code = main.main([str(argument) for argument in arguments])
    return code, capsys.readouterr().err


def test_a_run_says_what_it_will_do_and_what_comes_next(capsys, place):
    shutil.rmtree("runs/said", ignore_errors=True)
    code, said = run(capsys, *TRAIN, "--out", "runs/said")
    assert code == 0
    num_held_out = 60 - int(said.split("train.jsonl, ")[1].split()[0])
    assert 0 < num_held_out < 12
    for text in (
        f"backbone   hf:{place}/t5 (1 + 1 layers",
        "method     ia3, ",
        f"{num_held_out} others kept apart for evaluation",
        "steps      3 of 4 rows; adamw, learning rate at most 0.01",
        f"writes to  {place}/runs/said",
        "moe-peft eval runs/said\n",
        "moe-peft infer runs/said --inputs",
        "moe-peft export runs/said --to",
    ):
        assert text in said


def test_the_configuration_is_whole_and_runs_again_from_any_folder(capsys, place, monkeypatch):
    config = (place / "runs/reviews/config.gin").read_text()
    for line in (
        f"BACKBONE = 'hf:{place}/t5'",
        f"DATA = '{place}/train.jsonl'",
        "FEATURE_LENGTHS = {'inputs': 16, 'targets': 8}",
        "T5Config.emb_dim = 64",
        f"VOCABULARY = '{place}/t5'",
    ):
        assert line in config
    (place / "elsewhere").mkdir(exist_ok=True)
    monkeypatch.chdir(place / "elsewhere")
    again = f"--gin.MODEL_DIR='{place}/runs/again'"
    code, _ = run(capsys, "train", "--gin_file", "../runs/reviews/config.gin", again)
    assert code == 0
    both = [saved_run.load(place / "runs" / name) for name in ("reviews", "again")]
    assert both[0].record["digests"] == both[1].record["digests"]


def test_a_run_is_an_argument(capsys, place):
    assert run(capsys, "eval", "runs/reviews", "--data", "test.jsonl")[0] == 0
    found = json.loads((place / "runs/reviews/eval/test/results.json").read_text())
    assert found["results"]["overall"]["num_examples"] == 6
    assert run(capsys, "eval", "runs/reviews")[0] == 0  # on dev.jsonl
    assert (place / "runs/reviews/eval/dev/predictions/dev.jsonl").is_file()
    questions = own_data.write(place / "q.jsonl", [{"inputs": "great 7", "id": 3}])
    assert (
        run(capsys, "infer", "runs/reviews", "--inputs", questions, "--outputs", "a.jsonl")[0] == 0
    )
    (answer,) = map(json.loads, (place / "a.jsonl").read_text().splitlines())
    assert answer["id"] == 3
    assert isinstance(answer["prediction"], str)

    assert run(capsys, "export", "runs/reviews", "--to", "adapter")[0] == 0
    assert {path.name for path in (place / "adapter").iterdir()} == {
        *("adapter.safetensors", "adapter_config.json", "adapter_model.safetensors", "README.md")
    }
    assert run(capsys, "infer", "adapter", "--inputs", questions, "--outputs", "b.jsonl")[0] == 0
    assert (place / "b.jsonl").read_text() == (place / "a.jsonl").read_text()
    assert run(capsys, "merge", "runs/reviews", "--to", "merged.safetensors")[0] == 0


def test_columns_and_templates(capsys, place):
    table = place / "table.csv"
    lines = [f"{row['inputs']},{row['targets']}" for row in own_data.rows(12)]
    table.write_text("\n".join(["review,label", *lines]))
    columns = ["--inputs_template", "Good? {review}", "--targets_column", "label"]
    shutil.rmtree("runs/table", ignore_errors=True)
    flags = ["--data", table, *columns, "--eval_fraction", "0", "--out", "runs/table"]
    assert run(capsys, *TRAIN, *flags)[0] == 0
    code, _ = run(capsys, "infer", "runs/table", "--inputs", table, "--outputs", "t.jsonl")
    assert code == 0
    answers = [json.loads(line) for line in (place / "t.jsonl").read_text().splitlines()]
    assert [answer["label"] for answer in answers] == [row["targets"] for row in own_data.rows(12)]


def test_tasks_are_counted_from_their_column(capsys, place):
    named = [{**row, "task": f"t{i % 3}"} for i, row in enumerate(own_data.rows(30))]
    own_data.write(place / "tasks.jsonl", named)
    shutil.rmtree("runs/mhr", ignore_errors=True)
    flags = "train --method mhr --backbone hf:./t5 --data tasks.jsonl --out runs/mhr --steps 2"
    more = [
        "--gin.mhr.num_splits=2",
        "--gin.mhr.placement='encoder/.*/(query|wo)'",
        "--batch_size",
        4,
        "--gin_file",
        "monitors/alignment.gin",
    ]
    code, said = run(capsys, *flags.split(), *more)
    assert (code, "of 3 tasks" in said) == (0, True)
    assert "0.1 for routers" in said
    assert "NUM_TASKS = 3" in (place / "runs/mhr/config.gin").read_text()
    questions = own_data.write(place / "q.jsonl", [{"inputs": "great 7", "task": "t1"}])
    infer = ("infer", "runs/mhr", "--inputs", questions, "--outputs", "m.jsonl")
    assert run(capsys, *infer)[0] == 0
    own_data.write(questions, [{"inputs": "great 7"}])
    code, said = run(capsys, *infer)
    assert (code, "question 1 does not say which task" in said) == (2, True)
    own_data.write(questions, [{"inputs": "great 7", "task": "t9"}])
    assert "the task was not trained: 't9'" in run(capsys, *infer)[1]
    assert main.main(["report", "runs/mhr", "--out", "pictures"]) == 0
    assert "by their numbers" not in capsys.readouterr().out
    assert list(pathlib.Path("pictures").rglob("*.png"))


def test_a_rate_is_found_once(capsys, place):
    shutil.rmtree("runs/auto", ignore_errors=True)
    cheap = ["--method", "lora", "--gin.lora.placement='encoder/.*/query'"]
    flags = [*TRAIN, *cheap, "--out", "runs/auto", "--learning_rate", "auto"]
    code, said = run(capsys, *flags)
    assert code == 0
    assert "has the lowest loss after" in said
    factor = saved_run.load("runs/auto").description["rate_factor"]
    code, said = run(capsys, *flags, "--steps", 4)
    assert (code, "has the lowest loss" in said) == (0, False)
    assert saved_run.load("runs/auto").description["rate_factor"] == factor


# What a line says, by flags of `train` and others.
MISTAKES = {
    "nothing but a method": (
        "train --method lora",
        "BACKBONE.*Nor have MIXTURE .--data., MODEL_DIR",
    ),
    "missing file": (
        "{TRAIN} --data trian.jsonl --out x",
        "trian.jsonl is not there.*'train.jsonl'",
    ),
    "missing column": ("{TRAIN} --inputs_column text --out x", "'text'.*--inputs_column"),
    "unknown method": ("train --method loar", "--method is 'loar'.*Did you mean 'lora'"),
    "unknown option": (
        "{TRAIN} --out x --gin.mov.top=2 --method mov",
        "no parameter 'top'.*'top_k'",
    ),
    "a folder that is no T5": ("{TRAIN} --backbone hf:runs --out x", "runs has neither"),
    "another run": ("{TRAIN} --method mov --out runs/reviews", "another method.*--out"),
    "data and a mixture": (
        "train --gin_file experiments/cldr/mov.gin --data train.jsonl",
        "--data and the mixture 'cldr_train'.*exclude each other",
    ),
    "no tasks": ("{TRAIN} --method mhr --out x", "routes by task.*--task_column"),
    "no such run": ("eval runs/review", "runs/review is not there.*'reviews'"),
    "not a run": ("infer t5 --inputs test.jsonl --outputs a", "t5 has no config.gin"),
    "a run and a folder": ("eval runs/reviews --out x", "--out is for evaluating a backbone"),
    "no questions": (
        "infer runs/reviews --inputs nothing.txt --outputs a",
        "nothing.txt cannot",
    ),
}


@pytest.mark.parametrize(("line", "said"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line_before_anything_is_loaded(capsys, line, said, monkeypatch):
    monkeypatch.setattr(backbone, "load", lambda *args: pytest.fail("weights were read"))
    arguments = line.replace("{TRAIN}", " ".join(TRAIN)).split()
    code, errors = run(capsys, *arguments)
    assert code == 2
    lines = errors.splitlines()
    assert lines[-1].startswith(f"moe-peft {arguments[0]}: ")
    assert not [each for each in lines[:-1] if each.startswith("moe-peft")]
    assert re.search(said, lines[-1])
    assert not os.path.exists("x")

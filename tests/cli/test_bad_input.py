"""What people get wrong: one line on standard error, a code that is not 0, and nothing compiled."""

import errno
import pathlib
import re
import shutil
import subprocess
import sys

import gin
import pytest

from moe_peft.cli import main
from moe_peft.training import step as step_lib

BASE = """
include 'models/tiny.gin'
include 'methods/mov.gin'
include 'data/cldr.gin'
include 'runs/train.gin'
import moe_peft.training.optimizers
import moe_peft.methods.transfer

T5Config.num_encoder_layers = 1
T5Config.num_decoder_layers = 1
BACKBONE = "random:0"
BATCH_SIZE = 16
TRAIN_STEPS = 2
OPTIMIZER = @optimizers.adamw()
adamw.learning_rate = 1e-3
"""

# Modules of a user's own, imported by a gin file.
RULE_THAT_MATCHES_NOTHING = """
import gin
from moe_peft import adapters, methods, patching

@gin.register(module="mine")
def odd():
    return methods.Method("odd", (patching.Rule(".*/keyy", adapters.IA3),))
"""

EMPTY_TASK = """
import seqio
from moe_peft.data import registration, rows
from moe_peft.tasks import cldr

nothing = rows.Rows(rows.Ragged.from_sequences([]), rows.Ragged.from_sequences([]))
seqio.TaskRegistry.add(
    "empty_task",
    source=registration.RowsSource(lambda split: nothing, {"train": 0}),
    preprocessors=[],
    output_features=cldr.TEXT_FEATURES,
    metric_fns=[],
)
"""


@pytest.fixture(autouse=True)
def _clean_gin():
    yield
    gin.clear_config()


@pytest.fixture(autouse=True)
def _nothing_compiles(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a training step was made")

    monkeypatch.setattr(step_lib, "make_train_step", refuse)


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.gin"
    path.write_text(BASE)
    return path


def run(capsys, *arguments):
    """(exit code, lines on standard error) of one command."""
    code = main.main([str(argument) for argument in arguments])
    return code, capsys.readouterr().err.splitlines()


TRANSFERRED = [
    "--gin.METHOD=@methods.transferred()",
    "--gin.transferred.method=@methods.mhr()",
    "--gin.transferred.variant=%VARIANT",
    "--gin.mhr.num_tasks=249",
]

# name: (flags, what the line says)
TRAIN_MISTAKES = {
    "misspelt macro": (["--gin.TRAIN_STEP=3"], "TRAIN_STEP.*Did you mean 'TRAIN_STEPS'"),
    "misspelt parameter": (["--gin.mov.num_expert=3"], "'num_expert'.*'num_experts'"),
    "misspelt configurable": (["--gin.movv.num_experts=3"], "'movv'.*Did you mean.*'mov'"),
    "wrong type": (["--gin.TRAIN_STEPS=many"], "train.num_steps takes int, got 'many'"),
    "unknown method": (
        ["--gin.METHOD=@methods.movv()"],
        "'methods.movv'.*Did you mean 'methods.mov'",
    ),
    "method in quotes": (["--gin.METHOD=mov"], r"@mov\(\), without quotes"),
    "missing gin file": (
        ["--gin_file", "methods/movv.gin"],
        "'methods/movv.gin'.*Did you mean.*mov",
    ),
    "missing search path": (["--gin_search_paths", "/nowhere"], "no folder '/nowhere'"),
    "missing checkpoint": (["--gin.BACKBONE=run:/nowhere"], "/nowhere"),
    "missing weights": (["--gin.BACKBONE=file:/nowhere/t5.safetensors"], "/nowhere/t5.safetensors"),
    "unknown backbone": (["--gin.BACKBONE=embedded:cldr_tinny"], "cldr_tinny"),
    "unknown kind of backbone": (["--gin.BACKBONE=t5-small"], "t5-small"),
    "wrong vocabulary": (["--gin.T5Config.vocab_size=100"], "vocab_size is 100"),
    "rank 0": (
        ["--gin.METHOD=@methods.molora()", "--gin.molora.rank=0"],
        "rank is 0",
    ),
    "experts 0": (["--gin.mov.num_experts=0"], "num_experts is 0"),
    "top-k above experts": (["--gin.mov.top_k=11"], "top_k is 11, more than num_experts, 10"),
    "top-k 0": (["--gin.mov.top_k=0"], "top_k is 0"),
    "unknown placement": (
        ["--gin.METHOD=@methods.lora()", "--gin.lora.placement=qkv"],
        "placement 'qkv'.*'qkvo'",
    ),
    "batch not divisible": (["--gin.BATCH_SIZE=12"], "12.*8"),
    "batch 0": (["--gin.BATCH_SIZE=0"], "0"),
    "steps 0": (["--gin.TRAIN_STEPS=0"], "num_steps is 0; expected 1 or more"),
    "unknown mixture": (["--gin.MIXTURE=cldr_trian"], "'cldr_trian'.*'cldr_train'"),
    "unknown feature": (["--gin.FEATURE_LENGTHS={'input': 8}"], "feature_lengths"),
    "too few tasks": (
        ["--gin.METHOD=@methods.poly()", "--gin.poly.num_tasks=3"],
        r"'cldr_train' has the task id \d+, but the method tells 3 tasks apart \(0 to 2\)",
    ),
    "no task ids": (
        ["--gin.METHOD=@methods.poly()", "--gin.poly.num_tasks=3", "--gin.MIXTURE=cldr_denoise"],
        "'poly' routes by task, but 'cldr_denoise' has no feature 'task_ids'",
    ),
    "packed tasks": (
        ["--gin.METHOD=@methods.poly()", "--gin.poly.num_tasks=249", "--gin.train.pack=True"],
        "'poly' combines its modules for each example's task, and packed rows mix",
    ),
    "splits that do not divide": (
        ["--gin.METHOD=@methods.mhr()", "--gin.mhr.num_tasks=249", "--gin.mhr.num_splits=5"],
        "5 splits do not divide the inputs, 32 wide. Choose num_splits among 1, 2, 4, 8, 16, 32",
    ),
    "no source": (
        [*TRANSFERRED, "--gin.VARIANT=mu"],
        "'mhr_mu' starts from a multi-task run: give its folder as train.start_from",
    ),
    "unknown variant": ([*TRANSFERRED, "--gin.VARIANT=mean"], "Unknown variant 'mean'"),
    "variant of single tasks": (
        [*TRANSFERRED, "--gin.VARIANT=z", "--gin.train.start_from=/nowhere"],
        "variant 'mu' or 'keep', not 'z'. For new tasks use `moe-peft adapt`",
    ),
    "unknown dtype": (["--gin.DTYPE=bf16"], "bf16.*bfloat16"),
    "unknown frozen dtype": (["--gin.FROZEN_DTYPE=int8"], "int8"),
}


@pytest.mark.eight_devices  # a batch has to divide over them
@pytest.mark.parametrize("name", TRAIN_MISTAKES)
def test_train_mistake(name, base, tmp_path, capsys):
    flags, message = TRAIN_MISTAKES[name]
    check(train(capsys, base, tmp_path / "run", *flags), message)


@pytest.mark.parametrize(
    ("source", "flag", "message"),
    [
        (RULE_THAT_MATCHES_NOTHING, "METHOD=@mine.odd()", "'.*/keyy' matches no layer"),
        (EMPTY_TASK, "MIXTURE=empty_task", "'empty_task'"),
    ],
    ids=["rule matching nothing", "empty task"],
)
def test_mistake_in_ones_own_module(source, flag, message, base, tmp_path, capsys, monkeypatch):
    module = f"mine_{flag.split('=')[0].lower()}"
    (tmp_path / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    base.write_text(BASE + f"import {module}")
    check(train(capsys, base, tmp_path / "run", f"--gin.{flag}"), re.escape(message))


def test_required_value_missing(base, tmp_path, capsys):
    base.write_text(BASE.replace("BATCH_SIZE = 16", ""))
    message = "BATCH_SIZE has no value, and train.batch_size needs one"
    check(train(capsys, base, tmp_path / "run"), message)
    base.write_text(BASE.replace("adamw.learning_rate = 1e-3", ""))
    check(train(capsys, base, tmp_path / "run"), "adamw.learning_rate is required")


def test_weights_that_are_no_safetensors(base, tmp_path, capsys):
    (tmp_path / "weights.safetensors").write_text("not weights")
    found = train(
        capsys, base, tmp_path / "run", f"--gin.BACKBONE=file:{tmp_path}/weights.safetensors"
    )
    check(found, "cannot be read as safetensors")


def test_folder_under_a_file(base, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    check(train(capsys, base, tmp_path / "file" / "run"), "Cannot write to the folder of the run")


def test_folder_in_a_bucket(base, capsys):
    check(train(capsys, base, "gs://bucket/run"), "MODEL_DIR is gs://bucket/run. Mount the bucket")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_folder_that_refuses(code, base, tmp_path, capsys, monkeypatch):
    # Root may write anywhere, so the refusal is simulated.
    def refuse(self, *args, **kwargs):
        raise OSError(code, errno.errorcode[code], str(self))

    monkeypatch.setattr(pathlib.Path, "write_bytes", refuse)
    check(train(capsys, base, tmp_path / "run"), f"Cannot write.*{errno.errorcode[code]}")


def test_disk_too_small_for_the_checkpoints(base, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    check(train(capsys, base, tmp_path / "run"), "The disk of .* has 1.0 kB left")


def test_unreadable_gin_file(tmp_path, capsys):
    (tmp_path / "binary.gin").write_bytes(b"\xff\xfe\x00")
    check(train(capsys, tmp_path / "binary.gin", tmp_path / "run"), "binary.gin cannot be read")


EVAL = """
include 'runs/eval.gin'
include 'runs/infer.gin'
"""

# name: (command, flags, what the line says)
LATER_MISTAKES = {
    "missing checkpoint": ("eval", [], "no training checkpoint in .*run"),
    "eval: unknown mixture": ("eval", ["--gin.EVAL_MIXTURES=cldr_heldot"], "'cldr_heldout'"),
    "eval: no mixture": ("eval", ["--gin.EVAL_MIXTURES=()"], "mixtures is empty"),
    "eval: wrong vocabulary": ("eval", ["--gin.T5Config.vocab_size=100"], "vocab_size is 100"),
    "eval: unknown metric": ("eval", ["--gin.Evaluator.metric=rouge"], "'rouge'.*'rouge_l'"),
    "eval: batch not divisible": ("eval", ["--gin.EVAL_BATCH_SIZE=12"], "12.*8"),
    "infer: no questions": (
        "infer",
        ["--gin.INPUTS=/nowhere/q.txt", "--gin.OUTPUTS=a.jsonl"],
        "/nowhere/q.txt",
    ),
    "infer: no file named": ("infer", ["--gin.OUTPUTS=a.jsonl"], "INPUTS has no value"),
    "export: missing checkpoint": (
        "export",
        ["--gin.OUTPUTS=a.safetensors"],
        "no training checkpoint in .*run",
    ),
}


@pytest.mark.eight_devices  # a batch has to divide over them
@pytest.mark.parametrize("name", LATER_MISTAKES)
def test_mistake_after_training(name, base, tmp_path, capsys):
    command, flags, message = LATER_MISTAKES[name]
    base.write_text(BASE + EVAL + "Evaluator.max_examples_per_task = 1")
    folder = f"--gin.MODEL_DIR={tmp_path / 'run'}"
    check(run(capsys, command, "--gin_file", base, folder, *flags), message)


def test_plan_mistakes(capsys):
    check(run(capsys, "plan"), "no settings given")
    check(run(capsys, "plan", "--gin_file", "models/tiny.gin"), "METHOD has no value")
    flags = ("--gin_file", "models/tiny.gin", "--gin_file", "methods/lora.gin")
    check(run(capsys, "plan", *flags, "--gin.lora.rank=0"), "rank is 0")


@pytest.mark.parametrize(
    "arguments",
    [
        # All commands end in the same lines; `plan` has loaded more when it finds its mistake.
        pytest.param(("train", "--gin_file", "methods/movv.gin"), marks=pytest.mark.slow),
        ("plan", "--gin_file", "models/tiny.gin", "--gin_file", "methods/mov.gin", "--gin.X=1"),
    ],
)
def test_true_process_prints_one_line_and_no_traceback(arguments):
    done = subprocess.run(
        [sys.executable, "-m", "moe_peft", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    check((done.returncode, done.stderr.splitlines()), "Did you mean|nothing in this run reads it")


def train(capsys, base, folder, *flags):
    """Runs `moe-peft train`; returns the exit code and the lines on standard error."""
    return run(capsys, "train", "--gin_file", base, f"--gin.MODEL_DIR={folder}", *flags)


def check(found, message):
    """One line with this message, and a code that scripts notice."""
    code, lines = found
    assert len(lines) == 1, lines
    assert re.search(message, lines[0]), lines[0]
    assert code == main.USER_ERROR

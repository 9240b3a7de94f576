"""The command line: help at once, settings from gin, results on standard output."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import gin
import pytest

import moe_peft
from moe_peft import tasks
from moe_peft.cli import commands, main
from moe_peft.config import gin_files, macros
from moe_peft.runtime import host_memory

TINY_MOV = ("--gin_file", "models/tiny.gin", "--gin_file", "methods/mov.gin")


@pytest.fixture(autouse=True)
def _clean_gin():
    yield
    gin.clear_config()


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from moe_peft.cli import main\n"
        "try: main.main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "print({'jax', 'tensorflow', 'gin', 'rich'} & set(sys.modules))"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
    assert time.monotonic() - started < 5  # 0.1 s on an idle machine


def test_these_commands_take_settings():
    names = "plan train preflight adapt eval infer export merge"
    assert list(commands.COMMANDS) == names.split()


@pytest.mark.parametrize("command", commands.COMMANDS)
def test_help_of_every_command_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main.main([command, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert f"moe-peft {command} --gin_file" in shown
    assert "--gin.NAME=VALUE" in shown


def test_version(capsys):
    with pytest.raises(SystemExit):
        main.main(["--version"])
    assert capsys.readouterr().out.strip() == moe_peft.__version__


def test_plan_from_another_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.main(["plan", *TINY_MOV, "--json", "--gin.mov.num_experts=3"]) == 0
    found = json.loads(capsys.readouterr().out)
    # 2 + 2 layers of width 32, 4 heads of 8, feed-forward 64: per expert 3 x 2 x 2 vectors
    # of 32 with kernels of 8 in attention, and 4 feed-forward vectors and kernels of 64.
    assert found["trainable"] == 3 * (12 * (32 + 8) + 4 * (64 + 64))
    assert found["method"]["name"] == "mov"
    assert found["nominal_percent"] is None


def test_plan_shows_tables(capsys):
    assert main.main(["plan", *TINY_MOV]) == 0
    shown = capsys.readouterr().out
    for text in ("Method mov", "encoder/layers_*/attention/key", "expert heads kv", "trainable"):
        assert text in shown


def test_search_paths_and_own_files_come_before_packaged_ones(tmp_path, monkeypatch, capsys):
    (tmp_path / "extra").mkdir()
    (tmp_path / "extra" / "two.gin").write_text("include 'methods/mov.gin'\nmov.num_experts = 2")
    (tmp_path / "models").mkdir()
    packaged = (gin_files.packaged_folder() / "models" / "tiny.gin").read_text()
    (tmp_path / "models" / "tiny.gin").write_text(packaged + "\nT5Config.num_heads = 8\n")
    monkeypatch.chdir(tmp_path)
    flags = ("--gin_file", "models/tiny.gin", "--gin_file", "two.gin", "--gin_search_paths=extra")
    assert main.main(["plan", *flags, "--json"]) == 0
    leaves = json.loads(capsys.readouterr().out)["leaves"]
    assert any(leaf["shape"] == [2, 8, 8] for leaf in leaves)


def test_files_lists_what_can_be_named(capsys):
    assert main.main(["files"]) == 0
    listed = capsys.readouterr().out.split()
    assert {"models/tiny.gin", "methods/mov.gin", "runs/train.gin"} <= set(listed)
    assert main.main(["files", "--folder"]) == 0
    (folder,) = capsys.readouterr().out.split()
    assert (pathlib.Path(folder) / "methods" / "mov.gin").is_file()


@pytest.mark.parametrize(
    "arguments",
    [
        ("files",),
        ("compare", "results/x"),
        ("report", "results/x"),
        ("convert", "--from", "a", "--to", "b"),
        ("aggregate", "results/x"),
        ("experiments",),
        ("data", "check", "embedded:samples"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands_without_settings_refuse_them(arguments, capsys):
    assert main.main([*arguments, "--gin.NO_SUCH_THING=1"]) == main.USER_ERROR
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.endswith("--gin.NO_SUCH_THING=1: no settings are taken from gin.")


OWN_METHOD = """
import gin
from moe_peft import adapters, methods, patching

@gin.register(module="own_method")
def of_mine():
    return methods.Method("of_mine", (patching.Rule(".*/key", adapters.IA3),))
"""


def test_gin_files_import_modules_of_the_working_directory(tmp_path, monkeypatch, capsys):
    (tmp_path / "own_method.py").write_text(OWN_METHOD)
    own = "include 'models/tiny.gin'\nimport own_method\nMETHOD = @own_method.of_mine()"
    (tmp_path / "own.gin").write_text(own)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # as it is for the console script: without here
    assert main.main(["plan", "--gin_file", "own.gin", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["method"]["name"] == "of_mine"
    assert sys.path[-1] == str(tmp_path)


def test_the_module_is_the_command_from_anywhere(tmp_path, capsys):
    # A file here does not hide an installed library.
    (tmp_path / "gin.py").write_text("raise RuntimeError('hidden')")
    done = subprocess.run(
        [sys.executable, "-m", "moe_peft", "methods"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(moe_peft.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert main.main(["methods"]) == 0
    assert (done.stdout, done.stderr) == (capsys.readouterr().out, "")


def test_tasks_are_found_in_a_checkout_that_is_not_installed(tmp_path):
    package = pathlib.Path(moe_peft.__file__).parent
    for name, origin in (("moe_peft", package), ("tasks", pathlib.Path(tasks.__file__).parent)):
        (tmp_path / name).mkdir()
        shutil.copy(origin / "__init__.py", tmp_path / name)
    (tmp_path / "tasks" / "mine.py").write_text("FOUND = __name__")
    code = "from moe_peft.tasks import mine; print(mine.FOUND, moe_peft.tasks.mine is mine)"
    done = subprocess.run(
        [sys.executable, "-c", f"import moe_peft; {code}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("moe_peft.tasks.mine True\n", "")


def test_interrupt_is_one_line(monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "_run", interrupt)
    assert main.main(["train"]) == main.INTERRUPTED
    assert capsys.readouterr().err == "moe-peft train: interrupted.\n"


def test_commands_that_compute_run_their_programs_inline(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(host_memory, "run_programs_inline", lambda: asked.append(True))
    assert main.main(["plan", "--gin_file", "missing.gin"]) == main.USER_ERROR
    assert not asked
    assert main.main(["train", "--gin_file", "missing.gin"]) == main.USER_ERROR
    assert asked


@pytest.mark.parametrize("has_tpu", [False, True])
def test_libtpu_is_answered_where_there_is_no_tpu(has_tpu, monkeypatch):
    names = ("TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE")
    for name in (*names, "TPU_SKIP_MDS_QUERY"):
        monkeypatch.setenv(name, "1")  # so that it is as before after the test
    for name in (*names, *(["TPU_SKIP_MDS_QUERY"] if has_tpu else [])):
        monkeypatch.delenv(name)
    assert main.main(["train", "--gin_file", "missing.gin"]) == main.USER_ERROR
    assert [name in os.environ for name in names] == [not has_tpu] * 2


def test_our_own_mistakes_keep_their_traceback(monkeypatch):
    def fail(*args):
        raise RuntimeError("a bug")

    monkeypatch.setattr(main, "_run", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main.main(["train"])


def test_documentation_lists_every_agreed_macro():
    page = gin_files.packaged_folder().parent / "docs" / "configuration.md"
    if not page.is_file():
        pytest.skip("not a checkout")
    text = page.read_text()
    assert len(macros.MACROS) > 30
    for name, meaning in macros.MACROS.items():
        assert f"| `{name}` | {meaning} |" in text

"""What there is to choose from, listed at once: nothing heavy is loaded for it."""

import json
import subprocess
import sys

import gin
import pytest

from moe_peft import methods
from moe_peft.cli import listing, main
from moe_peft.config import macros, packaged


@pytest.fixture(autouse=True)
def _clean_gin():
    yield
    gin.clear_config()


def printed(capsys, *arguments):
    """What a command prints."""
    assert main.main(arguments) == 0
    return capsys.readouterr().out


def test_methods_are_one_line_each(capsys):
    lines = printed(capsys, "methods").splitlines()
    names = [line.split()[0] for line in lines]
    assert names == [path.stem for path in packaged.files("methods")]
    assert len(names) > 15
    line = "mov            MoV: (IA)3 vectors, mixed for every token by a router."
    assert line in lines
    assert all(line.endswith(".") for line in lines)


@pytest.mark.parametrize("name", ["methods", "models", "macros"])
def test_json_holds_what_the_lines_say(name, capsys):
    lines = printed(capsys, name).splitlines()
    rows = json.loads(printed(capsys, name, "--json"))
    assert len(rows) == len(lines) > 15
    for row, line in zip(rows, lines):
        first, about, *_ = row.values()
        assert line.startswith(f"{first} ")
        assert about in line


def test_a_terminal_gets_a_table(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("TERM", "xterm")  # "dumb" is always 80 columns wide
    monkeypatch.setenv("NO_COLOR", "1")
    shown = printed(capsys, "methods", "mov")
    assert "───" in shown
    assert "a fraction in [0, 1)." in shown
    listing._show([{"option": "[bold]"}])
    assert "[bold]" in capsys.readouterr().out


def test_models_have_the_sizes_of_their_files_and_of_those_included(capsys):
    rows = {row["model"]: row for row in json.loads(printed(capsys, "models", "--json"))}
    small, multilingual = rows["t5_1_1_small"]["sizes"], rows["mt5_small"]["sizes"]
    assert (small["vocab_size"], multilingual["vocab_size"]) == (32128, 250112)
    assert small == {**multilingual, "vocab_size": 32128}
    assert rows["mt5_small"]["about"].startswith("mT5 small (300M): T5 1.1 with")
    (line,) = (line for line in printed(capsys, "models").splitlines() if line.startswith("tiny "))
    assert line.endswith("mlp_dim 64, num_encoder_layers 2, num_decoder_layers 2")


def test_macros_are_those_that_files_agree_on(capsys):
    rows = json.loads(printed(capsys, "macros", "--json"))
    assert {row["macro"]: row["meaning"] for row in rows} == macros.MACROS


@pytest.mark.parametrize("name", [path.stem for path in packaged.files("methods")])
def test_every_option_of_every_method_has_a_meaning(name, capsys):
    found = json.loads(printed(capsys, "methods", name, "--json"))
    assert found["method"] == name
    module, _, constructor = found["constructor"].partition(".")
    assert module == "methods"
    assert constructor == "transferred" or constructor in methods.METHODS
    assert [each["option"] for each in found["options"] if not each["meaning"]] == []


def test_options_have_defaults_and_what_the_file_sets(capsys):
    rows = json.loads(printed(capsys, "methods", "mhr_ia3", "--json"))["options"]
    options = {row.pop("option"): row for row in rows}
    tasks = "training tasks; the batch's task ids are below it."
    assert options["num_tasks"] == {"default": "required", "set": "%NUM_TASKS", "meaning": tasks}
    assert options["adapter"]["set"] == '"ia3"'
    rows = json.loads(printed(capsys, "methods", "lora_big", "--json"))["options"]
    options = {row.pop("option"): row for row in rows}
    assert options["rank"] == {"default": "16", "set": "16", "meaning": "at least 1."}
    assert options["a_init"]["default"] == "'uniform'"
    text = printed(capsys, "methods", "methods/mov.gin")
    assert "methods/mov.gin calls methods.mov.\n\noption " in text
    assert "\nnum_experts            10             10             vectors per place" in text


def test_unknown_method(capsys):
    assert main.main(["methods", "movv"]) == main.USER_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("moe-peft methods: The method is 'movv'; expected one of frozen, ")
    assert line.endswith(" Did you mean 'mov'?")


def test_lists_load_nothing_heavy():
    code = (
        "import sys; from moe_peft.cli import main\n"
        "for name in ('methods', 'models', 'macros', 'files'): main.main([name])\n"
        "print({'jax', 'tensorflow', 'rich', 'shtab'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"

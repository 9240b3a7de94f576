"""The scripts of `moe-peft completion`, read by a real bash."""

import shutil
import subprocess
import sys

import pytest

from moe_peft.cli import arguments, completion, main
from moe_peft.config import packaged

BASH = shutil.which("bash")

# The words of the command line, then what is offered for the last one.
ASK = """
COMP_WORDS=({words})
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_shtab_moe_peft
echo "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def script():
    """That of bash."""
    pytest.importorskip("shtab", reason="completion needs shtab")
    return completion.script(arguments.parser(), "bash")


WORDS = {
    "tr": "train",
    "data s": "show",
    "data show --sp": "--split",
    "train --gin_fi": "--gin_file",
    "train --gin_file models/byt5_x": "models/byt5_xl.gin models/byt5_xxl.gin",
    "train --gin_file methods/mov. --gin_file ow": "own.gin",
    "methods mov_": "mov_in_paper mov_sentence mov_top2",
    "convert --dtype b": "bfloat16",
    "experiments --check p": "parse plan",
    "compare ru": "runs",
    "convert --from ow": "own.gin",
    "preflight --slices ow": "",  # a number
    "train --no_such": "",
}


@pytest.mark.skipif(BASH is None, reason="needs bash")
def test_bash_completes(script, tmp_path):
    (tmp_path / "own.gin").write_text("")
    (tmp_path / "runs").mkdir()
    asked = "".join(ASK.format(words=f"moe-peft {words}") for words in WORDS)
    done = subprocess.run(
        [BASH, "--norc"], input=script + asked, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stderr == ""
    answers = [" ".join(sorted(line.split())) for line in done.stdout.split("\n")[:-1]]
    assert dict(zip(WORDS, answers, strict=True)) == WORDS


def test_words_go_to_arguments_of_that_name_in_every_command(script):
    parser = arguments.parser()
    (commands,) = (action for action in parser._actions if action.dest == "command")
    (own,) = (each for each in commands.choices["train"]._actions if each.dest == "method")
    own.choices = ("one", "two")
    text = completion.script(parser, "bash")
    assert "\n_shtab_moe_peft_plan___method_choices=(frozen full ia3 " in text
    assert "\n_shtab_moe_peft_train___method_choices=(one two)\n" in text


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_each_script_names_every_packaged_file(shell, capsys):
    pytest.importorskip("shtab", reason="completion needs shtab")
    assert main.main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert len(packaged.names()) > 100
    assert all(name in text for name in packaged.names())


def test_without_shtab(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main.main(["completion", "bash"]) == main.USER_ERROR
    line = "moe-peft completion: completion needs shtab: pip install shtab.\n"
    assert capsys.readouterr().err == line

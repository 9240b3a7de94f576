"""Mistakes on the command line are one line; the help shows every command, in groups."""

import pytest

from moe_peft.cli import arguments, main, parsing

# arguments: the line on standard error
MISTAKES = {
    "trian": "moe-peft: there is no command 'trian'. Did you mean 'train'?",
    "frobnicate": "moe-peft: there is no command 'frobnicate'. `moe-peft --help` says more.",
    "data shw": "moe-peft data: there is no verb 'shw'. Did you mean 'show'?",
    "--versoin": "moe-peft: there is no flag '--versoin'. Did you mean '--version'?",
    "train --gin_flie x": "moe-peft train: there is no flag '--gin_flie'. "
    "Did you mean '--gin_file'?",
    "train --gin_fil=x": "moe-peft train: there is no flag '--gin_fil'. Did you mean '--gin_file'?",
    "train --xyz": "moe-peft train: there is no flag '--xyz'. `moe-peft train --help` says more.",
    "preflight --targt v5e:4x4": "moe-peft preflight: there is no flag '--targt'. "
    "Did you mean '--target'?",
    "train --TRAIN_STEPS=3": "moe-peft train: there is no flag '--TRAIN_STEPS'. "
    "Did you mean '--gin.TRAIN_STEPS'?",
    "train --gni.mov.top_k=2": "moe-peft train: there is no flag '--gni.mov.top_k'. "
    "Did you mean '--gin.mov.top_k'?",
    "train --gin_file": "moe-peft train: argument --gin_file: expected one argument. "
    "`moe-peft train --help` says more.",
    "train here": "moe-peft train: nothing takes 'here'. `moe-peft train --help` says more.",
    "experiments --check pln": "moe-peft experiments: --check is 'pln'; expected one of parse, "
    "plan, run. Did you mean 'plan'?",
    "data": "moe-peft data: the following arguments are required: verb. "
    "`moe-peft data --help` says more.",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_one_line(mistake, capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(mistake.split())
    assert ended.value.code == main.USER_ERROR
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", f"{MISTAKES[mistake]}\n")


def test_what_looks_like_a_flag_may_be_a_value():
    parsed = arguments.parser().parse_args(["convert", "--from=--odd", "--to", "--a b"])
    assert (parsed.source, parsed.to) == ("--odd", "--a b")
    assert arguments.parser().parse_args(["experiments", "--", "--odd"]).names == ["--odd"]


def test_no_arguments_are_a_question_for_help(capsys):
    printed = []
    for given in ([], ["--help"]):
        with pytest.raises(SystemExit) as ended:
            main.main(given)
        assert ended.value.code == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert printed[0].startswith("usage: moe-peft")


def test_help_shows_every_command_once_in_its_group(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    top = arguments.parser()
    lines = top.format_help().splitlines()
    shown = [line.split()[0] for line in lines if line.startswith("    ")]
    (commands,) = (action for action in top._actions if action.dest == "command")
    assert len(commands.choices) > 15
    assert sorted(name for name in shown if name in commands.choices) == sorted(commands.choices)
    headings = [line.strip() for line in lines if line.strip() in parsing.GROUPS]
    assert headings == list(parsing.GROUPS)
    assert shown.index("train") < shown.index("eval") < shown.index("convert")

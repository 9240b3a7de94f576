"""Completion in a shell: `source <(moe-peft completion bash)`.

The script holds the names of today's packaged files, so it needs no start of Python at a key press;
print it again after an update.
"""

import argparse
from collections.abc import Iterator
import shlex
from typing import Any

from moe_peft import errors

SHELLS = ("bash", "zsh", "fish")

# A function that offers words and the files that are there; shtab looks for "_file" in its name.
_BASH = '{name}() {{ compgen -W {words} -- "$1"; compgen -f -- "$1"; }}'
_ZSH = "{name}() {{ compadd -- {words}; _files }}"
_FISH = "{words} (__fish_complete_path (commandline -ct))"


def add_command(commands: Any) -> None:
    """Adds `completion` to the subparsers of the command line."""
    line = "print a script that completes commands, flags and names in a shell"
    examples = "Examples:\n  source <(moe-peft completion bash)\n"
    examples += "  moe-peft completion zsh > ~/.zfunc/_moe-peft\n"
    examples += "  moe-peft completion fish > ~/.config/fish/completions/moe-peft.fish"
    sub = commands.add_parser(
        "completion",
        help=line,
        description=line.capitalize() + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.add_argument("shell", choices=SHELLS, help=", ".join(SHELLS))


def words() -> dict[str, list[str]]:
    """Returns what may follow arguments, by their `dest`; an argument's own choices need no line.

    What is neither here nor a number is completed as a file.
    """
    from moe_peft.config import packaged

    return {
        "gin_file": packaged.names(),
        "method": [path.stem for path in packaged.files("methods")],
    }


FILES_TOO = ("gin_file",)  # words, or files that are there


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Returns the script for a shell; changes `parser`. Raises UserError if shtab is missing."""
    try:
        import shtab
    except ImportError:
        raise errors.UserError("completion needs shtab: pip install shtab.") from None
    known = words()
    for action in _arguments(parser):
        if action.dest in FILES_TOO:
            action.complete = _words_and_files(action.dest, known[action.dest])
        elif action.choices is None and action.dest in known:
            action.choices = known[action.dest]
        elif action.choices is None and action.type is None:
            action.complete = shtab.FILE
    return shtab.complete(parser, shell)


def _arguments(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Arguments that take a value, those of subcommands included."""
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for sub in action.choices.values():
                yield from _arguments(sub)
        elif action.nargs != 0:
            yield action


def _words_and_files(dest: str, names: list[str]) -> dict[str, Any]:
    """What shtab takes as `complete`."""
    name, joined = f"_moe_peft_{dest}", shlex.join(names)
    return {
        **dict.fromkeys(("bash", "zsh"), name),
        "fish": _FISH.format(words=joined),
        "preamble": {
            "bash": _BASH.format(name=name, words=shlex.quote(" ".join(names))),
            "zsh": _ZSH.format(name=name, words=joined),
        },
    }

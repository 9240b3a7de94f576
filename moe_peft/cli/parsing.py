"""An argument parser: mistakes are one line with near names, commands are shown in groups."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
import itertools
from typing import NoReturn

from moe_peft import errors
from moe_peft.config import macros

# Headings of `moe-peft --help`; a command that is not here comes last.
GROUPS = {
    "what there is:": ("methods", "models", "macros", "files", "experiments"),
    "before a run:": ("data", "plan", "preflight"),
    "runs:": ("train", "adapt", "eval", "infer"),
    "after a run:": ("report", "compare", "aggregate", "export", "merge", "convert"),
    "more:": (),
}


class Parser(argparse.ArgumentParser):
    """Says a mistake in one line, without the usage, and exits with `errors.EXIT_CODE`."""

    def error(self, message: str) -> NoReturn:
        """Ends the program."""
        if not message.endswith(("?", ".")):
            message += f". `{self.prog} --help` says more."
        self.exit(errors.EXIT_CODE, f"{self.prog}: {message}\n")

    def parse_known_args(self, args=None, namespace=None):
        """Parses as usual, but what is left over is a mistake of this parser, not of the top."""
        self._check_flags(args or ())
        found, more = super().parse_known_args(args, namespace)
        if more:
            self.error(f"nothing takes {' '.join(map(repr, more))}")
        return found, more

    def _check_flags(self, args: Sequence[str]) -> None:
        """Ends the program at the first flag that does not exist."""
        flags = itertools.takewhile(lambda arg: arg != "--", args)
        if self._subparsers is not None:  # what follows the command is for its own parser
            flags = itertools.takewhile(lambda arg: arg.startswith("-"), flags)
        for flag in (arg.partition("=")[0] for arg in flags if arg.startswith("--")):
            if flag not in self._option_string_actions and " " not in flag:
                known = [*self._option_string_actions, *_bindings(flag)]
                self.error(f"there is no flag {flag!r}.{errors.near(flag, known)}".rstrip("."))

    def _check_value(self, action: argparse.Action, value: object) -> None:
        choices = action.choices
        if choices is None or value in choices:
            return
        what = action.metavar or action.dest
        if isinstance(choices, Mapping):
            self.error(
                f"there is no {what} {value!r}.{errors.near(str(value), choices)}".rstrip(".")
            )
        try:
            errors.check_one_of("/".join(action.option_strings) or what, value, choices)
        except errors.UserError as error:
            self.error(str(error))


def _bindings(flag: str) -> list[str]:
    """Settings of gin that a flag may have meant: --gni.mov.top_k, --TRAIN_STEPS."""
    name = flag.lstrip("-")
    start, dot, rest = name.partition(".")
    known = [f"--gin.{rest}"] if dot and errors.near(start, ["gin"]) else []
    return [*known, f"--gin.{name}"] if name in macros.MACROS else known


class GroupedHelp(argparse.RawDescriptionHelpFormatter):
    """Shows commands below the headings of `GROUPS`."""

    def _iter_indented_subactions(self, action: argparse.Action) -> Iterator[argparse.Action]:
        known = {each.dest: each for each in super()._iter_indented_subactions(action)}
        if not known:
            return
        groups = {heading: [known.pop(name) for name in names] for heading, names in GROUPS.items()}
        groups["more:"] = [*known.values()]
        for heading, commands in groups.items():
            yield argparse.Action((), heading)
            self._indent()
            yield from commands
            self._dedent()

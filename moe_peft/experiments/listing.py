"""Rows of the papers' tables, chosen by filters, and how far each was checked."""

import collections
from collections.abc import Callable, Sequence
import itertools
import json
import re

from moe_peft import errors
from moe_peft.experiments import files, record
from moe_peft.runtime import tables as tables_lib

_COLUMNS = ("row", "experiment", "printed in", "size", "published")
_COLUMNS += ("trained", "afterwards", "operations")


def select(
    names: Sequence[str] = (),
    papers: Sequence[str] = (),
    tables: Sequence[str] = (),
    sizes: Sequence[str] = (),
) -> list[files.Experiment]:
    """Experiments that fit every filter given; a UserError if one fits nothing at all.

    Names are of experiments or of folders of them, such as "mhr/t0_xl"; papers are keys of
    `files.PAPERS`; tables are numbers as printed ("6"), or folders ("t0_xl"); sizes are those of
    the backbone, "770M", "3B" or "11B", in any case of letters.
    """
    found = [files.load(name) for name in files.names()]
    folders = lambda name: {*itertools.accumulate(name.split("/"), "{}/{}".format)}
    tests: tuple[tuple[str, Sequence[str], Callable], ...] = (
        ("", names, lambda each: folders(each.name)),
        ("--paper ", papers, lambda each: {each.paper}),
        ("--table ", tables, lambda each: {*each.tables, each.name.split("/")[1]}),
        ("--size ", [size.upper() for size in sizes], lambda each: {each.size}),
    )
    for flag, wanted, values in tests:
        known = set().union(*map(values, found))
        for value in wanted:
            if value not in known:
                near = errors.near(value, sorted(known)) or f" Known: {', '.join(sorted(known))}."
                raise errors.UserError(f"No experiment fits {flag}{value}.{near}")
        if wanted:
            found = [each for each in found if values(each) & set(wanted)]
    return found


def shard(found: Sequence[files.Experiment], which: str) -> list[files.Experiment]:
    """Part I of N, for "I/N" with I of 1 ... N; rows that share a multi-task run stay together."""
    numbers = re.fullmatch(r"(\d+)/(\d+)", which)
    part, parts = map(int, numbers.groups()) if numbers else (0, 0)
    if not 1 <= part <= parts:
        raise errors.UserError(f"--shard is {which!r}; expected I/N with I of 1 ... N, as 1/4.")
    runs = list(dict.fromkeys(each.after or each.name for each in found))
    mine = set(runs[part - 1 :: parts])
    return [each for each in found if (each.after or each.name) in mine]


def show(found: Sequence[record.Row], as_json: bool = False) -> None:
    """Prints rows as a table, or as JSON."""
    if as_json:
        print(json.dumps([row.to_json() for row in found], indent=2, ensure_ascii=False))
        return
    columns = (*_COLUMNS[1:], "state")
    left = set(columns) - {"trained", "afterwards", "operations"}
    table = tables_lib.grid(*columns, left=left, overflow="fold")
    for row in found:
        table.add_row(*cells(row.experiment), row.state)
    console = tables_lib.wide_console(200)
    console.print(table)
    counts = collections.Counter(row.state.partition(":")[0] for row in found)
    said = [f"{count} {state}" for state, count in counts.items()]
    console.print(f"{len(found)} experiments: {', '.join(said)}.")
    if not any(row.score for row in found):
        console.print("None has been run at full size: samples say nothing about the numbers.")


def cells(found: files.Experiment) -> tuple[str, ...]:
    """One line of the tables."""
    many, new = (f"{count:,}" if count else "" for count in found.trainable)
    cost = f"{found.operations:.1e}" if found.operations else ""
    return found.name, found.source, found.size, found.value, many, new, cost


def markdown(found: Sequence[files.Experiment]) -> str:
    """The tables of docs/experiments.md, one per paper; what was checked changes too often."""
    lines = []
    for paper, title in files.PAPERS.items():
        lines += [f"### {title}", "", f"| {' | '.join(_COLUMNS)} |"]
        lines.append(f"|{'---|' * 5}{'---:|' * 3}")
        for each in found:
            if each.paper == paper:
                name, *rest = cells(each)
                lines.append(f"| {' | '.join((each.title, f'`{name}`', *rest))} |")
        lines.append("")
    return "\n".join(lines).rstrip()

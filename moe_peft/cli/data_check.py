"""`data check`: are files of benchmarks, or a user's own, whole, readable, and free of leaks?"""

from collections.abc import Mapping, Sequence
import functools
import json
import pathlib
import types
from typing import Any

import rich.box
import rich.table

from moe_peft import errors
from moe_peft.cli import flags
from moe_peft.data import file_places, files, roots, samples, vocabularies
from moe_peft.data.checking import check, own, parts
from moe_peft.runtime import progress as progress_lib
from moe_peft.runtime import tables

SUITE = "embedded:cldr"
_SHOWN = 8  # findings of one rule in the table; JSON has all


def run(
    root: str,
    benchmarks: Sequence[str] = (),
    with_hashes: bool = True,
    ignored: Sequence[str] = (),
    as_json: bool = False,
    own_flags: Mapping[str, Any] = types.MappingProxyType({}),
) -> int:
    """Checks files and prints what was found; 1 if a rule that is not ignored fails, else 0.

    Args:
      root: as DATA_DIR: holds superni/, crossfit/ or p3/; "embedded:samples"; or "embedded:cldr"
        for the suite. Or a file, or a folder, with rows of the user's own.
      benchmarks: names of those that must be there; default: all that are.
      with_hashes: hash every file.
      ignored: rules of `check.FAILING` that do not count as a failure.
      as_json: print JSON and no tables.
      own_flags: values of the flags that are for rows of the user's own, None where not given.
    """
    given = {name: value for name, value in own_flags.items() if value is not None}
    is_own = file_places.are_files(root)
    _check_flags(root, is_own, benchmarks, list(given))
    for rule in ignored:
        errors.check_one_of("--ignore", rule, check.FAILING)
    found = [_check_own(root, given)] if is_own else []
    for name, folder in () if is_own else _folders(root, benchmarks).items():
        progress = functools.partial(_counted, f"check {name}")
        found.append(check.check(name, folder, with_hashes, progress))
    if as_json:
        print(json.dumps(check.as_json(found, ignored), indent=2, ensure_ascii=False))
    else:
        show(found, ignored)
    return int(any(benchmark.failures(ignored) for benchmark in found))


def _check_flags(place: str, is_own: bool, benchmarks: Sequence[str], names: Sequence[str]) -> None:
    if is_own and benchmarks:
        raise errors.UserError(f"--benchmark is for a folder of benchmarks; {place} is none.")
    if names and not is_own:
        raise errors.UserError(f"--{names[0]} is for rows of your own; {place} has none.")


def _check_own(place: str, given: dict[str, Any]) -> check.Benchmark:
    name = flags.vocabulary_of(given.pop("backbone", None), given.pop("vocabulary", None))
    limits = dict(files.LONGEST)
    for side in limits:
        if (limit := given.pop(f"max_{side}", None)) is not None:
            errors.check_at_least(f"--max_{side}", limit, 2)
            if name is None:
                raise errors.UserError(f"--max_{side} needs --backbone or --vocabulary.")
            limits[side] = limit
    rows = files.Files(place, eval_fraction=0, **given)
    return own.check(rows, name and vocabularies.get(name), limits)


def _counted(what: str, listed: Sequence[parts.Part]):
    with progress_lib.shown(what, len(listed)) as progress:
        for part in listed:
            yield part
            progress.advance(1)


def _folders(root: str, benchmarks: Sequence[str]) -> dict[str, pathlib.Path | None]:
    if root == SUITE:
        return {"cldr": None}
    for name in benchmarks:
        errors.check_one_of("--benchmark", name, roots.LAYOUT)
    top = samples.folder() if root == roots.SAMPLES else pathlib.Path(root).expanduser()
    found = {name: top / name for name in benchmarks or roots.LAYOUT}
    there = {name: folder for name, folder in found.items() if folder.is_dir()}
    if not there or (benchmarks and len(there) < len(found)):
        name = next(name for name in found if name not in there)
        known = f"A data folder holds {', '.join(f'{n}/' for n in roots.LAYOUT)}, or some of them."
        expected = f"expected {roots.LAYOUT[name]}"
        raise errors.UserError(f"There is no folder {found[name]}; {expected}. {known}")
    return there


def show(found: Sequence[check.Benchmark], ignored: Sequence[str] = ()) -> None:
    """Prints what is there, then what is wrong."""
    console = tables.wide_console(140)
    for benchmark in found:
        counted = ("tasks", "missing", "examples", "duplicates", "files", "MB", "SHA-256 of all")
        table = _table(benchmark.name, "examples of", *counted)
        for group in benchmark.groups.values():
            counts = (len(group.tasks), group.missing, group.examples, group.duplicates)
            size = f"{group.size / 1e6:.1f}"
            numbers = [f"{count:,}" for count in (*counts, len(group.files))]
            table.add_row(f"{group.group} tasks, {group.split}", *numbers, size, group.digest)
        console.print(table)
        _show_findings(console, benchmark, ignored)


def _show_findings(console, benchmark: check.Benchmark, ignored: Sequence[str]) -> None:
    for rule, meaning in check.RULES.items():
        of_rule = [finding for finding in benchmark.findings if finding.rule == rule]
        if not of_rule:
            continue
        fails = rule in check.FAILING and rule not in ignored
        title = f"{rule}: {meaning} ({'fails' if fails else 'for information'})"
        table = _table(title, "where", "count")
        table.add_column("what", overflow="fold")
        for finding in of_rule[:_SHOWN]:
            table.add_row(finding.where, f"{finding.count:,}", finding.message)
        if rest := of_rule[_SHOWN:]:
            count = sum(finding.count for finding in rest)
            table.add_row(f"and {len(rest)} more", f"{count:,}", "all of them with --json")
        console.print(table)
    failures = benchmark.failures(ignored)
    verdict = f"{failures} findings to fix" if failures else "nothing to fix"
    console.print(f"{benchmark.name}: {verdict}\n", highlight=False)


def _table(title: str, first: str, *numbers: str) -> rich.table.Table:
    table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, title_justify="left")
    table.add_column(first, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right")
    return table

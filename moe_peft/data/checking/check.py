"""Reads all that a benchmark needs, once, and says what is wrong with it."""

import array
import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import hashlib
import itertools
import pathlib

import numpy as np

from moe_peft import errors
from moe_peft.data import bad_rows
from moe_peft.data.checking import fingerprints, parts

# Rules, and whether a check fails by them.
RULES = {
    "missing": "a file that a task needs is not there, or not all of it",
    "damaged": "a file or a row cannot be read",
    "leak": "an input to train on is an input that scores are made of",
    "duplicate": "an input comes twice in one part of a task",
    "conflict": "an input comes again with another answer",
    "long": "a row is longer than the limit, and is cut",
    "count": "a task has other numbers of examples than published",
    "hash": "a file is not the published one",
    "optional": "a task outside the benchmark's core is not there",
}
FAILING = ("missing", "damaged", "leak")
_CHUNK = 4096


@dataclasses.dataclass
class Finding:
    """What a rule found."""

    rule: str  # one of `RULES`
    where: str  # file, or task
    message: str  # one line
    count: int = 1  # of rows or examples it is about


@dataclasses.dataclass
class Group:
    """Parts of a benchmark that are used alike."""

    group: str  # "training" or "held-out"
    split: str  # name, without sample seeds
    tasks: set[str] = dataclasses.field(default_factory=set)  # those that are there
    missing: int = 0  # number of those that are not
    examples: int = 0
    duplicates: int = 0  # inputs that came before in their part
    files: dict[str, str] = dataclasses.field(default_factory=dict)  # name: SHA-256, or ""
    size: int = 0  # bytes of the files

    @property
    def digest(self) -> str:
        """Of the hashes of all files; the same files give the same on every machine."""
        if not all(self.files.values()):
            return ""
        listed = "".join(f"{name} {value}\n" for name, value in sorted(self.files.items()))
        return hashlib.sha256(listed.encode()).hexdigest()[:16] if listed else ""

    def as_json(self) -> dict[str, object]:
        """Everything, for other programs."""
        found = dataclasses.asdict(self) | {"tasks": len(self.tasks), "digest": self.digest}
        found["bytes"] = found.pop("size")
        return found


@dataclasses.dataclass
class Benchmark:
    """What is known of one benchmark."""

    name: str
    groups: dict[tuple[str, str], Group] = dataclasses.field(default_factory=dict)
    findings: list[Finding] = dataclasses.field(default_factory=list)

    def failures(self, ignored: Sequence[str] = ()) -> int:
        """Number of findings that a check fails by."""
        return sum(f.rule in FAILING and f.rule not in ignored for f in self.findings)


def check(
    name: str,
    folder: pathlib.Path | None,
    with_hashes: bool = True,
    progress: Callable[[Iterable[parts.Part]], Iterable[parts.Part]] = iter,
) -> Benchmark:
    """Checks the benchmark `name` in a folder; nothing is raised for its files.

    `with_hashes` reads every file a second time for its SHA-256. Memory: the fingerprints of all
    reported examples, and of one part at a time.
    """
    found = Benchmark(name)
    try:
        listed = list(parts.BENCHMARKS[name](folder))
    except (errors.UserError, OSError) as problem:
        found.findings.append(Finding("missing", str(folder), str(problem)))
        return found
    reported = fingerprints.Reported()
    leaks: dict[tuple[str, str], _Leak] = {}
    # What scores are made of comes first, to be compared with.
    for part in progress(sorted(listed, key=lambda part: not part.is_reported)):
        key = (part.group, part.split.split("_")[0])
        group = found.groups.setdefault(key, Group(*key))
        if _has_files(part, group, found, folder, with_hashes):
            group.tasks.add(part.task)
            _read(part, group, found, reported, leaks)
    order = (parts.TRAINING, parts.HELD_OUT)
    found.groups = dict(sorted(found.groups.items(), key=lambda item: order.index(item[0][0])))
    found.findings += [leak.finding(*tasks) for tasks, leak in leaks.items()]
    return found


def _has_files(part, group, found, folder, with_hashes) -> bool:
    try:
        files = list(part.files())
        if absent := [path for path in files if not path.is_file()]:
            raise errors.UserError(f"There is no file {absent[0]}.")
    except (errors.UserError, OSError) as problem:
        group.missing += 1
        rule = "optional" if part.is_optional else "missing"
        found.findings.append(Finding(rule, f"{part.task} ({part.split})", str(problem)))
        return False
    for path in files:
        name = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)
        if name not in group.files:
            group.size += path.stat().st_size
            group.files[name] = _hash(path, "sha256") if with_hashes else ""
            if with_hashes and part.md5 and _hash(path, "md5") != part.md5:
                found.findings.append(Finding("hash", str(path), f"its MD5 is not {part.md5}"))
    return True


def _hash(path: pathlib.Path, algorithm: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


@dataclasses.dataclass
class _Leak:
    count: int = 0
    same_answer: int = 0
    text: str = ""

    def finding(self, task: str, held_out: str) -> Finding:
        whose = "its own reported ones" if task == held_out else f"reported ones of {held_out}"
        message = (
            f"{self.count} inputs are {whose}, {self.same_answer} of them with the same answer; "
            f"for example {self.text!r}"
        )
        return Finding("leak", task, message, self.count)


def _read(part, group, found, reported, leaks) -> None:
    inputs, pairs = array.array("Q"), array.array("Q")
    examples = iter(part.read())
    with bad_rows.skipping(), bad_rows.counting() as skipped:
        try:
            while chunk := list(itertools.islice(examples, _CHUNK)):
                prints = [fingerprints.of_example(example) for example in chunk]
                inputs.extend(first for first, _ in prints)
                if part.is_reported:
                    pairs.extend(second for _, second in prints)
                else:
                    _find_leaks(part, chunk, np.array(prints, np.uint64), reported, leaks)
        except (errors.UserError, OSError) as problem:
            found.findings.append(Finding("damaged", part.task, str(problem)))
    found.findings += [Finding("damaged", *row, count) for row, count in skipped.items()]
    if part.is_reported:
        reported.add(part.task, inputs, pairs)
    group.examples += len(inputs)
    again = len(inputs) - len(np.unique(np.frombuffer(inputs, np.uint64))) if inputs else 0
    where = f"{part.task} ({part.split})"
    if again:
        group.duplicates += again
        message = f"{again} of {len(inputs)} inputs came before"
        found.findings.append(Finding("duplicate", where, message, again))
    if part.published is not None and part.published != len(inputs):
        message = f"{len(inputs)} examples, {part.published} are published"
        found.findings.append(Finding("count", where, message, abs(len(inputs) - part.published)))


def _find_leaks(part, chunk, prints, reported, leaks) -> None:
    for place, held_out, is_same in reported.find(prints[:, 0], prints[:, 1]):
        # Nothing trains on the shots of another held-out task.
        if part.group == parts.HELD_OUT and part.task != held_out:
            continue
        leak = leaks.setdefault((part.task, held_out), _Leak())
        leak.count += 1
        leak.same_answer += is_same
        leak.text = leak.text or fingerprints.normalise(chunk[place].input)[:80]


def as_json(found: Sequence[Benchmark], ignored: Sequence[str] = ()) -> Mapping[str, object]:
    """Everything, for other programs."""
    totals = collections.Counter(f.rule for b in found for f in b.findings)
    return {
        "failures": sum(benchmark.failures(ignored) for benchmark in found),
        "rules": {rule: totals[rule] for rule in RULES},
        "ignored": list(ignored),
        "benchmarks": {
            benchmark.name: {
                "groups": [group.as_json() for group in benchmark.groups.values()],
                "findings": [dataclasses.asdict(finding) for finding in benchmark.findings],
            }
            for benchmark in found
        },
    }

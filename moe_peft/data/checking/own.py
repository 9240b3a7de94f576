"""What can be wrong with a user's own rows, said before anything trains on them."""

from collections.abc import Collection, Mapping, Sequence
import dataclasses
import itertools
from typing import Any

from moe_peft.data import bad_rows, files, vocabularies
from moe_peft.data.checking import fingerprints

# Rules, and whether a check fails by them.
RULES = {
    "damaged": "a row cannot be read, and stops a run",
    "leak": "a question to evaluate on is one to train on",
    "conflict": "a question comes again with another answer",
    "duplicate": "a question comes again with the same answer",
    "long": "a row is longer than the limit, and is cut",
}
FAILING = ("damaged", "leak")
_ROWS = 5  # that a finding names
_CHUNK = 1000


@dataclasses.dataclass
class Finding:
    """What a rule found in one file."""

    rule: str  # one of `RULES`
    where: str  # the file
    message: str
    count: int = 0  # rows
    rows: list[str] = dataclasses.field(default_factory=list)  # the first few


@dataclasses.dataclass
class Split:
    """What there is of one split."""

    rows: int = 0  # that can be read
    damaged: int = 0
    longest: dict[str, int] = dataclasses.field(default_factory=dict)  # tokens, end marks included


@dataclasses.dataclass
class Checked:
    """What is known of a user's rows."""

    splits: dict[str, Split] = dataclasses.field(default_factory=dict)
    findings: list[Finding] = dataclasses.field(default_factory=list)

    def failures(self, ignored: Collection[str] = ()) -> int:
        """Number of findings that a check fails by."""
        return sum(f.rule in FAILING and f.rule not in ignored for f in self.findings)

    def add(self, rule: str, where: object, message: str, row: str) -> None:
        """Counts one row."""
        key = (rule, str(where), message)
        same = (f for f in self.findings if (f.rule, f.where, f.message) == key)
        if (finding := next(same, None)) is None:
            self.findings.append(finding := Finding(*key))
        finding.count += 1
        finding.rows += [row] if len(finding.rows) < _ROWS else []

    def as_json(self, ignored: Sequence[str] = ()) -> dict[str, Any]:
        """Everything, for other programs."""
        return {"failures": self.failures(ignored), "ignored": list(ignored)} | dataclasses.asdict(
            self
        )


def check(
    own: files.Files,
    vocabulary: vocabularies.Vocabulary | None = None,
    limits: Mapping[str, int] = files.LONGEST,
) -> Checked:
    """Reads all rows once. Questions are the same but for case and white space, in one task.

    Without a vocabulary, nothing is compared with `limits`, tokens of "inputs" and "targets".
    Raises UserError: a file or a column is not there, or a file cannot be read at all.
    """
    found, trained = Checked(), {}
    for split in sorted(own.files, key=lambda split: split != files.TRAIN):
        own.check_columns(own.files[split])
        counts = found.splits[split] = Split()
        seen: dict[int, tuple[int, str]] = {}  # by question: the answers, and where
        with bad_rows.skipping() as first, bad_rows.counting() as skipped:
            examples = own.examples(split)
            while part := list(itertools.islice(examples, _CHUNK)):
                counts.rows += len(part)
                for example in part:
                    _compare(example, seen, trained, found)
                if vocabulary is not None:
                    _measure(part, vocabulary, limits, counts, found)
        for (path, reason), count in skipped.items():
            rows = [row.row for row in first[path, reason]]
            found.findings.append(Finding("damaged", path, reason, count, rows))
        counts.damaged = sum(skipped.values())
        if split == files.TRAIN:
            trained = seen
    found.findings.sort(key=lambda finding: list(RULES).index(finding.rule))
    return found


def _compare(example: files.Example, seen, trained, found: Checked) -> None:
    asked, here = example.question, f"{example.path.name} {example.place}"
    text = f"{asked.task}\0{fingerprints.normalise(asked.inputs)}"
    accepted = sorted(map(fingerprints.normalise, example.references or (example.targets,)))
    question, answers = map(fingerprints.of_text, (text, "\0".join(accepted)))
    if question in trained:
        before, there = trained[question]
        answer = "the same answer" if before == answers else "another answer"
        message = f"trained with {answer}"
        found.add("leak", example.path, message, f"{example.place} (as {there})")
    before, there = seen.setdefault(question, (answers, here))
    if there != here:
        rule = "duplicate" if before == answers else "conflict"
        found.add(rule, example.path, RULES[rule], f"{example.place} (as {there})")


def _measure(part, vocabulary, limits, counts: Split, found: Checked) -> None:
    sides = {"inputs": [e.question.inputs for e in part], "targets": [e.targets for e in part]}
    for name, texts in sides.items():
        lengths = [len(ids) + 1 for ids in vocabulary.encode_all(texts)]
        counts.longest[name] = max(counts.longest.get(name, 0), *lengths)
        for example, length in zip(part, lengths, strict=True):
            if length > limits[name]:
                message = f"more than {limits[name]} tokens of {name}"
                found.add("long", example.path, message, f"{example.place} ({length})")

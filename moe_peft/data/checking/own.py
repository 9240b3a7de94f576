"""What can be wrong with a user's own rows, said before anything trains on them."""

from collections.abc import Mapping
import dataclasses
import itertools

from moe_peft.data import bad_rows, files, vocabularies
from moe_peft.data.checking import check as check_lib
from moe_peft.data.checking import fingerprints, parts

_ROWS = 5  # that a finding names
_CHUNK = 1000


@dataclasses.dataclass
class _Seen:
    """What has been read: the answers to each question, and where it stands."""

    findings: dict[tuple[str, str, str], check_lib.Finding] = dataclasses.field(
        default_factory=dict
    )
    trained: dict[int, tuple[int, str]] = dataclasses.field(default_factory=dict)
    split: dict[int, tuple[int, str]] = dataclasses.field(default_factory=dict)

    def add(self, rule: str, where: object, message: str, row: str) -> None:
        """Counts a row, and names it if it is one of the first."""
        key = (rule, str(where), message)
        finding = self.findings.setdefault(key, check_lib.Finding(*key, count=0))
        finding.count += 1
        if finding.count <= _ROWS:
            finding.message += f"{':' if finding.count == 1 else ','} {row}"


def check(
    own: files.Files,
    vocabulary: vocabularies.Vocabulary | None = None,
    limits: Mapping[str, int] = files.LONGEST,
) -> check_lib.Benchmark:
    """Reads all rows once. Questions are the same but for case and white space, in one task.

    Without a vocabulary, nothing is compared with `limits`, tokens of "inputs" and "targets".
    Raises UserError: a file or a column is not there, or a file cannot be read at all.
    """
    found, seen = check_lib.Benchmark(str(own)), _Seen()
    for split in sorted(own.files, key=lambda split: split != files.TRAIN):
        own.check_columns(own.files[split])
        key = (parts.TRAINING if split == files.TRAIN else parts.HELD_OUT, split)
        sizes = {str(path): path.stat().st_size for path in own.files[split]}
        group = check_lib.Group(*key, set(own.names), files=dict.fromkeys(sizes, ""))
        group.size = sum(sizes.values())
        found.groups[key] = group
        with bad_rows.skipping() as first, bad_rows.counting() as skipped:
            examples = own.examples(split)
            while part := list(itertools.islice(examples, _CHUNK)):
                group.examples += len(part)
                group.duplicates += sum(_is_again(example, seen) for example in part)
                if vocabulary is not None:
                    _measure(part, vocabulary, limits, seen)
        for (path, reason), count in skipped.items():
            named = ", ".join(row.row for row in first[path, reason])
            found.findings.append(check_lib.Finding("damaged", path, f"{reason}: {named}", count))
        if split == files.TRAIN:
            seen.trained = seen.split
        seen.split = {}
    found.findings += seen.findings.values()
    return found


def _is_again(example: files.Example, seen: _Seen) -> bool:
    asked, here = example.question, f"{example.path.name} {example.place}"
    text = f"{asked.task}\0{fingerprints.normalise(asked.inputs)}"
    accepted = sorted(map(fingerprints.normalise, example.references or (example.targets,)))
    question, answers = map(fingerprints.of_text, (text, "\0".join(accepted)))
    if question in seen.trained:
        before, there = seen.trained[question]
        message = f"trained with {'the same' if before == answers else 'another'} answer"
        seen.add("leak", example.path, message, f"{example.place} (as {there})")
    before, there = seen.split.setdefault(question, (answers, here))
    if there == here:
        return False
    rule = "duplicate" if before == answers else "conflict"
    seen.add(rule, example.path, "came before", f"{example.place} (as {there})")
    return True


def _measure(part, vocabulary, limits, seen: _Seen) -> None:
    sides = {"inputs": [e.question.inputs for e in part], "targets": [e.targets for e in part]}
    for name, texts in sides.items():
        for example, ids in zip(part, vocabulary.encode_all(texts), strict=True):
            if len(ids) >= limits[name]:
                message = f"more than {limits[name]} tokens of {name}"
                seen.add("long", example.path, message, f"{example.place} ({len(ids) + 1})")

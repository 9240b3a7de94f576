"""Averages of answers on disk, by any rule, group, metric and bootstrap; no model is needed.

    moe-peft aggregate results/mov --average groups --group 'p3_(.*?)(?:_r[123])?'
    moe-peft aggregate results/superni --metric exact_match_normalized --bootstrap tasks

An evaluation that was interrupted is averaged over the tasks that are finished.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import json
import pathlib
import sys
from typing import Any

from moe_peft import errors
from moe_peft.adaptation import report as report_lib
from moe_peft.evaluation import aggregation, answer_cache, metrics, questions, table
from moe_peft.evaluation import bootstrap as bootstrap_lib
from moe_peft.reports import compare_adapted
from moe_peft.runtime import json_files

RESULTS, TABLE, PREDICTIONS = "results.json", "table.md", "predictions.jsonl"


@dataclasses.dataclass(frozen=True)
class Changes:
    """What differs from the evaluation's own settings; None keeps them."""

    average: str | None = None  # rule of the overall number
    group: str | None = None  # regular expression: its first parenthesis finds a task's group
    metric: str | None = None  # of answers in text
    bootstrap: bootstrap_lib.Bootstrap | None = None  # how intervals are found

    def __post_init__(self):
        if self.average is not None:
            errors.check_one_of("--average", self.average, aggregation.AVERAGES)
        if self.metric is not None:
            metrics.get(self.metric)
        if self.group is not None:
            questions.compile_group(self.group)

    def settings(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """Those of an evaluation with these changes."""
        changed = {"average": self.average, "metric": self.metric}
        if self.bootstrap is not None:
            changed["bootstrap"] = dataclasses.asdict(self.bootstrap)
        return {**own, **{name: value for name, value in changed.items() if value is not None}}

    def row(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row of predictions with these changes; a UserError if there is no text to score."""
        if self.group is not None:
            group = questions.group_of(row["task"], questions.compile_group(self.group))
            row = {**row, "group": group}
        if self.metric in (None, row["metric"]) or row["metric"] == metrics.BY_RANK:
            return row
        if row["prediction"] is None:
            raise errors.UserError(
                f"{row['task']!r} was answered by one forward pass, so there is no text to score "
                f"by {self.metric!r}; evaluate with --gin.Evaluator.decoding=@decoding.Greedy()."
            )
        metric = metrics.get(self.metric)
        score = metrics.score_example(metric, row["prediction"], metrics.references_of(row))
        return {**row, "metric": metric.name, "score": score}


def aggregate(folder: pathlib.Path, changes: Changes, out: pathlib.Path | None) -> None:
    """Prints the tables of a folder: of a run that was evaluated, or of an adaptation.

    The folder `out` gets results.json and table.md, laid out as in `folder`, so that `moe-peft
    compare` reads it; None writes nothing. Raises UserError if there are no answers, or they do
    not allow a change.
    """
    is_adaptation = compare_adapted.is_adaptation(folder)
    tables = [_adaptation(folder, changes)] if is_adaptation else [*_evaluations(folder, changes)]
    if not tables:
        raise errors.UserError(
            f"{folder} holds no answers (eval/*/{answer_cache.RECORD}, or {RESULTS} and "
            f"{PREDICTIONS}); make them with `moe-peft eval` or `moe-peft adapt`."
        )
    for place, content, text in tables:
        print(text)
        if out is not None:
            json_files.write_json(out / place / RESULTS, content)
            json_files.write_text(out / place / TABLE, text)
            print(f"Written to {out / place}.", file=sys.stderr)


_Table = tuple[pathlib.Path, dict[str, Any], str]  # (folder below, results.json, table.md)


def _evaluations(folder: pathlib.Path, changes: Changes) -> Iterator[_Table]:
    for path in sorted(folder.glob(f"eval/*/{answer_cache.RECORD}")):
        record = answer_cache.read_record(path.parent)
        rows = [changes.row(row) for row in answer_cache.read_all(path.parent, record["tasks"])]
        settings = changes.settings(record["settings"])
        how = settings["bootstrap"] and bootstrap_lib.Bootstrap(**settings["bootstrap"])
        if num_left := record["num_tasks"] - len(record["tasks"]):
            what = f"{num_left} of {record['num_tasks']} tasks of {record['mixture']}"
            print(f"WARNING: {what} are not answered yet.", file=sys.stderr)
        content = {"mixture": record["mixture"], "run": record["run"], "settings": settings}
        content["results"] = aggregation.aggregate(rows, settings["average"], how).to_json()
        run = table.Run(record["run"]["method"]["name"], content)
        yield path.parent.relative_to(folder), content, table.markdown([run])


def _adaptation(folder: pathlib.Path, changes: Changes) -> _Table:
    if changes.average not in (None, "tasks"):
        why = f"but {folder} is an adaptation: there, tasks count equally"
        raise errors.UserError(f"--average is {changes.average!r}, {why}.")
    content = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    rows = [changes.row(row) for row in json_files.read_jsonl(folder / PREDICTIONS)]
    asked = changes.bootstrap and dataclasses.asdict(changes.bootstrap)
    how = asked or content.get("bootstrap")
    evaluation = content["settings"]["evaluation"]
    evaluation["metric"] = changes.metric or evaluation["metric"]
    found = report_lib.summarize_rows(rows, how and bootstrap_lib.Bootstrap(**how))
    content = {**content, "bootstrap": how, **found}
    return pathlib.Path(), content, report_lib.markdown(content)

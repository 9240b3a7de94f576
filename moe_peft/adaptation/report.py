"""From scores of (task, seed) runs to numbers with names: means and spreads over seeds and tasks.

Pure functions over rows, so that every number can be recomputed from `predictions.jsonl`. The
papers differ in what they average first and take the spread of; here each number says what it is.
All scores are shares in [0, 1].
"""

from collections.abc import Iterable, Mapping, Sequence
import statistics
from typing import Any

import numpy as np

from moe_peft.evaluation import aggregation
from moe_peft.evaluation import bootstrap as bootstrap_lib

Row = Mapping[str, Any]


def run_scores(rows: Iterable[Row]) -> dict[tuple[str, int], float]:
    """Score of the examples of every (task, seed), by the metric of its rows."""
    found: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row["task"], row["seed"]), []).append(row)
    return {run: bootstrap_lib.Examples.from_rows(own).score() for run, own in found.items()}


def summarize_rows(
    rows: Sequence[Row], bootstrap: bootstrap_lib.Bootstrap | None = None
) -> dict[str, Any]:
    """What is reported, from the rows of `predictions.jsonl` with "group": as `summarize`.

    Every line also has "metric", None where its tasks have several, and "mean_interval", that of
    the mean over seeds, None without `bootstrap`, whose "templates" are seeds.
    """
    found = summarize(run_scores(rows), {row["task"]: row["group"] for row in rows})
    by_seed = ({**row, "template": row["seed"]} for row in rows)
    sure = aggregation.aggregate(by_seed, bootstrap=bootstrap)
    lines = [(found["overall"], sure.overall)]
    for part in ("groups", "tasks"):
        lines += [(line, getattr(sure, part)[name]) for name, line in found[part].items()]
    for line, summary in lines:
        line |= {"metric": summary.metric, "mean_interval": summary.mean_interval}
    return found


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, median, and iqr and std (of the sample, n - 1), which are None for a single number."""
    several = len(values) > 1
    low, high = np.percentile(values, [25, 75])
    return {
        "mean": statistics.fmean(values),
        "median": statistics.median(values),
        "iqr": float(high - low) if several else None,
        "std": statistics.stdev(values) if several else None,
    }


def summarize(scores: Mapping[tuple[str, int], float], groups: Mapping[str, str]) -> dict[str, Any]:
    """What is reported about the runs of one method, from the scores of every (task, seed).

    "tasks" have their scores "by_seed" and the `spread` of these "over_seeds". "overall" and the
    "groups" that tasks are reported under have "by_seed", for each seed the mean over tasks;
    "over_seeds", the `spread` of these means; "mean_of_task_medians", the mean over tasks of the
    median over seeds (MHR's tables).
    """
    seeds = sorted({seed for _, seed in scores})
    tasks = list(dict.fromkeys(task for task, _ in scores))
    missing = [(t, s) for t in tasks for s in seeds if (t, s) not in scores]
    if missing:
        raise ValueError(f"{len(missing)} runs are missing, the first is {missing[0]}.")
    by_task = {
        task: {
            "group": groups[task],
            "by_seed": {str(seed): scores[task, seed] for seed in seeds},
            "over_seeds": spread([scores[task, seed] for seed in seeds]),
        }
        for task in tasks
    }

    def average(members: Sequence[str]) -> dict[str, Any]:
        by_seed = {seed: statistics.fmean(scores[t, seed] for t in members) for seed in seeds}
        medians = [by_task[task]["over_seeds"]["median"] for task in members]
        return {
            "num_tasks": len(members),
            "by_seed": {str(seed): value for seed, value in by_seed.items()},
            "over_seeds": spread(list(by_seed.values())),
            "mean_of_task_medians": statistics.fmean(medians),
        }

    names = list(dict.fromkeys(groups[task] for task in tasks))
    return {
        "overall": average(tasks),
        "groups": {name: average([t for t in tasks if groups[t] == name]) for name in names},
        "tasks": by_task,
    }


def markdown(results: Mapping[str, Any]) -> str:
    """The table of one adaptation, in per cent."""
    seeds = list(results["overall"]["by_seed"])
    head = ["", "tasks", "mean", "median", "IQR", "std", *(f"seed {seed}" for seed in seeds)]
    head += ["interval", "metric"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    overall, how = results["overall"], results.get("bootstrap")

    def line(name: str, found: Mapping[str, Any]) -> str:
        over = found["over_seeds"]
        numbers = [over[key] for key in ("mean", "median", "iqr", "std")]
        numbers += [found["by_seed"][seed] for seed in seeds]
        low_high = map(_percent, found.get("mean_interval") or ())
        more = [" to ".join(low_high), (found.get("metric") or "").replace("_", " ")]
        cells = [name, str(found["num_tasks"]), *map(_percent, numbers), *more]
        return "| " + " | ".join(cells) + " |"

    lines += [line(*each) for each in (("**all tasks**", overall), *results["groups"].items())]
    note = (
        f"Per cent. mean, median, IQR and std are over {len(seeds)} seeds, of each seed's mean "
        "over the tasks of the line; std is that of a sample (n - 1). Mean over tasks of the "
        f"median over seeds: {_percent(overall['mean_of_task_medians'])}."
    )
    if how:
        note += (
            f" Intervals of the mean: {100 * how['level']:g} % of {how['resamples']} bootstrap "
            f"resamples over {how['over'].replace('templates', 'seeds')}."
        )
    return "\n".join([*lines, "", note])


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"

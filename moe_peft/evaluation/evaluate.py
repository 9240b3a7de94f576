"""`evaluate`: a trained run, or a bare backbone, over tasks and templates; results on disk."""

import dataclasses
import pathlib
import sys
import time
from typing import Any

from moe_peft.config import settings as settings_lib
from moe_peft.data import lookup
from moe_peft.evaluation import aggregation, answer_cache, questions, table
from moe_peft.evaluation import evaluator as evaluator_lib
from moe_peft.models import special_ids
from moe_peft.partitioning import mesh as mesh_lib
from moe_peft.runtime import digest, json_files
from moe_peft.runtime import progress as progress_lib
from moe_peft.training import restore

# Batches of answers that an interruption loses at most, but for larger tasks.
_BATCHES_OF_A_PART = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(restore.Settings):
    """Of `evaluate`."""

    evaluator: evaluator_lib.Evaluator  # what is asked and how
    # Folder of a multi-task run that `method` (made by `methods.transferred`) takes its parameters
    # from, to evaluate them before any further step; `model_dir` only gets results. For any other
    # method, a run of it or the file it was exported to.
    start_from: str | None = None


@settings_lib.entry_point(Settings, "evaluate", module="evaluation")
def evaluate(settings: Settings) -> dict[str, Any]:
    """Evaluates a run on every mixture of `evaluator` and prints a table.

    Into `model_dir`/eval/<mixture> go `results.json` (settings, averages, what the run is),
    `table.md` and, task by task, `predictions/<task>.jsonl` (every example). Each appears when it
    is complete. Tasks that the same model has answered before, with the same settings, are not
    asked again; other answers are replaced. Returns {mixture: the content of its results.json}.

    Raises UserError: a setting, the run, the data or the folder is wrong.
    """
    evaluator = settings.evaluator
    mesh = mesh_lib.make_mesh() if settings.mesh is None else settings.mesh
    mesh_lib.check_batch_size(evaluator.batch_size, 1, mesh)
    root = pathlib.Path(settings.model_dir).expanduser() / "eval"
    folders = {mixture: root / str(mixture) for mixture in evaluator.mixtures}
    for mixture, folder in folders.items():  # Mistakes show before anything is loaded.
        json_files.check_writable(folder)
        ids = special_ids.of(settings.model)
        lookup.check_vocabulary(mixture, settings.model.config.vocab_size, ids)
        evaluator.questions_of(mixture)
    restored = restore.model(settings, evaluator.batch_shapes(), mesh, settings.start_from)
    # Answers are kept for these very parameters, whatever their folder is called.
    run = {**restored.run, "parameters_sha256": digest.of_tree(restored.params)}
    restored = dataclasses.replace(restored, run=run)
    return {
        str(mixture): _evaluate_mixture(settings, restored, mixture, folder)
        for mixture, folder in folders.items()
    }


def _evaluate_mixture(
    settings: Settings, restored: restore.Restored, mixture: lookup.Mixture, folder: pathlib.Path
) -> dict[str, Any]:
    """Asks, averages, writes and prints; returns the content of results.json."""
    evaluator, num_cut = settings.evaluator, sum(settings.evaluator.questions_of(mixture).is_cut)
    rows, seconds = _answer(evaluator, restored, mixture, folder)
    results = aggregation.aggregate(rows, evaluator.average, evaluator.bootstrap)
    found = {
        "mixture": str(mixture),
        "run": dict(restored.run),
        "settings": evaluator.settings,
        "num_cut_targets": num_cut,
        "seconds": seconds,
        "results": results.to_json(),
    }
    json_files.write_json(folder / "results.json", found)
    runs = [table.Run(settings.method.name, found)]
    json_files.write_text(folder / "table.md", table.markdown(runs))
    table.show(runs)
    if num_cut:
        print(
            f"WARNING: {num_cut} of {len(rows)} targets are longer than "
            f"{evaluator.feature_lengths['targets']} tokens and count as wrong wherever exact "
            "match is asked for.",
            file=sys.stderr,
        )
    print(f"Written to {folder}.", file=sys.stderr)
    return found


def _answer(evaluator, restored, mixture, folder) -> tuple[list[questions.Row], float]:
    """(rows of a mixture, seconds they took); what is new is kept part by part."""
    asked, rows, num_known = evaluator.questions_of(mixture), [], 0
    num_tasks = len(asked.tasks())
    kept = answer_cache.Answers(folder, str(mixture), num_tasks, restored.run, evaluator.settings)
    with progress_lib.shown(str(mixture), len(asked.rows)) as progress:
        # Whole tasks, so many that batches of similar length are mostly full.
        for part in asked.parts(_BATCHES_OF_A_PART * evaluator.batch_size):
            started = time.monotonic()
            digests = {task: asked.digest(places) for task, places in part.items()}
            known = {task: kept.read(task, digest) for task, digest in digests.items()}
            places = [place for members in part.values() for place in members]
            if all(found is not None for found in known.values()):
                old = [row for found in known.values() for row in found]
                new = [{**row, **asked.rows[i]} for row, i in zip(old, places, strict=True)]
                num_known, seconds = num_known + len(places), 0.0
                progress.advance(len(places))
            else:
                new = evaluator.predict(restored.model, restored.params, mixture, progress, places)
                seconds = time.monotonic() - started
            by_place = dict(zip(places, new, strict=True))
            found = {task: (digests[task], [by_place[i] for i in part[task]]) for task in part}
            kept.write(found, seconds)
            rows += new
    if num_known:
        print(
            f"{mixture}: {num_known} of {len(rows)} examples were answered before, by the same "
            f"model with the same settings. To ask them again, remove {folder}.",
            file=sys.stderr,
        )
    return rows, kept.seconds

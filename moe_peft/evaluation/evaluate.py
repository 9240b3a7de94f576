"""`evaluate`: a trained run, or a bare backbone, over tasks and templates; results on disk."""

import dataclasses
import pathlib
import sys
import time
from typing import Any

from flax import linen as nn
import gin
import jax

from moe_peft import methods
from moe_peft.evaluation import answer_cache, questions, table
from moe_peft.evaluation import evaluator as evaluator_lib
from moe_peft.partitioning import mesh as mesh_lib
from moe_peft.runtime import digest, json_files
from moe_peft.runtime import progress as progress_lib
from moe_peft.training import restore


@gin.register(module="evaluation")
def evaluate(
    model: nn.Module = gin.REQUIRED,
    method: methods.Method = gin.REQUIRED,
    backbone: str = gin.REQUIRED,
    model_dir: str = gin.REQUIRED,
    evaluator: evaluator_lib.Evaluator = gin.REQUIRED,
    step: int | None = None,
    frozen_dtype: str = "float32",
    start_from: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, Any]:
    """Evaluates a run on every mixture of `evaluator` and prints a table.

    Into `model_dir`/eval/<mixture> go `results.json` (settings, averages, what the run is),
    `table.md` and, task by task, `predictions/<task>.jsonl` (every example). Each appears when it
    is complete. Tasks that the same model has answered before, with the same settings, are not
    asked again; other answers are replaced.

    Args:
      model: the network without adapters.
      method: as trained; `frozen` evaluates the backbone itself and needs no checkpoint.
      backbone: as trained, such as "embedded:cldr_tiny".
      model_dir: folder of the run; for `frozen`, where results go.
      evaluator: what is asked and how.
      step: which checkpoint; None for the newest.
      frozen_dtype: "float32", or "bfloat16" for half the memory.
      start_from: folder of a multi-task run that `method` (made by `methods.transferred`) takes its
        parameters from, to evaluate them before any further step; `model_dir` only gets results.
        For any other method, a run of it or the file it was exported to.
      mesh: devices; default: all, data-parallel.

    Returns:
      {mixture: the content of its results.json}.

    Raises:
      UserError: a setting, the run, the data or the folder is wrong.
    """
    from moe_peft.data import lookup  # Imports TensorFlow.

    mesh = mesh_lib.make_mesh() if mesh is None else mesh
    evaluator.check_devices(mesh)
    for mixture in evaluator.mixtures:  # Mistakes show before anything is loaded.
        json_files.check_writable(_folder(model_dir, mixture))
        lookup.check_vocabulary(mixture, model.config.vocab_size)
        evaluator.suite(mixture)
    shapes = evaluator.batch_shapes()
    restored = restore.model(
        model,
        method,
        backbone,
        model_dir,
        shapes,
        mesh,
        step=step,
        frozen_dtype=frozen_dtype,
        start_from=start_from,
    )
    run = {**restored.run, "parameters_sha256": digest.of_tree(restored.params)}
    restored = dataclasses.replace(restored, run=run)
    found = {}
    for mixture in evaluator.mixtures:
        suite, folder = evaluator.suite(mixture), _folder(model_dir, mixture)
        rows, seconds = _answer(evaluator, restored, mixture, folder)
        found[mixture] = {
            "mixture": mixture,
            "run": dict(restored.run),
            "settings": evaluator.settings,
            "num_cut_targets": sum(suite.is_cut),
            "seconds": seconds,
            "results": evaluator.results(rows).to_json(),
        }
        json_files.write_json(folder / "results.json", found[mixture])
        runs = [table.Run(method.name, found[mixture])]
        json_files.write_text(folder / "table.md", table.markdown(runs))
        table.show(runs)
        if found[mixture]["num_cut_targets"]:
            print(
                f"WARNING: {sum(suite.is_cut)} of {len(rows)} targets are longer than "
                f"{evaluator.settings['feature_lengths']['targets']} tokens and count as wrong "
                "wherever exact match is asked for.",
                file=sys.stderr,
            )
        print(f"Written to {folder}.", file=sys.stderr)
    return found


def _answer(
    evaluator: evaluator_lib.Evaluator,
    restored: restore.Restored,
    mixture: str,
    folder: pathlib.Path,
) -> tuple[list[questions.Row], float]:
    """(rows of a mixture, seconds they took); what is new is kept part by part."""
    suite, rows, num_known = evaluator.suite(mixture), [], 0
    num_tasks = len(suite.tasks())
    kept = answer_cache.Answers(folder, mixture, num_tasks, restored.run, evaluator.settings)
    with progress_lib.shown(mixture, len(suite.rows)) as progress:
        for part in evaluator.parts(mixture):
            started = time.monotonic()
            digests = {task: suite.digest(places) for task, places in part.items()}
            known = {task: kept.read(task, digest) for task, digest in digests.items()}
            places = [place for members in part.values() for place in members]
            if all(found is not None for found in known.values()):
                old = [row for found in known.values() for row in found]
                new = [{**row, **suite.rows[i]} for row, i in zip(old, places, strict=True)]
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


def _folder(model_dir: str, mixture: str) -> pathlib.Path:
    return pathlib.Path(model_dir).expanduser() / "eval" / mixture

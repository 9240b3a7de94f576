"""`evaluate`: a trained run, or a bare backbone, over tasks and templates; results on disk."""

import pathlib
import sys
import time
from typing import Any

from flax import linen as nn
import gin
import jax

from moe_peft import methods
from moe_peft.analysis import report
from moe_peft.evaluation import aggregation, predictions, restore, tracking
from moe_peft.evaluation import evaluator as evaluator_lib
from moe_peft.partitioning import mesh as mesh_lib


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
    `predictions.jsonl` (every example) and `table.md`. Each appears when it is complete, and an
    earlier evaluation is replaced.

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
        predictions.check_writable(_folder(model_dir, mixture))
        lookup.check_vocabulary(mixture, model.config.vocab_size)
        evaluator.suite(mixture)
    shapes = evaluator.batch_shapes()
    restored = restore.restore(
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
    found = {}
    for mixture in evaluator.mixtures:
        suite, started = evaluator.suite(mixture), time.monotonic()
        with tracking.shown(mixture, len(suite.rows)) as progress:
            rows = evaluator.predict(restored.model, restored.params, mixture, progress)
        found[mixture] = {
            "mixture": mixture,
            "run": dict(restored.run),
            "settings": evaluator.settings,
            "num_cut_targets": sum(suite.is_cut),
            "seconds": round(time.monotonic() - started, 1),
            "results": aggregation.aggregate(rows).to_json(),
        }
        folder = _folder(model_dir, mixture)
        predictions.write_jsonl(folder / "predictions.jsonl", rows)
        predictions.write_json(folder / "results.json", found[mixture])
        runs = [report.Run(method.name, found[mixture])]
        predictions.write_text(folder / "table.md", report.markdown(runs))
        report.show(runs)
        if found[mixture]["num_cut_targets"]:
            print(
                f"WARNING: {sum(suite.is_cut)} of {len(rows)} targets are longer than "
                f"{evaluator.settings['feature_lengths']['targets']} tokens and count as wrong "
                "wherever exact match is asked for.",
                file=sys.stderr,
            )
        print(f"Written to {folder}.", file=sys.stderr)
    return found


def _folder(model_dir: str, mixture: str) -> pathlib.Path:
    return pathlib.Path(model_dir).expanduser() / "eval" / mixture

"""Checkpoints of a run: atomic, in the background, verified when read, the newest few kept.

A checkpoint holds the trainable tree, the optimiser state, the step and the key, and a json record:
what the run is, where the data stood, metrics not yet written, and digests of the arrays. Frozen
weights are never saved; their fingerprint is.
"""

from collections.abc import Iterator, Mapping
import contextlib
import logging
import os
import pathlib
import shutil
import sys
from typing import Any

import jax
from jaxtyping import PyTree
import numpy as np
import orbax.checkpoint as ocp

from moe_peft import errors, patching
from moe_peft.runtime import digest, processes
from moe_peft.training import step as step_lib
from moe_peft.weights import saved_run

DAMAGED_FOLDER = "checkpoints_damaged"
_ITEMS = ("trainable", "position")


class Checkpoints:
    """Writes the checkpoints of one run into `model_dir`/checkpoints; a context manager.

    Leaving it waits for the last save.
    """

    def __init__(self, model_dir: pathlib.Path | str, keep: int):
        errors.check_at_least("keep", keep, 1)
        self._folder = pathlib.Path(model_dir) / saved_run.FOLDER
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(self._folder.absolute(), options=options)
        logging.getLogger("absl").addFilter(_is_not_from_orbax)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        try:
            with self._explained():
                self._manager.close()
        except errors.UserError:
            # An error that is already on its way must not be hidden by what it led to.
            if error is None:
                raise
        finally:
            logging.getLogger("absl").removeFilter(_is_not_from_orbax)

    def save(self, state: step_lib.TrainState, record: Mapping[str, Any]) -> None:
        """Copies the state to the host and writes it in the background.

        Raises UserError: this save or the one before it failed; earlier checkpoints are intact.
        """
        trees = _to_host(state)
        record = {**record, "digests": {name: digest.of_tree(trees[name]) for name in _ITEMS}}
        items = {name: ocp.args.StandardSave(trees[name]) for name in _ITEMS}
        args = ocp.args.Composite(record=ocp.args.JsonSave(record), **items)
        with self._explained():
            self._manager.save(int(state.step), args=args, force=True)

    def check(self) -> None:
        """Raises UserError if a save in the background has failed."""
        with self._explained():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Returns once everything is on disk; raises UserError if it cannot be."""
        with self._explained():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns what a failed save raises into one line; removes what it left half written."""
        try:
            yield
        except errors.UserError:
            raise
        except Exception as error:  # Whatever orbax and the file system raise.
            for partial in self._folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(partial, ignore_errors=True)
            left = ", ".join(map(str, saved_run.steps(self._folder.parent))) or "none"
            raise errors.UserError(
                f"Cannot write a checkpoint to {self._folder}: {saved_run.reason(error)}. "
                f"Checkpoints there: steps {left}. Make room or repair the folder, then run the "
                "same command to go on."
            ) from error


def _is_not_from_orbax(record: logging.LogRecord) -> bool:
    """Errors of background saves come to us as exceptions; their tracebacks need not be printed."""
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def load_newest(model_dir: pathlib.Path | str) -> saved_run.Saved | None:
    """Returns the newest undamaged checkpoint, or None where the run has no checkpoint yet.

    Damaged newer ones are reported on standard error and moved to `model_dir`/checkpoints_damaged.

    Raises UserError: there are checkpoints, but every one is damaged.
    """
    damaged = {}
    for step in reversed(saved_run.steps(model_dir)):
        try:
            saved = saved_run.read(pathlib.Path(model_dir), step, _ITEMS)
        except Exception as error:  # Whatever a damaged file makes the reader raise.
            damaged[step] = saved_run.reason(error)
            continue
        for bad_step, reason in damaged.items():
            aside = pathlib.Path(model_dir) / DAMAGED_FOLDER
            aside.mkdir(exist_ok=True)
            moved = aside / f"{bad_step}-{len(list(aside.glob(f'{bad_step}-*')))}"
            (pathlib.Path(model_dir) / saved_run.FOLDER / str(bad_step)).rename(moved)
            print(
                f"WARNING: the checkpoint of step {bad_step} is damaged ({reason}); it was moved "
                f"to {moved} and training goes back to step {step}.",
                file=sys.stderr,
                flush=True,
            )
        return saved
    if damaged:
        newest, reason = next(iter(damaged.items()))
        raise errors.UserError(
            f"All {len(damaged)} checkpoints in {pathlib.Path(model_dir) / saved_run.FOLDER} are "
            f"damaged (step {newest}: {reason}). Choose another MODEL_DIR, or "
            "remove them to start again."
        )
    return None


def restore(saved: saved_run.Saved, fresh: step_lib.TrainState) -> step_lib.TrainState:
    """Returns `fresh` with the saved values, on the same devices.

    Raises UserError: the leaves are not those of `fresh` (another optimiser, say).
    """
    tree = {"opt_state": _numbered(fresh.opt_state), "trainable": dict(fresh.trainable)}
    have = {"opt_state": saved.position["opt_state"], "trainable": saved.trainable}
    kind = lambda leaf: (leaf.shape, np.dtype(leaf.dtype).name)
    kinds = lambda tree: {name: kind(leaf) for name, leaf in patching.flatten(tree).items()}
    shapes, saved_shapes = kinds(tree), kinds(have)
    names = sorted({*shapes, *saved_shapes})
    differing = [name for name in names if shapes.get(name) != saved_shapes.get(name)]
    if differing:
        raise errors.UserError(
            f"The checkpoint of step {saved.step} does not fit this run: {len(differing)} leaves "
            f"differ, the first is {differing[0]} (saved {saved_shapes.get(differing[0])}, here "
            f"{shapes.get(differing[0])}). Was it trained with another optimiser?"
        )

    place = lambda like, value: processes.put_on_devices(np.asarray(value), like.sharding)
    opt_leaves, opt_structure = jax.tree.flatten(fresh.opt_state)
    saved_leaves = [saved.position["opt_state"][name] for name in _numbered(fresh.opt_state)]
    return step_lib.TrainState(
        step=place(fresh.step, np.asarray(saved.step, np.int32)),
        trainable=jax.tree.map(place, fresh.trainable, saved.trainable),
        opt_state=opt_structure.unflatten(map(place, opt_leaves, saved_leaves)),
        rng=place(fresh.rng, saved.position["rng"]),
    )


def _to_host(state: step_lib.TrainState) -> dict[str, Any]:
    """Copies that later steps, to which the state is donated, cannot overwrite."""
    position = {"opt_state": _numbered(state.opt_state), "rng": state.rng}
    trees = {"trainable": state.trainable, "position": position}
    return jax.tree.map(processes.fetch_to_host, trees)


def _numbered(opt_state: PyTree) -> dict[str, Any]:
    """Leaves by number: optax's nested tuples, some of them empty, survive no file format."""
    return {f"{index:04d}": leaf for index, leaf in enumerate(jax.tree.leaves(opt_state))}

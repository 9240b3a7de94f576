"""Several processes as one run: how they find each other, and what only the first of them does."""

from collections.abc import Callable, Mapping
import dataclasses
import os
import re
import sys
import threading
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils
from jaxtyping import PyTree
import numpy as np

from moe_peft import errors

VARIABLE = "MOE_PEFT_DISTRIBUTED"
TIMEOUT = 300  # seconds
_LATER = 60  # seconds until jax would give up, after we did

_FORM = re.compile(r"(?P<coordinator>[^,]+:\d+),(?P<num>\d+),(?P<index>\d+)")

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Processes that belong together."""

    found_in: str  # what said so, for messages
    coordinator: str | None = None  # HOST:PORT of the first; None leaves all to jax's own detection
    num_processes: int | None = None  # of them
    process_id: int | None = None  # of this one, from 0


def find(flag: str | None, environ: Mapping[str, str]) -> Cluster | None:
    """Returns the processes that this one is to join; None if it is alone.

    The flag is "HOST:PORT,COUNT,INDEX"; "auto" for jax's own detection (TPU pods, Slurm, Open MPI);
    or "off". None looks at the environment: the same in MOE_PEFT_DISTRIBUTED; several tasks of a
    Slurm step; several workers of a TPU slice; an indexed Kubernetes job with MOE_PEFT_COORDINATOR
    and MOE_PEFT_NUM_PROCESSES. UserError: it has another form, or the index is not below the count.
    """
    where = "--distributed"
    if flag is None and environ.get(VARIABLE):
        flag, where = environ[VARIABLE], VARIABLE
    if flag is not None:
        return _given(flag, where)
    if int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in environ:
        return Cluster("the Slurm step")
    if "," in environ.get("TPU_WORKER_HOSTNAMES", ""):
        return Cluster("TPU_WORKER_HOSTNAMES")
    if "JOB_COMPLETION_INDEX" in environ and "MOE_PEFT_COORDINATOR" in environ:
        parts = (environ["MOE_PEFT_COORDINATOR"], environ.get("MOE_PEFT_NUM_PROCESSES", ""))
        return _given(f"{','.join(parts)},{environ['JOB_COMPLETION_INDEX']}", "the Kubernetes job")
    return None


def _given(text: str, where: str) -> Cluster | None:
    if text == "off":
        return None
    if text == "auto":
        return Cluster(where)
    found = _FORM.fullmatch(text)
    if not found:
        raise errors.UserError(
            f"{where} is {text!r}; expected HOST:PORT,COUNT,INDEX (such as host0:1234,4,0), 'auto' "
            "or 'off'."
        )
    num_processes, process_id = int(found["num"]), int(found["index"])
    if process_id >= num_processes:
        raise errors.UserError(
            f"{where} is {text!r}: the index of {num_processes} processes is 0 to "
            f"{num_processes - 1}."
        )
    return Cluster(where, found["coordinator"], num_processes, process_id)


def join(cluster: Cluster, timeout: int = TIMEOUT) -> None:
    """Waits until all processes are there; before anything else of jax is used.

    Where they do not come in `timeout` seconds, one line says so and the process ends with code 2:
    jax itself would abort it without a chance to explain.

    Raises UserError where nobody says who the processes are, or this one cannot take its place.
    """
    who = "this process"
    if cluster.coordinator:
        who = f"process {cluster.process_id} of {cluster.num_processes} at {cluster.coordinator}"
    could_not = f"By {cluster.found_in}, {who} could not join the others"

    def give_up():
        print(
            f"{could_not} within {timeout} s. Are all of them started, with the same address and "
            "count, and is the port open?",
            file=sys.stderr,
            flush=True,
        )
        os._exit(errors.EXIT_CODE)

    watch = threading.Timer(timeout, give_up)
    watch.daemon = True
    watch.start()
    try:
        place = (cluster.coordinator, cluster.num_processes, cluster.process_id)
        jax.distributed.initialize(*place, initialization_timeout=timeout + _LATER)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise errors.UserError(f"{could_not}: {reason}") from error
    finally:
        watch.cancel()


def is_first() -> bool:
    """Whether this process writes what is written once: metrics, messages, settings."""
    return jax.process_index() == 0


def in_turn(function: Callable[[], T], name: str) -> T:
    """Calls the function in the first process, then in all others; returns its result.

    The first one has tidied up on disk before the others look. The function must not contain
    collective operations; `name` is the name of this place in the program.
    """
    if jax.process_count() == 1:
        return function()
    found = function() if is_first() else None
    multihost_utils.sync_global_devices(name)
    return found if is_first() else function()


def anywhere(condition: bool) -> bool:
    """Whether the condition holds in any process; all processes must call it."""
    if jax.process_count() == 1:
        return condition
    return bool(np.any(multihost_utils.process_allgather(np.asarray(condition))))


def put_on_devices(tree: PyTree, shardings: PyTree) -> PyTree:
    """Host arrays, the same in every process, to devices; one sharding or a tree of them."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def place(leaf: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    if isinstance(shardings, jax.sharding.Sharding):
        return jax.tree.map(lambda leaf: place(leaf, shardings), tree)
    return jax.tree.map(place, tree, shardings)


def fetch_to_host(leaf: jax.Array | np.ndarray) -> np.ndarray:
    """A copy of a whole array on the host; all processes must call it."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.array(leaf, copy=True)

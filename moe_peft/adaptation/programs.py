"""Many runs at once: one training step mapped over runs that share a frozen backbone.

Few-shot adaptation means tens of short runs (tasks times seeds) of tiny adapters. Their adapters,
optimiser states and batches are stacked on a leading axis R, and `step.make_update`, the very step
of a single run, is mapped over it; the frozen tree is not. An accelerator takes all runs of its
share together, so every product with a frozen weight is one large product. A CPU core, which one
run keeps busy, takes them one after another. Clipping, schedules, statistics and random keys are
each run's own.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import contextlib
import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree
import numpy as np

from moe_peft.partitioning import hlo_cost
from moe_peft.partitioning import mesh as mesh_lib
from moe_peft.training import step as step_lib

Batch = Mapping[str, Any]

# Maps a function of one run's arguments over arguments stacked on a leading axis.
MapRuns = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What `advance` reports about each run."""

    steps: np.ndarray  # updates made, fewer than asked for where a run stopped on its own
    losses: np.ndarray  # objective of every step, [R, count]


def make_advance(update: step_lib.TrainStep, map_runs: MapRuns) -> Callable[..., Any]:
    """Returns `(states, active, frozen, tables, rows, start, count) -> (states, active, losses)`.

    A pure function; `update` is that of one run. Every run makes `count` steps, k = start, ...;
    step k of run r sees the rows `rows[r, k]` of its table, whose last row, -1, is padding. The
    state of a run that is not active does not change. A run whose loss or gradient is not finite
    is inactive from before that step on, and the others do not notice.
    """

    def advance(states, active, frozen, tables, rows, start, count):
        def one_run(state, active, table, rows):
            def step(k, state, losses):
                take = lambda values: jnp.take(values, rows[k], axis=0, mode="wrap")
                batch = {name: take(values) for name, values in table.items()}
                new_state, metrics = update(state, frozen, batch)
                is_finite = metrics["bad_leaf"] == step_lib.ALL_FINITE
                loss = metrics["loss_sum"] / jnp.maximum(metrics["normalizer"], 1e-9)
                losses = losses.at[k].set(jnp.where(is_finite, loss, jnp.nan))
                return select_tree(is_finite, new_state, state), is_finite, losses

            def step_if_active(k, carry):
                state, active, losses = carry
                stay = lambda k, state, losses: (state, active, losses)
                return jax.lax.cond(active, step, stay, k, state, losses)

            losses = jnp.full(rows.shape[:1], jnp.nan, jnp.float32)
            return jax.lax.fori_loop(start, start + count, step_if_active, (state, active, losses))

        return map_runs(one_run)(states, active, tables, rows)

    return advance


def one_after_another(of_one: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.vmap(of_one)`, as a loop."""
    return lambda *stacked: jax.lax.map(lambda one: of_one(*one), stacked)


def select_tree(where: Bool[Array, "..."], new: PyTree, old: PyTree) -> PyTree:
    """Takes `new` where `where`, else `old`; the axes of `where` are the leaves' leading ones."""

    def pick(one, other):
        return jnp.where(where.reshape(where.shape + (1,) * (one.ndim - where.ndim)), one, other)

    return jax.tree.map(pick, new, old)


class MappedRuns:
    """The compiled programs of groups of runs of one shape, over all devices of a mesh.

    A group of fewer runs, or of a number that the devices do not divide, is filled up with copies
    of its last run that are never active.
    """

    def __init__(
        self,
        update: step_lib.TrainStep,
        score: Callable[[PyTree, PyTree, Batch], tuple[Array, ...]],
        frozen: PyTree,
        width: int,
        mesh: jax.sharding.Mesh,
        map_runs: MapRuns | None = None,
    ):
        """Compiles nothing yet; runs, at most `width`, are split over the mesh's data axes.

        `update` and `score` are of one run; `score` gives arrays [b] about every row. `map_runs` is
        by default `one_after_another` on a CPU, where an inactive run costs nothing, else
        `jax.vmap`.
        """
        self._mesh = mesh
        shards = int(np.prod([mesh.shape[axis] for axis in mesh_lib.BATCH_AXES]))
        self.width = -(-width // shards) * shards
        self._by_run = mesh_lib.batch_sharding(mesh)
        self.frozen = jax.device_put(frozen, mesh_lib.replicated(mesh))
        if map_runs is None:
            on_cpu = mesh.devices.flat[0].platform == "cpu"
            map_runs = one_after_another if on_cpu else jax.vmap
        runs, whole = self._by_run.spec, jax.sharding.PartitionSpec()
        mapped = {"mesh": mesh, "out_specs": runs, "check_vma": False}
        on_every_device = functools.partial(jax.shard_map, **mapped)
        advance = make_advance(update, map_runs)
        specs = (runs, runs, whole, runs, runs, whole, whole)
        self._advance = jax.jit(on_every_device(advance, in_specs=specs), donate_argnums=(0, 1))
        score_runs = lambda frozen, trainables, batch: map_runs(functools.partial(score, frozen))(
            trainables, batch
        )
        self._score = jax.jit(on_every_device(score_runs, in_specs=(whole, runs, runs)))
        self._select = jax.jit(select_tree, donate_argnums=2, out_shardings=self._by_run)
        self._compiled = None

    def to_devices(self, values: PyTree) -> PyTree:
        """Stacked host arrays [R, ...] -> device arrays [width, ...]."""

        def pad(leaf):
            leaf = np.asarray(leaf)
            more = self.width - len(leaf)
            return np.concatenate([leaf, np.repeat(leaf[-1:], more, axis=0)]) if more else leaf

        return jax.device_put(jax.tree.map(pad, values), self._by_run)

    def to_host(self, values: PyTree, num_runs: int) -> PyTree:
        """The reverse of `to_devices`."""
        return jax.tree.map(lambda leaf: np.asarray(leaf)[:num_runs], values)

    def abstract(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """One run's array of that shape, stacked."""
        return jax.ShapeDtypeStruct((self.width, *shape), dtype, sharding=self._by_run)

    def create_states(self, trainables: Sequence[PyTree], optimizer, seeds: Sequence[int]):
        """Stacked states before the first step."""
        create = lambda trainable, seed: step_lib.create_state(trainable, optimizer, seed)
        return self.to_devices(stack([*map(create, trainables, seeds)]))

    def compile(self, states, tables, rows) -> hlo_cost.Memory:
        """Compiles `advance` for arrays of these shapes; returns what a device then needs."""
        active, zero = self.abstract((), jnp.bool_), np.int32(0)
        with jax.set_mesh(self._mesh):
            lowered = self._advance.lower(states, active, self.frozen, tables, rows, zero, zero)
            self._compiled = lowered.compile()
        return hlo_cost.memory(self._compiled)

    def advance(self, states, active: Bool[np.ndarray, "R"], tables, rows, start: int, count: int):
        """(states, active on the host, `StepReport`) after `count` steps at most.

        The states are given away. Tables, [R, rows, ...], and rows, [R, k, b], are on the devices;
        steps see the places k from `start` to `start + count`.
        """
        advance = self._compiled or self._advance
        among = np.zeros(self.width, bool)  # Copies that fill the group up are never active.
        among[: len(active)] = active
        with jax.set_mesh(self._mesh):
            states, still, losses = advance(
                *(states, self.to_devices(among), self.frozen, tables, rows),
                *(np.int32(start), np.int32(count)),
            )
        losses, still = self.to_host((losses, still), len(active))
        losses = losses[:, start : start + count]
        return states, still, StepReport(np.sum(~np.isnan(losses), axis=1), losses)

    def score(
        self, trainables: PyTree, chunks: Iterable[Batch], num_runs: int
    ) -> tuple[np.ndarray, ...]:
        """What `score` says about all rows of all chunks ([R, c, ...] on the host), each [R, e]."""
        with jax.set_mesh(self._mesh):
            score = lambda chunk: self._score(self.frozen, trainables, self.to_devices(chunk))
            found = [*map(score, chunks)]
        parts = zip(*(self.to_host(part, num_runs) for part in found), strict=True)
        return tuple(np.concatenate(part, axis=1) for part in parts)

    def keep_better(self, is_better: Bool[np.ndarray, "R"], new: PyTree, old: PyTree) -> PyTree:
        """Takes the runs of `new` that are better, the others of `old`."""
        with jax.set_mesh(self._mesh):
            return self._select(self.to_devices(is_better), new, old)


def stack(trees: Sequence[PyTree]) -> PyTree:
    """Host copies of equal trees, leaf by leaf on a new leading axis."""
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(x) for x in leaves]), *trees)


def unstack(tree: PyTree, run: int) -> PyTree:
    """Run `run` of a stacked tree."""
    return jax.tree.map(lambda leaf: leaf[run], tree)


@functools.cache
def device_memory() -> int | None:
    """Bytes that one device may hold: the accelerator's, or half of the host's; None: unknown."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    host = _host_memory()
    return None if host is None else host // 2 // jax.local_device_count()


def _host_memory() -> int | None:
    """Bytes that are left on the host, or where only Linux would tell, all that it has."""
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="ascii") as file:
        lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    with contextlib.suppress(AttributeError, OSError, ValueError):  # Windows has no sysconf.
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return size if size > 0 else None
    return None


def largest_group(num_runs: int, needed: int, shared: int, available: int) -> int:
    """Runs that fit when `num_runs` of them need so many bytes, `shared` of which only once.

    >>> largest_group(32, needed=1_000, shared=200, available=600)
    16
    """
    per_run = max((needed - shared) / num_runs, 1.0)
    return int(max((available - shared) // per_run, 0))


def group_sizes(num_runs: int, largest: int) -> list[int]:
    """As few groups as possible, as equal as possible.

    >>> group_sizes(33, 12), group_sizes(3, 100)
    ([11, 11, 11], [3])
    """
    count = -(-num_runs // largest)
    return [num_runs // count + (i < num_runs % count) for i in range(count)]

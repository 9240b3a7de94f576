"""Many runs at once: one training step mapped over runs that share a frozen backbone.

Few-shot adaptation means tens of short runs (tasks times seeds) of tiny adapters. Their adapters,
optimiser states and batches are stacked on a leading axis R, and `step.make_update`, the very step
of a single run, is mapped over it; the frozen tree is not, so every product with a frozen weight is
one large product over all runs. Clipping, schedules, statistics and random keys are each run's own.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree
import numpy as np
import optax

from moe_peft.partitioning import mesh as mesh_lib
from moe_peft.training import state as state_lib
from moe_peft.training import step as step_lib

Batch = Mapping[str, Any]

RUNS_PER_CPU = 4


@dataclasses.dataclass(frozen=True)
class Advanced:
    """What `advance` reports about each run.

    Attributes:
      steps: updates made, fewer than asked for where a run stopped on its own.
      losses: objective of every step, [R, count].
    """

    steps: np.ndarray
    losses: np.ndarray


def make_advance(update: step_lib.TrainStep) -> Callable[..., Any]:
    """Returns `(states, active, frozen, tables, rows, start, count) -> (states, active, losses)`.

    A pure function. Every run makes `count` steps, k = start, start + 1, ...; step k of run r sees
    the rows `rows[r, k]` of its table, whose last row, -1, is padding. The state of a run that is
    not active does not change. A run whose loss or gradient is not finite stops before that step:
    it is inactive from then on, and the others do not notice.

    Args:
      update: of one run, as `step.make_update` makes it.
    """
    mapped = jax.vmap(update, in_axes=(0, None, 0))

    def advance(states, active, frozen, tables, rows, start, count):
        def one_step(k, carry):
            states, active, losses = carry
            now = jax.lax.dynamic_index_in_dim(rows, k, axis=1, keepdims=False)
            take = jax.vmap(lambda table, chosen: jnp.take(table, chosen, axis=0, mode="wrap"))
            batch = {name: take(table, now) for name, table in tables.items()}
            new_states, metrics = mapped(states, frozen, batch)
            active = active & (metrics["bad_leaf"] == step_lib.ALL_FINITE)
            loss = metrics["loss_sum"] / jnp.maximum(metrics["normalizer"], 1e-9)
            loss = jnp.where(active, loss, jnp.nan)
            return choose(active, new_states, states), active, losses.at[:, k].set(loss)

        losses = jnp.full(rows.shape[:2], jnp.nan, jnp.float32)
        return jax.lax.fori_loop(start, start + count, one_step, (states, active, losses))

    return advance


def choose(where: Bool[Array, "R"], new: PyTree, old: PyTree) -> PyTree:
    """Takes run r from `new` where `where[r]`, else from `old`."""

    def pick(one, other):
        return jnp.where(where.reshape(-1, *[1] * (one.ndim - 1)), one, other)

    return jax.tree.map(pick, new, old)


class Fleet:
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
    ):
        """Compiles nothing yet.

        Args:
          update: (state, frozen, batch) -> (state, metrics), of one run.
          score: (frozen, trainable, batch) -> arrays [b] about every row, of one run.
          frozen: the shared tree; moved to every device.
          width: the largest number of runs of a group.
          mesh: runs are split over its data axes.
        """
        self._mesh = mesh
        shards = num_shards(mesh)
        self.width = -(-width // shards) * shards
        self._by_run = mesh_lib.batch_sharding(mesh)
        self.frozen = jax.device_put(frozen, mesh_lib.replicated(mesh))
        self._advance = jax.jit(
            make_advance(update), donate_argnums=(0, 1), out_shardings=self._by_run
        )
        self._score = jax.jit(jax.vmap(score, in_axes=(None, 0, 0)), out_shardings=self._by_run)
        self._choose = jax.jit(choose, donate_argnums=2, out_shardings=self._by_run)
        self._compiled = None

    def put(self, values: PyTree) -> PyTree:
        """Stacked host arrays [R, ...] -> device arrays [width, ...]."""

        def pad(leaf):
            leaf = np.asarray(leaf)
            more = self.width - len(leaf)
            return np.concatenate([leaf, np.repeat(leaf[-1:], more, axis=0)]) if more else leaf

        return jax.device_put(jax.tree.map(pad, values), self._by_run)

    def abstract(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """One run's array of that shape, stacked."""
        return jax.ShapeDtypeStruct((self.width, *shape), dtype, sharding=self._by_run)

    def get(self, values: PyTree, num_runs: int) -> PyTree:
        """The reverse of `put`."""
        return jax.tree.map(lambda leaf: np.asarray(leaf)[:num_runs], values)

    def create(
        self,
        trainables: Sequence[PyTree],
        optimizer: optax.GradientTransformation,
        seeds: Sequence[int],
    ) -> state_lib.TrainState:
        """Stacked states before the first step."""
        states = [
            state_lib.create(trainable, optimizer, seed)
            for trainable, seed in zip(trainables, seeds, strict=True)
        ]
        return self.put(stack(states))

    def compile(self, states, tables, rows) -> Any:
        """Compiles `advance` for arrays of these shapes; returns its memory analysis."""
        active = self.abstract((), jnp.bool_)
        with jax.set_mesh(self._mesh):
            zero = np.int32(0)
            lowered = self._advance.lower(states, active, self.frozen, tables, rows, zero, zero)
            self._compiled = lowered.compile()
        return self._compiled.memory_analysis()

    def advance(self, states, active: Bool[np.ndarray, "R"], tables, rows, start: int, count: int):
        """(states, active on the host, `Advanced`) after `count` steps at most.

        Args:
          states: stacked; given away.
          active: runs that take part.
          tables: feature name to [R, rows, ...] on the devices.
          rows: Int[R k b] on the devices; steps see its places `start` to `start + count`.
          start: first place.
          count: steps.
        """
        advance = self._compiled or self._advance
        among = np.zeros(self.width, bool)
        among[: len(active)] = active
        with jax.set_mesh(self._mesh):
            states, still, losses = advance(
                *(states, self.put(among), self.frozen, tables, rows),
                *(np.int32(start), np.int32(count)),
            )
        losses, still = self.get((losses, still), len(active))
        losses = losses[:, start : start + count]
        return states, still, Advanced(np.sum(~np.isnan(losses), axis=1), losses)

    def score(
        self, trainables: PyTree, chunks: Iterable[Batch], num_runs: int
    ) -> tuple[np.ndarray, ...]:
        """What `score` says about all rows of all chunks, each [R, e].

        Args:
          trainables: stacked, on the devices.
          chunks: stacked host arrays [R, c, ...].
          num_runs: R.
        """
        with jax.set_mesh(self._mesh):
            found = [self._score(self.frozen, trainables, self.put(chunk)) for chunk in chunks]
        parts = zip(*(self.get(part, num_runs) for part in found), strict=True)
        return tuple(np.concatenate(part, axis=1) for part in parts)

    def keep_better(self, is_better: Bool[np.ndarray, "R"], new: PyTree, old: PyTree) -> PyTree:
        """Takes the runs of `new` that are better, the others of `old`."""
        with jax.set_mesh(self._mesh):
            return self._choose(self.put(is_better), new, old)


def stack(trees: Sequence[PyTree]) -> PyTree:
    """Host copies of equal trees, leaf by leaf on a new leading axis."""
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(x) for x in leaves]), *trees)


def unstack(tree: PyTree, run: int) -> PyTree:
    """Run `run` of a stacked tree."""
    return jax.tree.map(lambda leaf: leaf[run], tree)


@functools.cache
def device_memory() -> int:
    """Bytes that one device may hold: the accelerator's, or what is left of the host's, halved."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    with open("/proc/meminfo", encoding="ascii") as file:
        lines = dict(line.split(":", 1) for line in file)
    return int(lines["MemAvailable"].split()[0]) * 1024 // 2 // jax.local_device_count()


def useful_width(mesh: jax.sharding.Mesh, num_runs: int) -> int:
    """How many runs a group should have where memory sets no limit.

    An accelerator takes all at once. On a CPU the activations of more than a few runs fall out of
    its caches: with the CLDR backbone a step of a run takes 22 ms of processor time in a stack of
    4, 30 ms in one of 33. Of the widths near 4 the one that fills its groups best is taken.
    """
    if mesh.devices.flat[0].platform != "cpu":
        return num_runs
    return even_width(num_runs, RUNS_PER_CPU * num_shards(mesh), num_shards(mesh))


def even_width(num_runs: int, largest: int, shards: int = 1) -> int:
    """The multiple of `shards`, between half of `largest` and `largest`, that pads groups least.

    >>> even_width(33, 4), even_width(48, 4), even_width(33, 8, shards=2), even_width(1, 4)
    (3, 4, 6, 1)
    """
    least = max(min(largest // 2, num_runs) // shards, 1) * shards
    widths = range(least, largest + 1, shards)
    return min(widths, key=lambda width: (-(-num_runs // width) * width, -width))


def num_shards(mesh: jax.sharding.Mesh) -> int:
    """Devices over which the runs of a group are split."""
    return int(np.prod([mesh.shape[axis] for axis in mesh_lib.BATCH_AXES]))


def needed_memory(analysis: Any) -> int:
    """Bytes on one device while a compiled program runs."""
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    )


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

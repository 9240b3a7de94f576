"""`data prepare`: makes the caches of token ids that runs would make at their first reading."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import concurrent.futures
import concurrent.futures.process
import contextlib
import dataclasses
import functools
import json
import queue
import time

import seqio

from moe_peft import errors
from moe_peft.cli import data_pool
from moe_peft.config import gin_files
from moe_peft.config import settings as settings_lib
from moe_peft.data import bad_rows, lookup, row_store
from moe_peft.runtime import progress as progress_lib
from moe_peft.tasks import cldr, crossfit, p3, superni

REGISTERED = (cldr, crossfit, p3, superni)


@dataclasses.dataclass(frozen=True)
class PreparedTask:
    """What came of one task."""

    task: str  # its name
    rows: dict[str, int]  # of all its splits, by split
    tokens: int  # of inputs and targets, end marks not counted
    written: int  # rows that were not there before
    skipped: tuple[tuple[str, str, int], ...]  # bad rows, (file, reason, number) each


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Of `data prepare`."""

    # Names of mixtures or tasks to prepare; None is left out.
    mixtures: Sequence[str | None] = ()
    eval_mixtures: Sequence[str] = ()  # further ones
    names: Sequence[str] = ()  # these alone, if there are any
    splits: Sequence[str] = ()  # these alone, where a task has them; default: all
    processes: int = 1  # that work at the same time, each on a task of its own

    def tasks(self) -> dict[str, seqio.Task]:
        """The tasks to prepare, by name; raises UserError where a setting is wrong."""
        if not self.wanted:
            file = "a gin file that sets MIXTURE, EVAL_MIXTURES or TARGET_MIXTURE"
            example = "name mixtures or tasks, such as p3_t0"
            raise errors.UserError(f"Nothing to prepare: {example}, or give {file}.")
        errors.check_at_least("--processes", self.processes, 1)
        tasks = {task.name: task for name in self.wanted for task in lookup.tasks_of(name)}
        known = {split for task in tasks.values() for split in task.splits}
        for split in self.splits:
            if split not in known:
                others = f"they have {', '.join(sorted(known))}.{errors.near(split, known)}"
                raise errors.UserError(f"No task has a split {split!r}; {others}")
        return tasks

    @property
    def wanted(self) -> list[str]:
        """Names of mixtures and tasks."""
        return list(self.names) or [n for n in (*self.mixtures, *self.eval_mixtures) if n]


@settings_lib.entry_point(Settings, "data_prepare", module="commands")
def data_prepare(settings: Settings) -> list[PreparedTask]:
    """Reads every split of every task once. What an earlier call has done is not done again."""
    # Rows go to disk as they are read, so memory does not grow with them.
    tasks = settings.tasks()
    run = _run_here if settings.processes == 1 else _run_in_processes
    done = []
    with progress_lib.Rows("prepare", len(tasks), _work(tasks)) as progress:
        for result in run(settings, list(tasks), progress.rows):
            done.append(result)
            progress.task(sum(result.rows.values()), not result.written)
    return done


def _work(names: Iterable[str]) -> int:
    """Rows that tasks are said to have, if all do."""
    sizes = [p3.published_rows(name) if name.startswith(p3.PREFIX) else 0 for name in names]
    return sum(sizes) if all(sizes) else 0


def prepare_task(name: str, splits: Sequence[str]) -> PreparedTask:
    """Reads the splits of a task: all, or those of `splits` that it has."""
    source = lookup.get(name).source
    counts, tokens, written = {}, 0, []
    with bad_rows.counting() as skipped, row_store.watched(written.append):
        for split in source.splits:
            if splits and split not in splits:
                continue
            found = source.rows(split)
            counts[split] = len(found)
            tokens += sum(int(column.lengths.sum()) for column in (found.inputs, found.targets))
    listed = tuple((*key, count) for key, count in skipped.items())
    return PreparedTask(name, counts, tokens, sum(written), listed)


def _run_here(
    settings: Settings, tasks: Sequence[str], tell: Callable[[int], None]
) -> Iterator[PreparedTask]:
    with row_store.watched(tell):
        for name in tasks:
            yield prepare_task(name, settings.splits)


def _run_in_processes(
    settings: Settings, tasks: Sequence[str], tell: Callable[[int], None]
) -> Iterator[PreparedTask]:
    config = gin_files.resolved_text()
    pool, counts = data_pool.start_pool(settings.processes, config, settings.wanted)
    with pool:
        call = functools.partial(pool.submit, data_pool.counted, prepare_task)
        left = {call(name, settings.splits) for name in tasks}
        try:
            while left:
                done, left = concurrent.futures.wait(left, 0.2, concurrent.futures.FIRST_COMPLETED)
                with contextlib.suppress(queue.Empty):
                    while True:
                        tell(counts.get_nowait())
                for future in done:
                    result = future.result()
                    bad_rows.remember_skipped({key[:2]: key[2] for key in result.skipped})
                    yield result
        except concurrent.futures.process.BrokenProcessPool as problem:
            raise errors.UserError(
                "A process was ended from outside (memory?). What is done is kept: start again, "
                "perhaps with fewer --processes."
            ) from problem
        finally:
            pool.shutdown(cancel_futures=True)


def run(
    entry_point: Callable[..., list[PreparedTask]],
    names: Sequence[str],
    splits: Sequence[str],
    processes: int,
    as_json: bool = False,
) -> None:
    """Prepares tasks and prints what is ready; see `Settings`."""
    start = time.monotonic()
    done = entry_point(names=names, splits=splits, processes=processes)
    seconds = time.monotonic() - start
    rows = sum(sum(each.rows.values()) for each in done)
    tokens = sum(each.tokens for each in done)
    skipped = [row for each in done for row in each.skipped]
    if as_json:
        record = {"tasks": list(map(dataclasses.asdict, done)), "rows": rows, "tokens": tokens}
        record["skipped"] = [dict(zip(("file", "reason", "rows"), row)) for row in skipped]
        print(json.dumps({**record, "seconds": seconds}, indent=2, ensure_ascii=False))
        return
    print(f"{len(done)} tasks are ready: {rows:,} rows, {tokens:,} tokens, {seconds:.1f} s")
    for file, reason, count in skipped:
        print(f"skipped {count:,} rows of {file}: {reason}")

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

import gin

from moe_peft import errors
from moe_peft.cli import data_pool
from moe_peft.config import gin_files
from moe_peft.data import bad_rows, lookup, row_store
from moe_peft.runtime import progress as progress_lib
from moe_peft.tasks import cldr, crossfit, p3, superni

REGISTERED = (cldr, crossfit, p3, superni)


@dataclasses.dataclass(frozen=True)
class Done:
    """What came of one task.

    Attributes:
      task: its name.
      rows: of all its splits, by split.
      tokens: of inputs and targets, end marks not counted.
      written: rows that were not there before.
      skipped: bad rows, (file, reason, number) each.
    """

    task: str
    rows: dict[str, int]
    tokens: int
    written: int
    skipped: tuple[tuple[str, str, int], ...]


@gin.register(module="commands")
def data_prepare(
    mixtures: Sequence[str | None] = (),
    eval_mixtures: Sequence[str] = (),
    names: Sequence[str] = (),
    splits: Sequence[str] = (),
    processes: int = 1,
) -> list[Done]:
    """Reads every split of every task once. What an earlier call has done is not done again.

    Rows go to disk as they are read, so memory does not grow with them.

    Args:
      mixtures: names of mixtures or tasks to prepare; None is left out.
      eval_mixtures: further ones.
      names: these alone, if there are any.
      splits: these alone, where a task has them; default: all.
      processes: that work at the same time, each on a task of its own.
    """
    wanted = names or [name for name in (*mixtures, *eval_mixtures) if name]
    if not wanted:
        raise errors.UserError(
            "Nothing to prepare: name mixtures or tasks, such as p3_t0, or give a gin file that "
            "sets MIXTURE, EVAL_MIXTURES or TARGET_MIXTURE."
        )
    if processes < 1:
        raise errors.UserError(f"--processes is {processes}; expected 1 or more.")
    tasks = {task.name: task for name in wanted for task in lookup.tasks_of(name)}
    _check_splits(tasks, splits)
    run = _run_here if processes == 1 else functools.partial(_run_apart, processes, wanted)
    done = []
    with progress_lib.Rows("prepare", len(tasks), _work(tasks)) as progress:
        for result in run(list(tasks), tuple(splits), progress.rows):
            done.append(result)
            progress.task(sum(result.rows.values()), not result.written)
    return done


def _work(names: Iterable[str]) -> int:
    """Rows that tasks are said to have, if all do."""
    sizes = [p3.published_rows(name) if name.startswith(p3.PREFIX) else 0 for name in names]
    return sum(sizes) if all(sizes) else 0


def _check_splits(tasks, splits: Sequence[str]) -> None:
    if not splits:
        return
    known = {split for task in tasks.values() for split in task.splits}
    for split in splits:
        if split not in known:
            raise errors.UserError(
                f"No task has a split {split!r}; they have {', '.join(sorted(known))}."
                f"{errors.near(split, known)}"
            )


def prepare(name: str, splits: Sequence[str]) -> Done:
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
    return Done(name, counts, tokens, sum(written), listed)


def _run_here(
    tasks: Sequence[str], splits: Sequence[str], tell: Callable[[int], None]
) -> Iterator[Done]:
    with row_store.watched(tell):
        for name in tasks:
            yield prepare(name, splits)


def _run_apart(
    processes: int,
    wanted: Sequence[str],
    tasks: Sequence[str],
    splits: Sequence[str],
    tell: Callable[[int], None],
) -> Iterator[Done]:
    pool, counts = data_pool.make(processes, gin_files.resolved_text(), wanted)
    with pool:
        left = {pool.submit(data_pool.prepare, name, splits) for name in tasks}
        try:
            while left:
                done, left = concurrent.futures.wait(left, 0.2, concurrent.futures.FIRST_COMPLETED)
                with contextlib.suppress(queue.Empty):
                    while True:
                        tell(counts.get_nowait())
                for future in done:
                    result = future.result()
                    bad_rows.remember({key[:2]: key[2] for key in result.skipped})
                    yield result
        except concurrent.futures.process.BrokenProcessPool as problem:
            raise errors.UserError(
                "A process was ended from outside (memory?). What is done is kept: start again, "
                "perhaps with fewer --processes."
            ) from problem
        finally:
            pool.shutdown(cancel_futures=True)


def show(done: Sequence[Done], seconds: float, as_json: bool = False) -> None:
    """Prints what is ready."""
    rows = sum(sum(each.rows.values()) for each in done)
    tokens = sum(each.tokens for each in done)
    skipped = [row for each in done for row in each.skipped]
    if as_json:
        record = {
            "tasks": [dataclasses.asdict(each) for each in done],
            "rows": rows,
            "tokens": tokens,
            "skipped": [dict(zip(("file", "reason", "rows"), row)) for row in skipped],
            "seconds": seconds,
        }
        print(json.dumps(record, indent=2, ensure_ascii=False))
        return
    print(f"{len(done)} tasks are ready: {rows:,} rows, {tokens:,} tokens, {seconds:.1f} s")
    for file, reason, count in skipped:
        print(f"skipped {count:,} rows of {file}: {reason}")


def timed(entry_point: Callable[[], list[Done]]) -> tuple[list[Done], float]:
    """Its result, and the seconds it took."""
    start = time.monotonic()
    return entry_point(), time.monotonic() - start

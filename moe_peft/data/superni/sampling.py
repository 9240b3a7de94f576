"""Which instances of a task are trained on, chosen on and reported on.

* Training tasks: `train` is a random draw, `validation` the next of the same order (Caccia et al.
  2023, section 5: 100 examples a task).
* Test tasks: `test` is the first 100 in file order, as upstream ordered them; `train` is all the
  rest, from which each few-shot run draws what it learns from and what it selects by.

Draws use NumPy's generator seeded by the seed and the task's name; the papers' own draws (Python's
global generator) are not reproduced.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import zlib

import numpy as np

from moe_peft.data.superni import files


@dataclasses.dataclass(frozen=True)
class Amounts:
    """Instances of each split, at most: of training tasks, and of test tasks the last one."""

    train: int = 100
    validation: int = 100
    test: int = 100


def split(
    task: files.TaskFile, is_test_task: bool, amounts: Amounts, seed: int
) -> Mapping[str, Sequence[files.Instance]]:
    """The instances of every split that has some."""
    if is_test_task:
        found = {"train": task.instances[amounts.test :], "test": task.instances[: amounts.test]}
    else:
        key = [seed, zlib.crc32(task.name.encode())]
        order = np.random.default_rng(key).permutation(len(task.instances))
        shuffled = [task.instances[i] for i in order[: amounts.train + amounts.validation]]
        found = {"train": shuffled[: amounts.train], "validation": shuffled[amounts.train :]}
    return {name: chosen for name, chosen in found.items() if chosen}

"""What the runs are and see: jobs, their examples as stacked arrays, equal shapes."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import hashlib
import zlib

from jaxtyping import Int
import numpy as np

from moe_peft.data import fewshot
from moe_peft.evaluation import inference
from moe_peft.models import batches, few_shot, scoring

Batch = dict[str, np.ndarray]
WEIGHTS = "decoder_loss_weights"


@dataclasses.dataclass(frozen=True, order=True)
class Job:
    """One run: a task and a seed."""

    task: str
    seed: int

    def __str__(self) -> str:
        return f"{self.task}, seed {self.seed}"

    @property
    def key_seed(self) -> int:
        """Of fresh parameters and dropout: no two jobs share it."""
        return zlib.crc32(f"{self.task} {self.seed}".encode()) & 0x7FFFFFFF


@dataclasses.dataclass(frozen=True, order=True)
class Shape:
    """Sizes that stacked runs must have in common; those of a job alone, whoever is next to it."""

    inputs: int  # tokens of an encoder row
    targets: int  # tokens of a decoder row
    num_choices: int  # of an example at most; 0 where the task has none


@dataclasses.dataclass(frozen=True)
class JobData:
    """One job's examples."""

    job: Job
    shots: fewshot.Encoded  # every wording of every shot, wordings of one shot in a row
    num_shots: int  # examples
    wordings: int  # of each
    validation: fewshot.Encoded  # examples that select
    test: fewshot.Encoded  # examples that are reported
    shape: Shape  # of batches in training
    eval_shape: Shape  # of batches in evaluation

    def schedule(self, batch_size: int, steps: range) -> Int[np.ndarray, "k b"]:
        """Rows of `shots` that each step sees."""
        return fewshot.schedule(self.num_shots, self.wordings, batch_size, self.job.seed, steps)


def read(
    tasks: Mapping[str, fewshot.Task],
    sizes: fewshot.Sizes,
    seeds: Sequence[int],
    feature_lengths: Mapping[str, int],
    choices_in_training: bool,
    choices_in_evaluation: bool,
) -> list[JobData]:
    """The data of every (task, seed), tasks outermost, answer choices packed if asked for.

    Raises UserError: a task has too few examples, or an answer is none of its choices.
    """
    found = []
    for name, task in tasks.items():
        for seed in seeds:
            shots, validation, wordings = task.draw(sizes, seed)
            parts = {"shots": shots, "validation": validation, "test": task.test}
            # A shape depends on the job alone: dropout draws as many numbers as a batch has places.
            shapes = [
                _shape(list(parts.values()), feature_lengths, with_choices)
                for with_choices in (choices_in_training, choices_in_evaluation)
            ]
            numbers = {"num_shots": len(shots) // wordings, "wordings": wordings}
            shapes = dict(zip(("shape", "eval_shape"), shapes))
            found.append(JobData(Job(name, seed), **parts, **numbers, **shapes))
    return found


def digest(data: Sequence[JobData]) -> str:
    """A digest of all examples, as text and as the tokens that the model reads."""
    found = hashlib.sha256()
    for one in data:
        for part in (one.shots, one.validation, one.test):
            found.update(repr(list(part.examples)).encode())
            found.update(np.ascontiguousarray(part.features["encoder_input_tokens"]).data)
    return found.hexdigest()[:16]


def _shape(
    parts: Sequence[fewshot.Encoded], limits: Mapping[str, int], with_choices: bool
) -> Shape:
    longest = lambda name: max(
        int(np.max(np.sum(part.features[name] != part.ids.pad, axis=1), initial=1))
        for part in parts
        if len(part)
    )
    inputs = inference.padded_length(longest("encoder_input_tokens"), limits["inputs"])
    choices = [c for part in parts for c in part.features.get(fewshot.CHOICES, ())]
    if not (choices and with_choices):
        targets = inference.padded_length(longest("decoder_target_tokens"), limits["targets"])
        return Shape(inputs, targets, 0)
    together = max(sum(map(len, example)) for example in choices)
    return Shape(inputs, 1 << (max(together, 16) - 1).bit_length(), max(map(len, choices)))


def arrays(encoded: fewshot.Encoded, rows: Sequence[int] | slice, shape: Shape) -> Batch:
    """Model features of some rows, as long as `shape` says."""
    features = encoded.features
    batch = {"encoder_input_tokens": features["encoder_input_tokens"][rows, : shape.inputs]}
    if not shape.num_choices:
        for name in ("decoder_input_tokens", "decoder_target_tokens"):
            batch[name] = features[name][rows, : shape.targets]
        return batch
    places = range(len(encoded))[rows] if isinstance(rows, slice) else rows
    chosen = [features[fewshot.CHOICES][place] for place in places]
    return {
        **batch,
        **scoring.pack_choices(chosen, shape.targets, encoded.ids),
        few_shot.GOLD: features[few_shot.GOLD][rows],
    }


def tables(data: Sequence[JobData], num_rows: int) -> Batch:
    """Shots of every run, [R, num_rows + 1, ...]; rows after a run's last one are padding."""
    found = []
    for one in data:
        batch = arrays(one.shots, slice(None), one.shape)
        found.append(batches.filled_up(batch, num_rows + 1, one.shots.ids.pad))
    return {name: np.stack([batch[name] for batch in found]) for name in found[0]}


def chunks(parts: Sequence[fewshot.Encoded], shape: Shape, size: int) -> Iterator[Batch]:
    """All examples of every run, `size` rows of each at a time, [R, size, ...]."""
    for start in range(0, max(map(len, parts)), size):
        some = slice(start, start + size)
        found = [batches.filled_up(arrays(p, some, shape), size, p.ids.pad) for p in parts]
        yield {name: np.stack([batch[name] for batch in found]) for name in found[0]}

"""33 few-shot runs as one fleet against the same runs one after another.

Eleven tasks of the CLDR suite with three seeds each adapt the backbone that ships with it, in
groups as `moe-peft adapt` makes them, and one after another in two ways: as fleets of one, and step
by step as `moe-peft train` goes. Everything is compiled once, before the first round; a round makes
the same steps and one evaluation of every run, all three ways.

On a CPU every core is a device for the fleet (`--devices 1` for one device with all cores); a run
on its own has one device with all cores.

    python benchmarks/fleet.py [--method lora|mhr] [--rounds 5] [--steps 20] [--width 8]
        [--devices 2] [--output fleet.json]
"""

import argparse
import os


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=("lora", "mhr"), default="lora")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--width", type=int, help="runs of a group; default: all")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--devices", type=int, default=cores, help="CPU devices of the fleet")
    parser.add_argument("--output", help="JSON file for the figures")
    return parser.parse_args()


OPTIONS = _options()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={OPTIONS.devices}"
)

import jax
import measure
import numpy as np

from moe_peft import methods, patching
from moe_peft.data import fewshot, lookup
from moe_peft.evaluation import fewshot_scores
from moe_peft.models import encoder_decoder, few_shot, t5
from moe_peft.partitioning import mesh as mesh_lib
import moe_peft.tasks.cldr  # noqa: F401  # registers the tasks
from moe_peft.training import fleet as fleet_lib
from moe_peft.training import fleet_data, fleet_start, optimizers, preparation, schedules
from moe_peft.training import state as state_lib
from moe_peft.training import step as step_lib

LENGTHS = {"inputs": 56, "targets": 28}
OPEN = ("number", "percent", "currency", "date", "day", "unit", "relative", "list")
TASKS = [f"cldr_{name}_{locale}" for locale in ("gl", "ms") for name in OPEN][:11]
SEEDS = (0, 1, 2)
CONFIG = t5.T5Config(
    vocab_size=272,
    emb_dim=128,
    num_heads=8,
    head_dim=16,
    mlp_dim=384,
    num_encoder_layers=3,
    num_decoder_layers=2,
    mlp_activations=("gelu", "linear"),
    logits_via_embedding=True,
    dropout_rate=0.0,
)
METHODS = {
    "lora": lambda: methods.lora(),
    "mhr": lambda: methods.mhr(num_tasks=1, num_skills=8, num_splits=8, rank=1),
}


class Runs:
    """Some of the jobs, stacked, with their states."""

    def __init__(self, fleet, start, optimizer, data, batch_size, steps):
        self._fleet, self._num_runs = fleet, len(data)
        jobs = [one.job for one in data]
        seeds = [job.key_seed for job in jobs]
        self._states = fleet.create(start.trainables(jobs), optimizer, seeds)
        num_rows = max(len(one.shots) for one in data)
        self._tables = fleet.put(fleet_data.tables(data, num_rows))
        rows = np.stack([one.schedule(batch_size, range(steps)) for one in data])
        self._rows, self._steps = fleet.put(rows), steps
        parts = [one.validation for one in data]
        self._chunks = list(fleet_data.chunks(parts, data[0].eval_shape, 16))

    def train(self):
        """A few steps and an evaluation; returns the losses."""
        active = np.ones(self._num_runs, bool)
        self._states, _, found = self._fleet.advance(
            self._states, active, self._tables, self._rows, 0, self._steps
        )
        return found.losses

    def evaluate(self):
        """Scores of the validation examples."""
        return self._fleet.score(self._states.trainable, self._chunks, self._num_runs)[0]

    def both(self):
        """Steps, then the evaluation."""
        return self.train(), self.evaluate()


class StepByStep:
    """One run as `moe-peft train` makes it: a jitted step at a time, batches put as they come."""

    def __init__(self, step, score, start, optimizer, one, batch_size, num_steps):
        self._step, self._score, self._frozen = step, score, start.frozen
        (trainable,) = start.trainables([one.job])
        self._state = state_lib.create(trainable, optimizer, one.job.key_seed)
        self._one, self._rows = one, one.schedule(batch_size, range(num_steps))
        self._eval = list(fleet_data.chunks([one.validation], one.eval_shape, 16))

    def both(self):
        """A few steps and an evaluation."""
        for rows in self._rows:
            batch = jax.device_put(fleet_data.arrays(self._one.shots, rows, self._one.shape))
            self._state, metrics = self._step(self._state, self._frozen, batch)
        trainable = self._state.trainable
        found = [
            self._score(self._frozen, trainable, {k: v[0] for k, v in chunk.items()})
            for chunk in self._eval
        ]
        return metrics, found


def main() -> None:
    """Measures, prints, saves."""
    options = OPTIONS
    sizes = fewshot.Sizes(shots=16, validation=4, wordings=4)
    tasks = {name: fewshot.Task(name, LENGTHS, "validation", False) for name in TASKS}
    data = fleet_data.read(tasks, sizes, SEEDS, LENGTHS, False, False)
    assert len({(one.shape, one.eval_shape) for one in data}) == 1
    lookup.check_vocabulary("cldr_fewshot", CONFIG.vocab_size)
    method = METHODS[options.method]()
    module = t5.Transformer(CONFIG)
    model = encoder_decoder.EncoderDecoder(method.patch(module), method=method)
    first = fleet_data.arrays(data[0].shots, slice(0, 1), data[0].shape)
    shapes = {name: rows.shape for name, rows in first.items()}
    base = encoder_decoder.EncoderDecoder(module)
    start = fleet_start.Start(
        preparation.Start(model, base, method, shapes), "embedded:cldr_tiny", None, "float32"
    )
    (trainable,) = start.trainables([data[0].job])
    optimizer = optimizers.adamw(schedules.constant(1e-3), clip_norm=1.0).build(
        trainable, method.learning_rate_group
    )
    update = step_lib.make_update(
        few_shot.FewShotModel(model, few_shot.FewShotLoss(1.0, 0.0, 0.0)),
        optimizer,
        patching.merge,
    )
    score = fewshot_scores.score_rows(model, 0, True)
    fleet_of = lambda width, devices: fleet_lib.Fleet(
        *(update, score, start.frozen, width), mesh_lib.make_mesh(devices=devices)
    )
    setting = (options.batch_size, options.steps)
    devices = jax.devices()
    width = options.width or len(data)
    fleet, together, left = fleet_of(width, devices), [], list(data)
    for size in fleet_lib.group_sizes(len(data), width):
        together.append(Runs(fleet, start, optimizer, left[:size], *setting))
        left = left[size:]
    alone = fleet_of(1, devices[:1])
    apart = [Runs(alone, start, optimizer, [one], *setting) for one in data]
    step, score_one = jax.jit(update, donate_argnums=0), jax.jit(score)
    plain = [StepByStep(step, score_one, start, optimizer, one, *setting) for one in data]
    calls = {
        "33 runs as a fleet": lambda: [runs.both() for runs in together],
        "fleets of one, one after another": lambda: [runs.both() for runs in apart],
        "step by step, one after another": lambda: [run.both() for run in plain],
    }
    timings = measure.paired(calls, reference="33 runs as a fleet", rounds=options.rounds)
    rows = [
        [name, *(f"{1000 * x:.0f}" for x in timing.seconds), *(f"{x:.2f}" for x in timing.ratio)]
        for name, timing in timings.items()
    ]
    columns = ["", "ms, low", "median", "high", "ratio, low", "median", "high"]
    print(measure.hardware())
    measure.show(
        f"{options.method}: {options.steps} steps of batch {options.batch_size} and 16 evaluated "
        f"examples of each run; {len(together)} groups of {width} on {len(devices)} devices",
        columns,
        rows,
    )
    measure.save(
        options.output,
        {
            "benchmark": "fleet",
            "method": options.method,
            "steps": options.steps,
            "batch_size": options.batch_size,
            "width": width,
            "devices": len(devices),
            "seconds": {name: timing.seconds for name, timing in timings.items()},
            "over_fleet": {name: timing.ratio for name, timing in timings.items()},
        },
    )


if __name__ == "__main__":
    main()

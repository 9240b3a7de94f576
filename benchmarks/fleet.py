"""33 few-shot runs mapped in one program against the same runs one after another.

Eleven tasks of the CLDR suite with three seeds each adapt the backbone that ships with it, in
groups as `moe-peft adapt` makes them, and one after another in two ways: as groups of one run, and
step by step as `moe-peft train` goes. Everything is compiled once, before the first round; a round
makes the same steps and one evaluation of every run, all three ways.

On a CPU every core is a device for the mapped runs (`--devices 1` for one device with all cores); a
run on its own has one device with all cores. `--examples F` writes the drawn examples to a file, or
reads them from it: where it exists, neither SeqIO nor TensorFlow is needed.

    python benchmarks/fleet.py [--method lora|mhr] [--rounds 5] [--steps 20] [--width 8]
        [--devices 2] [--examples examples.npz] [--output fleet.json]
"""

import argparse
import os
import pathlib


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=("lora", "mhr"), default="lora")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--width", type=int, help="runs of a group; default: all")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--devices", type=int, default=cores, help="CPU devices of the mapped runs")
    parser.add_argument("--examples", help="file that keeps the examples")
    parser.add_argument("--output", help="JSON file for the figures")
    return parser.parse_args()


OPTIONS = _options()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={OPTIONS.devices}"
)

import jax
import jax.numpy as jnp
import measure
import numpy as np

from moe_peft import methods, patching
from moe_peft.adaptation import programs
from moe_peft.adaptation import scores as scores_lib
from moe_peft.models import encoder_decoder, few_shot, t5
from moe_peft.partitioning import mesh as mesh_lib
from moe_peft.training import optimizers, schedules
from moe_peft.training import step as step_lib
from moe_peft.weights import backbone

BACKBONE = "embedded:cldr_tiny"
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
    """Some of the runs, stacked, with their states."""

    def __init__(self, mapped, trainables, optimizer, examples, members):
        self._mapped, self._num_runs, self._num_steps = (
            mapped,
            len(members),
            len(examples["rows"][0]),
        )
        self._states = mapped.create_states([trainables[i] for i in members], optimizer, members)
        self._tables = mapped.to_devices(
            {k: v[members] for k, v in _part(examples, "shots").items()}
        )
        self._rows = mapped.to_devices(examples["rows"][members])
        self._chunk = {k: v[members] for k, v in _part(examples, "evaluated").items()}

    def both(self):
        """A few steps, then an evaluation."""
        active = np.ones(self._num_runs, bool)
        self._states, _, found = self._mapped.advance(
            self._states, active, self._tables, self._rows, 0, self._num_steps
        )
        scores = self._mapped.score(self._states.trainable, [self._chunk], self._num_runs)
        return found.losses, scores


class StepByStep:
    """One run as `moe-peft train` makes it: a jitted step at a time, batches put as they come."""

    def __init__(self, step, score, frozen, trainable, optimizer, examples, run):
        self._step, self._score, self._frozen = step, score, frozen
        self._state = step_lib.create_state(trainable, optimizer, run)
        self._shots = {k: v[run] for k, v in _part(examples, "shots").items()}
        self._rows = examples["rows"][run]
        self._chunk = {k: v[run] for k, v in _part(examples, "evaluated").items()}

    def both(self):
        """A few steps, then an evaluation."""
        for rows in self._rows:
            batch = jax.device_put({name: values[rows] for name, values in self._shots.items()})
            self._state, metrics = self._step(self._state, self._frozen, batch)
        return metrics, self._score(self._frozen, self._state.trainable, self._chunk)


def draw(batch_size: int, num_steps: int) -> dict[str, np.ndarray]:
    """Examples of all runs: "shots/..." [R, n, ...], "rows" [R, steps, b], "evaluated/..."."""
    from moe_peft.adaptation import data as data_lib
    from moe_peft.data import fewshot, lookup
    import moe_peft.tasks.cldr  # noqa: F401  # registers the tasks

    sizes = fewshot.Sizes(shots=16, validation=4, wordings=4)
    tasks = {name: fewshot.Task(name, LENGTHS, "validation", False) for name in TASKS}
    data = data_lib.read(tasks, sizes, SEEDS, LENGTHS, False, False)
    assert len({(one.shape, one.eval_shape) for one in data}) == 1
    lookup.check_vocabulary("cldr_fewshot", CONFIG.vocab_size)
    shots = data_lib.tables(data, max(len(one.shots) for one in data))
    parts = [one.validation for one in data]
    (evaluated,) = data_lib.chunks(parts, data[0].eval_shape, 16)
    return {
        **{f"shots/{name}": values for name, values in shots.items()},
        **{f"evaluated/{name}": values for name, values in evaluated.items()},
        "rows": np.stack([one.schedule(batch_size, range(num_steps)) for one in data]),
    }


def _part(examples, name: str) -> dict[str, np.ndarray]:
    return {
        key.removeprefix(f"{name}/"): values
        for key, values in examples.items()
        if key.startswith(f"{name}/")
    }


def read(options: argparse.Namespace) -> dict[str, np.ndarray]:
    """`draw`, kept in `--examples`."""
    path = pathlib.Path(options.examples) if options.examples else None
    if path and path.exists():
        examples = dict(np.load(path))
    else:
        examples = draw(options.batch_size, options.steps)
    if path and not path.exists():
        np.savez_compressed(path, **examples)
    wanted = (options.steps, options.batch_size)
    if examples["rows"].shape[1:] != wanted:
        raise SystemExit(f"{path} holds {examples['rows'].shape[1:]} steps and rows, not {wanted}.")
    return examples


def main() -> None:
    """Measures, prints, saves."""
    options = OPTIONS
    examples = read(options)
    num_runs = len(examples["rows"])
    method = METHODS[options.method]()
    module = t5.Transformer(CONFIG)
    model = encoder_decoder.EncoderDecoder(method.patch(module), method=method)
    base = encoder_decoder.EncoderDecoder(module)
    shapes = {name: (1, *rows.shape[2:]) for name, rows in _part(examples, "shots").items()}
    init = lambda rng: base.init(rng, shapes)
    loaded = backbone.load(BACKBONE, jax.eval_shape(init, jax.random.key(0)), init)
    frozen = jax.tree.map(jnp.asarray, loaded.params)
    own = jax.jit(lambda seed: method.split(model.init(jax.random.key(seed), shapes))[1])
    trainables = [jax.tree.map(np.asarray, own(run)) for run in range(num_runs)]
    rate = schedules.constant(1e-3)
    optimizer = optimizers.adamw(rate, clip_norm=1.0).build(
        trainables[0], method.learning_rate_group
    )
    update = step_lib.make_update(
        few_shot.FewShotModel(model, few_shot.FewShotLoss(1.0, 0.0, 0.0)),
        optimizer,
        patching.merge,
    )
    score = scores_lib.score_rows(model, 0, True)
    mapped_runs = lambda width, devices: programs.MappedRuns(
        *(update, score, frozen, width), mesh_lib.make_mesh(devices=devices)
    )
    setting = (trainables, optimizer, examples)
    devices, width = jax.devices(), options.width or num_runs
    mapped, together, left = mapped_runs(width, devices), [], np.arange(num_runs)
    for size in programs.group_sizes(num_runs, width):
        together.append(Runs(mapped, *setting, left[:size]))
        left = left[size:]
    alone = mapped_runs(1, devices[:1])
    apart = [Runs(alone, *setting, np.array([run])) for run in range(num_runs)]
    step, score_one = jax.jit(update, donate_argnums=0), jax.jit(score)
    plain = [
        StepByStep(step, score_one, frozen, trainable, optimizer, examples, run)
        for run, trainable in enumerate(trainables)
    ]
    calls = {
        "33 mapped runs": lambda: [runs.both() for runs in together],
        "groups of one run, one after another": lambda: [runs.both() for runs in apart],
        "step by step, one after another": lambda: [run.both() for run in plain],
    }
    timings = measure.paired(calls, reference="33 mapped runs", rounds=options.rounds)
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
            "over_mapped_runs": {name: timing.ratio for name, timing in timings.items()},
        },
    )


if __name__ == "__main__":
    main()

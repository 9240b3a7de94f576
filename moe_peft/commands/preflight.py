"""`preflight`: compiles a train step for hardware one does not have, and says whether it fits."""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import json
import sys
import time
from typing import Any

from flax import linen as nn
import gin
import jax
import jax.numpy as jnp
import rich.box
import rich.console
import rich.table

from moe_peft import errors, methods, patching
from moe_peft.models import encoder_decoder, t5
from moe_peft.partitioning import layout as layout_lib
from moe_peft.partitioning import mesh as mesh_lib
from moe_peft.partitioning import program, targets
from moe_peft.training import optimizers, preparation
from moe_peft.training import state as state_lib
from moe_peft.training import step as step_lib

_DOES_NOT_FIT = "exceed"  # in what the TPU compiler says of a program that is too large


@dataclasses.dataclass(frozen=True)
class Setting:
    """What may be changed to make a step fit.

    Attributes:
      data, fsdp, model: sizes of the mesh.
      num_microbatches: parts of a batch, one after another.
      remat_policy: of `T5Config`.
    """

    data: int
    fsdp: int
    model: int
    num_microbatches: int
    remat_policy: str

    def __str__(self) -> str:
        mesh = f"data {self.data} x fsdp {self.fsdp} x model {self.model}"
        return f"{mesh}, {self.num_microbatches} micro-batches, remat {self.remat_policy}"


@dataclasses.dataclass(frozen=True)
class Flight:
    """What is known of one compiled step; bytes and operations are of one chip.

    Attributes:
      setting: of it.
      target: name of the hardware.
      capacity: memory of a chip.
      memory: planned; None where the compiler refused the program.
      refused: what the compiler said then.
      operations: of matrix products.
      bytes_accessed: of the chip's memory; loops counted once, as the compiler reports it.
      collectives: by kind.
      bounds: seconds that arithmetic, memory (each argument read once) and links need at least.
      compile_seconds: tracing included.
    """

    setting: Setting
    target: str
    capacity: float
    memory: program.Memory | None
    refused: str
    operations: float
    bytes_accessed: float
    collectives: Mapping[str, program.Collective]
    bounds: Mapping[str, float]
    compile_seconds: float

    @property
    def fits(self) -> bool:
        """Whether a chip's memory suffices."""
        return self.memory is not None and self.memory.peak <= self.capacity

    @property
    def seconds(self) -> float:
        """A step takes at least that long (roofline)."""
        return max(self.bounds.values(), default=0.0)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self) | {"fits": self.fits, "seconds_at_least": self.seconds}


@gin.configurable("preflight", module="commands")
@dataclasses.dataclass(frozen=True)
class Experiment:
    """What `moe-peft train` would run, from the same gin files; see `training.train`."""

    model: nn.Module = gin.REQUIRED
    method: methods.Method = gin.REQUIRED
    optimizer: optimizers.Optimizer = gin.REQUIRED
    feature_lengths: Mapping[str, int] = gin.REQUIRED
    batch_size: int = gin.REQUIRED
    frozen_dtype: str = "bfloat16"
    embedding_dim: int = 384

    def compile(self, target: targets.Target, devices: Sequence, setting: Setting) -> Flight:
        """Compiles the train step.

        Raises:
          UserError: the setting does not suit the experiment.
        """
        started = time.monotonic()
        mesh = mesh_lib.make_mesh(setting.data, setting.fsdp, setting.model, devices=devices)
        mesh_lib.check_batch_size(self.batch_size, setting.num_microbatches, mesh)
        step, arguments = self._step(mesh, setting)
        with jax.set_mesh(mesh):
            operations = program.operations(step, *arguments) / target.count
            lowered = step.lower(*arguments)
            try:
                compiled = lowered.compile()
            except jax.errors.JaxRuntimeError as error:
                if _DOES_NOT_FIT not in str(error).lower():
                    raise
                refused = " ".join(str(error).split())[:400]
                return self._flight(target, setting, None, refused, operations, started)
        return self._flight(target, setting, compiled, "", operations, started)

    def _step(self, mesh: jax.sharding.Mesh, setting: Setting):
        """(jitted step, shapes of its arguments with their shardings)."""
        config = dataclasses.replace(
            self.model.config, scan_layers=True, remat_policy=setting.remat_policy
        )
        module = self.model.clone(config=config)
        network = encoder_decoder.EncoderDecoder(self.method.patch(module), method=self.method)
        shapes = self._batch()
        begin = preparation.Start(network, None, self.method, shapes)
        axes, layout = begin.logical_axes(), layout_lib.Layout(mesh)
        params = jax.eval_shape(lambda rng: network.init(rng, shapes), jax.random.key(0))
        frozen, trainable = self.method.split(params)
        dtype = jnp.dtype(self.frozen_dtype)
        frozen = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), frozen)
        transform = self.optimizer.build(trainable, self.method.learning_rate_group)
        state = jax.eval_shape(lambda tree: state_lib.create(tree, transform, 0), trainable)
        places = layout.like(state, layout.shardings(trainable, axes), trainable)
        batch = {
            name: jax.ShapeDtypeStruct(
                shape,
                jnp.float32 if name in encoder_decoder.FLOAT_FEATURES else jnp.int32,
                sharding=mesh_lib.batch_sharding(mesh),
            )
            for name, shape in shapes.items()
        }
        step = step_lib.make_train_step(
            network,
            transform,
            patching.merge,
            setting.num_microbatches,
            layout=layout,
            out_shardings=(places, layout.everywhere),
        )
        return step, (_at(state, places), _at(frozen, layout.shardings(frozen, axes)), batch)

    def _batch(self) -> dict[str, tuple[int, ...]]:
        inputs, targets_ = self.feature_lengths["inputs"], self.feature_lengths["targets"]
        rows = self.batch_size
        return {
            "encoder_input_tokens": (rows, inputs),
            "decoder_input_tokens": (rows, targets_),
            "decoder_target_tokens": (rows, targets_),
            # A step that does not look at these does not get them either.
            "task_ids": (rows,),
            "sentence_embeddings": (rows, self.embedding_dim),
        }

    def _flight(self, target, setting, compiled, refused, operations, started) -> Flight:
        memory, collectives, accessed = None, {}, 0.0
        bounds = {"arithmetic": operations / target.chip.flops}
        if compiled is not None:
            memory = program.memory(compiled)
            collectives = program.collectives(compiled.as_text())
            costs = compiled.cost_analysis() or {}
            accessed = float(costs.get("bytes accessed", 0.0))
            bounds["memory"] = max(memory.arguments, accessed) / target.chip.bandwidth
            sent = sum(each.num_bytes for each in collectives.values())
            bounds["links"] = sent / target.chip.link
        return Flight(
            setting,
            target.name,
            target.chip.memory,
            memory,
            refused,
            operations,
            accessed,
            collectives,
            bounds,
            time.monotonic() - started,
        )


def _at(tree, shardings):
    give = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    return jax.tree.map(give, tree, shardings)


def meshes(count: int) -> list[tuple[int, int, int]]:
    """(data, fsdp, model) of so many devices, powers of two, `model` at most 16."""
    found = []
    for model, fsdp in itertools.product([1, 2, 4, 8, 16], [1, 2, 4, 8, 16, 32, 64, 128, 256]):
        if count % (model * fsdp) == 0:
            found.append((count // (model * fsdp), fsdp, model))
    return found


def parse_mesh(text: str, count: int) -> tuple[int, int, int]:
    """Reads "data=4,model=4"; data is what the others leave over unless it is given.

    Raises:
      UserError: another form, or the product is not the number of devices.
    """
    sizes = {"fsdp": 1, "model": 1}
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        errors.check_one_of("An axis of --mesh", name.strip(), mesh_lib.AXES)
        if not size.isdecimal() or not int(size):
            raise errors.UserError(f"--mesh is {text!r}; expected sizes, as in data=4,model=4.")
        sizes[name.strip()] = int(size)
    data = sizes.get("data", max(count // (sizes["fsdp"] * sizes["model"]), 1))
    if data * sizes["fsdp"] * sizes["model"] != count:
        raise errors.UserError(
            f"--mesh {text!r} is {data} x {sizes['fsdp']} x {sizes['model']}, but the target has "
            f"{count} devices."
        )
    return data, sizes["fsdp"], sizes["model"]


def search(
    experiment: Experiment,
    target: targets.Target,
    policies: Sequence[str] = ("minimal", "full"),
    microbatches: Sequence[int] = (1, 2, 4),
) -> list[Flight]:
    """Compiles what may fit, and ranks it: what fits first, by the bound on the step's time.

    For every mesh, less and less memory is asked for until the step fits.
    """
    devices, found = target.devices(), []
    for shape in meshes(target.count):
        for parts, policy in itertools.product(microbatches, policies):
            setting = Setting(*shape, parts, policy)
            try:
                flight = experiment.compile(target, devices, setting)
            except errors.UserError as error:
                print(f"{setting}: {error}", file=sys.stderr, flush=True)
                break
            found.append(flight)
            print(f"{setting}: {summary(flight)}", file=sys.stderr, flush=True)
            if flight.fits:
                break
    return sorted(found, key=lambda flight: (not flight.fits, flight.seconds))


def summary(flight: Flight) -> str:
    """One line: memory and the bound on the time of a step."""
    bound = f"at least {flight.seconds * 1e3:.0f} ms a step"
    if flight.memory is None:
        return f"refused by the compiler: {flight.refused}"
    peak, capacity = flight.memory.peak / 1e9, flight.capacity / 1e9
    if flight.fits:
        return f"{peak:.2f} of {capacity:.1f} GB a chip, {bound}"
    return f"does not fit: {peak:.2f} GB a chip, {peak - capacity:.2f} more than there are"


def advice(flight: Flight) -> str:
    """What would help a step that does not fit."""
    setting, tried = flight.setting, []
    if setting.remat_policy != "full":
        tried.append("--remat full")
    tried.append(f"--microbatches {2 * setting.num_microbatches}")
    if flight.memory is not None and flight.memory.arguments > 0.5 * flight.capacity:
        tried.insert(0, "a mesh with more fsdp or model, which splits the weights")
    return f"Try {', or '.join(tried)}; --search tries them all."


def show(flight: Flight, price: float | None, target: targets.Target) -> None:
    """Prints a flight as tables."""
    console = rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(width=120)
    title = f"{target.count} x {target.chip.name}, {flight.setting}"
    table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, title_justify="left")
    table.add_column("a chip and step")
    table.add_column("", justify="right")
    if flight.memory is not None:
        for name in ("arguments", "temporaries", "peak"):
            table.add_row(f"memory, {name}", f"{getattr(flight.memory, name) / 1e9:.2f} GB")
        table.add_row("memory there is", f"{flight.capacity / 1e9:.2f} GB")
    table.add_row("operations", f"{flight.operations / 1e12:.2f} TFLOP")
    if flight.bytes_accessed:  # GPU compilers do not say.
        table.add_row("bytes accessed, loops once", f"{flight.bytes_accessed / 1e9:.2f} GB")
    for kind, each in flight.collectives.items():
        table.add_row(f"{kind}, {each.count} times", f"{each.num_bytes / 1e6:.1f} MB")
    for name, seconds in flight.bounds.items():
        table.add_row(f"time, {name} at least", f"{seconds * 1e3:.1f} ms")
    if price is not None:
        cost = price * target.count * flight.seconds / 3600 * 1000
        table.add_row(f"1,000 steps at {price:g} a chip and hour", f"at least {cost:.2f}")
    table.add_row("compiled in", f"{flight.compile_seconds:.0f} s")
    console.print(table)
    print(summary(flight))
    if not flight.fits:
        print(advice(flight))


def show_ranked(flights: Sequence[Flight]) -> None:
    """Prints what a search found, the best first."""
    console = rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(width=120)
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for column in ("mesh, micro-batches, remat", "peak GB", "of", "ms at least", "bound by"):
        table.add_column(column, justify="left" if "mesh" in column else "right")
    for flight in flights:
        peak = "refused" if flight.memory is None else f"{flight.memory.peak / 1e9:.2f}"
        bound = max(flight.bounds, key=flight.bounds.get)
        table.add_row(
            str(flight.setting),
            peak if flight.fits else f"[red]{peak}[/red]",
            f"{flight.capacity / 1e9:.1f}",
            f"{flight.seconds * 1e3:.0f}",
            bound,
        )
    console.print(table)


def run(
    experiment: Experiment,
    target: targets.Target,
    mesh: str,
    microbatches: int,
    remat: str,
    price: float | None,
    is_search: bool,
    as_json: bool,
) -> int:
    """The command; 1 if the step, or every one that was tried, does not fit."""
    errors.check_one_of("--remat", remat, t5.REMAT_POLICIES)
    if is_search:
        flights = search(experiment, target)
    else:
        setting = Setting(*parse_mesh(mesh, target.count), microbatches, remat)
        flights = [experiment.compile(target, target.devices(), setting)]
    if as_json:
        print(json.dumps([flight.to_json() for flight in flights], indent=1))
    elif is_search:
        show_ranked(flights)
    else:
        show(flights[0], price, target)
    return int(not any(flight.fits for flight in flights))

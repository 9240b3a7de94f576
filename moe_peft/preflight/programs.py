"""What `preflight` compiles: the programs of training and evaluation, from shapes alone."""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
from typing import Any

from flax import linen as nn
import gin
import jax
import jax.numpy as jnp

from moe_peft import errors, methods, patching
from moe_peft.evaluation import inference
from moe_peft.models import batches, encoder_decoder
from moe_peft.models import decoding as decoding_lib
from moe_peft.partitioning import layout as layout_lib
from moe_peft.partitioning import mesh as mesh_lib
from moe_peft.preflight import compiled, hardware
from moe_peft.training import optimizers, start
from moe_peft.training import step as step_lib
from moe_peft.weights import identity

PROGRAMS = ("train", "eval", "decode")


@gin.configurable("preflight", module="commands")
@dataclasses.dataclass(frozen=True)
class Experiment:
    """What `moe-peft train` and `eval` would run, from the same gin files; see `training.train`."""

    model: nn.Module = gin.REQUIRED
    method: methods.Method = gin.REQUIRED
    optimizer: optimizers.Optimizer = gin.REQUIRED
    feature_lengths: Mapping[str, int] = gin.REQUIRED
    batch_size: int = gin.REQUIRED
    frozen_dtype: str = "bfloat16"
    embedding_dim: int = 384  # width of sentence embeddings, for methods that route by them
    loss: encoder_decoder.LossConfig | None = None
    pack: bool | None = None  # whether training packs; None for what the files say of `train.pack`
    eval_batch_size: int = 64  # rows of a batch of evaluation
    # Whether evaluation scores choices; None for what the files say of `Evaluator.rank_choices`.
    # Choices of an example stand in a row as long as targets.
    rank_choices: bool | None = None
    num_choices: int = 4  # of an example
    decoding: decoding_lib.Strategy = decoding_lib.Greedy()  # of "decode"

    def compile(
        self,
        target: hardware.Target,
        devices: Sequence,
        choice: compiled.Choice,
        program: str = "train",
        *,
        is_quick: bool = False,
    ) -> compiled.CompiledProgram:
        """Compiles one of `PROGRAMS`; a UserError if the choice does not suit the experiment."""
        if program != "train" and choice.num_microbatches > 1:
            raise errors.UserError(f"--microbatches belong to training, not to {program}.")
        mesh = mesh_lib.make_mesh(choice.data, choice.fsdp, choice.model, devices=devices)
        mesh_lib.check_batch_size(self.rows(program), choice.num_microbatches, mesh)
        if program == "train":
            made = self.train_program(mesh, choice)
        else:
            made = self.eval_program(mesh, is_decoding=program == "decode")
        return compiled.compile_program(made, target, choice, is_quick=is_quick)

    def rows(self, program: str) -> int:
        """Rows of a batch."""
        return self.batch_size if program == "train" else self.eval_batch_size

    def describe(self) -> dict[str, Any]:
        """What decides how the programs come out, as json types."""
        parts = {
            "model": identity.describe_model(self.model),
            "method": self.method.describe(),
            "optimizer": self.optimizer.describe(),
            "loss": dataclasses.asdict(self.loss or encoder_decoder.LossConfig()),
        }
        more = {"batch": self._train_batch(), "frozen_dtype": self.frozen_dtype}
        return identity.as_json(parts | more)

    def weight_bytes(self) -> tuple[int, int]:
        """(frozen, trainable) bytes of one whole copy."""
        begin = self._start(self._train_batch(), scan_layers=True)  # as compiled; soon counted
        return tuple(map(step_lib.num_bytes, self._trees(begin)))

    def train_program(self, mesh: jax.sharding.Mesh, choice: compiled.Choice) -> compiled.Program:
        """The jitted step with the shapes of state, frozen weights and batch."""
        layers = {"scan_layers": True, "remat_policy": choice.remat_policy}
        begin = self._start(self._train_batch(), **layers)
        axes, layout = begin.logical_axes(), layout_lib.Layout(mesh)
        frozen, trainable = self._trees(begin)
        group_of = self.method.learning_rate_group
        transform = self.optimizer.build(trainable, group_of)
        state = jax.eval_shape(lambda tree: step_lib.create_state(tree, transform, 0), trainable)
        places = layout.optimizer_shardings(state, layout.shardings(trainable, axes), trainable)
        rates = self.optimizer.learning_rates(trainable, group_of)
        what = begin.model, transform, patching.merge, choice.num_microbatches, rates
        out = (places, layout.replicated)
        step = step_lib.make_train_step(*what, layout=layout, out_shardings=out)
        weights = _with_shardings(frozen, layout.shardings(frozen, axes))
        batch = _batch_on(begin.batch_shapes, mesh)
        return compiled.Program(step, (_with_shardings(state, places), weights, batch), mesh)

    def eval_program(self, mesh: jax.sharding.Mesh, *, is_decoding: bool) -> compiled.Program:
        """What `moe-peft eval` runs for a full batch: choices, exact match, or decoding."""
        shapes = self._batch(self.eval_batch_size, is_packed=False)
        begin = self._start(shapes, scan_layers=True, remat_policy="none")
        params = patching.merge(*self._trees(begin))
        shardings = layout_lib.Layout(mesh).shardings(params, begin.logical_axes())
        params = _with_shardings(params, shardings)
        jitted, loops, again = inference.programs(begin.model, mesh), 1, 0.0
        if is_decoding:
            shapes = {name: size for name, size in shapes.items() if "decoder" not in name}
            loops = self.feature_lengths["targets"]
            again = compiled.bytes_of_device(params["decoder"])
            strategy = dataclasses.replace(self.decoding, max_decode_length=loops)
            step = jax.jit(lambda params, batch: jitted.predict(params, batch, strategy))
        elif _or_in_files(self.rank_choices, "Evaluator.rank_choices"):
            shapes["decoder_segment_ids"] = shapes["decoder_target_tokens"]
            rank = jitted.rank_choices
            step = jax.jit(lambda params, batch: rank(params, batch, self.num_choices, False))
        else:
            step = jitted.exact_match
        return compiled.Program(step, (params, _batch_on(shapes, mesh)), mesh, loops, again)

    def _start(self, shapes: Mapping[str, tuple[int, ...]], **layout: Any) -> start.Start:
        """Where a run starts; `layout` changes the model's config."""
        loss = self.loss or encoder_decoder.LossConfig()
        module = self.model.clone(config=dataclasses.replace(self.model.config, **layout))
        network = encoder_decoder.EncoderDecoder(self.method.patch(module), loss, self.method)
        return start.Start(network, None, self.method, shapes)

    def _trees(self, begin: start.Start):
        """Shapes of (frozen, trainable) as they are stored."""
        init = lambda rng: begin.model.init(rng, begin.batch_shapes)
        frozen, trainable = self.method.split(jax.eval_shape(init, jax.random.key(0)))
        dtype = jnp.dtype(self.frozen_dtype)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), frozen), trainable

    def _train_batch(self) -> dict[str, tuple[int, ...]]:
        return self._batch(self.batch_size, _or_in_files(self.pack, "train.pack"))

    def _batch(self, rows: int, is_packed: bool) -> dict[str, tuple[int, ...]]:
        inputs, targets = self.feature_lengths["inputs"], self.feature_lengths["targets"]
        shapes = {
            "encoder_input_tokens": (rows, inputs),
            "decoder_input_tokens": (rows, targets),
            "decoder_target_tokens": (rows, targets),
            # A step that does not look at these does not get them either.
            "task_ids": (rows,),
            "sentence_embeddings": (rows, self.embedding_dim),
        }
        if is_packed:
            for name in ("segment_ids", "positions"):
                shapes |= {f"encoder_{name}": (rows, inputs), f"decoder_{name}": (rows, targets)}
        return shapes


def _or_in_files(value: bool | None, name: str) -> bool:
    """A setting; if it is None, what gin says of a parameter that another command reads."""
    with contextlib.suppress(ValueError):  # none is bound
        return gin.query_parameter(name) if value is None else value
    return False


def _batch_on(shapes: Mapping[str, tuple[int, ...]], mesh: jax.sharding.Mesh) -> dict[str, Any]:
    place = mesh_lib.batch_sharding(mesh)
    kind = lambda name: jnp.float32 if name in batches.FLOAT_FEATURES else jnp.int32
    return {n: jax.ShapeDtypeStruct(s, kind(n), sharding=place) for n, s in shapes.items()}


def _with_shardings(tree, shardings):
    put_on = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    return jax.tree.map(put_on, tree, shardings)

"""`moe-peft merge` writes a backbone that answers as the run does, or nothing."""

import functools

import gin
import jax
import numpy as np
import pytest

from moe_peft import methods, patching
from moe_peft.cli import main
from moe_peft.models import encoder_decoder
from moe_peft.training import start as start_lib
from moe_peft.weights import backbone, identity, merging, safetensors_files, saved_run

TINY = ["T5Config.num_encoder_layers=1", "T5Config.num_decoder_layers=1", "BACKBONE=random:0"]
SHAPES = {**dict.fromkeys(merging.TOKENS, (1, 2)), "task_ids": (1,)}


@pytest.fixture(autouse=True)
def _clean_gin():
    yield
    gin.clear_config()


@functools.cache
def start(method_name):
    main.configure("plan", ["models/tiny.gin", "methods/ia3.gin"], TINY[:2])
    module = gin.query_parameter("%MODEL").scoped_configurable_fn()
    gin.clear_config()
    method = methods.poly(3, num_skills=2) if method_name == "poly" else methods.get(method_name)()
    model = encoder_decoder.EncoderDecoder(method.patch(module), method=method)
    return start_lib.Start(model, encoder_decoder.EncoderDecoder(module), method, SHAPES)


@functools.cache
def trees(method_name):
    """What a fresh run starts from; compiling the initialisers would take longer than the rest."""
    shapes = jax.eval_shape(lambda: start(method_name).model.init(jax.random.key(0), SHAPES))
    rng = np.random.default_rng(0)
    draw = lambda leaf: (0.1 * rng.normal(size=leaf.shape)).astype(np.float32)
    frozen, trainable = start(method_name).method.split(jax.tree.map(draw, shapes))
    return start_lib.Trees(frozen, trainable, "the backbone's fingerprint")


@pytest.fixture
def run_of(monkeypatch):
    """Pretends that /run is a run of a method."""

    def pretend(method_name, spoil=1.0):
        made = trees(method_name)
        trainable = jax.tree.map(lambda leaf: spoil * leaf, made.trainable)
        method = identity.as_json(start(method_name).method.describe())
        record = {"method": method, "backbone": {"fingerprint": made.fingerprint}}
        saved = saved_run.Saved(7, trainable, {}, {"description": record})
        monkeypatch.setattr(saved_run, "load", lambda *args: saved)
        monkeypatch.setattr(start_lib.Start, "trees", lambda *args, **kwargs: made)
        return patching.merge(made.frozen, trainable)

    return pretend


def merge(method_name, path, *flags):
    settings = {
        "lora": ["METHOD=@methods.lora()"],
        "poly": ["METHOD=@methods.poly()", "poly.num_tasks=3", "poly.num_skills=2"],
        "mov": ["METHOD=@methods.mov()"],
        "full": ["METHOD=@methods.full()"],
    }[method_name]
    settings = [*TINY, *settings, "MODEL_DIR=/run", f"OUTPUTS={path}", *flags]
    return main.main(["merge", "--gin_file", "models/tiny.gin", *(f"--gin.{s}" for s in settings)])


@pytest.mark.parametrize(
    ("method_name", "task"), [pytest.param("lora", None, marks=pytest.mark.slow), ("poly", 2)]
)
def test_the_file_is_a_backbone_with_the_runs_logits(run_of, method_name, task, tmp_path, capsys):
    params = run_of(method_name)
    path = tmp_path / "deep" / "merged.safetensors"
    assert merge(method_name, path, f"TASK={task}") == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "largest difference" in printed
    assert f"wrote {path}" in printed
    adapted = start(method_name)
    loaded = backbone.load(f"file:{path}", adapted.base_shapes(), None)
    gap = merging.logit_gap(
        adapted.base_model.module, adapted.method, params, loaded.params, task, seed=5
    )
    assert gap.relative < 1e-5
    assert safetensors_files.read_metadata(path)["task"] == task
    assert safetensors_files.read_metadata(path)["step"] == 7


REFUSED = {
    "decides for every token": ("mov", "a.safetensors", []),
    "no adapters to merge": ("full", "a.safetensors", []),
    "'poly' tells 3 tasks apart, 0 to 2; name the task": ("poly", "a.safetensors", []),
    "0 to 2; task 3 is none of them": ("poly", "a.safetensors", ["TASK=3"]),
    "expected *.safetensors": ("lora", "a.bin", []),
    "TASK takes": ("poly", "a.safetensors", ["TASK=de"]),
}


@pytest.mark.parametrize("words", REFUSED)
def test_mistakes_are_one_line_and_leave_nothing(words, tmp_path, capsys):
    method_name, name, flags = REFUSED[words]
    assert merge(method_name, tmp_path / name, *flags) == main.USER_ERROR
    error = capsys.readouterr().err
    assert words.removeprefix("TASK ") in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_not_written(run_of, tmp_path, capsys):
    run_of("lora", spoil=np.nan)
    assert merge("lora", tmp_path / "a.safetensors") == main.USER_ERROR
    assert "nothing was written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

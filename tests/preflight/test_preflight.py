"""`moe-peft preflight`: what it compiles, what it says, what it refuses."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from moe_peft import errors, methods
from moe_peft.cli import main
from moe_peft.models import decoding as decoding_lib
from moe_peft.models import t5
from moe_peft.partitioning import hlo_cost
from moe_peft.preflight import command as command_lib
from moe_peft.preflight import compiled as compiled_lib
from moe_peft.preflight import hardware, programs, search, view
from moe_peft.training import optimizers

NEEDS_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed (pip install libtpu)",
)
CONFIG = t5.T5Config(
    vocab_size=64,
    emb_dim=16,
    num_heads=4,
    head_dim=4,
    mlp_dim=32,
    num_encoder_layers=1,
    num_decoder_layers=1,
    dtype="bfloat16",
    dropout_rate=0.0,
)
HERE = dataclasses.replace(hardware.find_target("v5e-8"), name="eight of this machine")


def experiment(method=None, batch_size=8):
    return programs.Experiment(
        t5.Transformer(CONFIG),
        method or methods.lora(rank=2, placement="encoder/.*/query"),
        optimizers.adafactor(1e-3),
        {"inputs": 16, "targets": 8},
        batch_size,
    )


def test_a_step_for_a_mesh_of_this_machine(capsys):
    choice = compiled_lib.Choice(2, 2, 2, 2, "full")
    made = experiment().compile(HERE, jax.devices(), choice)
    assert made.fits
    assert made.collectives["all-reduce"].count > 0
    assert made.seconds == max(made.bounds.values()) > 0
    assert made.memory.peak >= made.memory.arguments > 0
    assert json.loads(json.dumps(made.to_json()))["fits"] is True
    small = dataclasses.replace(made, capacity=10.0)
    assert not small.fits
    assert "does not fit" in view.summary(small)
    assert "--microbatches 4" in view.advice(small)
    assert "--microbatches" not in view.advice(small, "decode")
    view.show(small, "train", 2.0, HERE)
    shown = capsys.readouterr().out
    assert shown.startswith("train on 8 x v5e, data 2 x fsdp 2 x model 2, 2 micro-batches")
    assert "1,000 steps at 2 a chip and hour" in shown


def test_evaluation_is_compiled_as_it_runs():
    choice = compiled_lib.Choice(2, 2, 2, 1, "none")
    beams = decoding_lib.BeamSearch(num_beams=3)
    given = dataclasses.replace(experiment(), eval_batch_size=16, rank_choices=True, decoding=beams)
    choices, answers = (
        given.compile(HERE, jax.devices(), choice, program) for program in ("eval", "decode")
    )
    assert choices.fits
    assert choices.collectives["all-reduce"].num_bytes > 0
    assert answers.operations > 1.5 * choices.operations
    read = answers.bounds["memory"] * HERE.chip.bandwidth
    assert read > 4 * answers.memory.arguments  # the decoder's weights, for each of eight tokens


def test_evaluation_has_no_micro_batches():
    choice = compiled_lib.Choice(4, 1, 2, 2, "none")
    with pytest.raises(errors.UserError, match="belong to training"):
        experiment().compile(HERE, jax.devices(), choice, "eval")


def test_a_search_asks_for_less_until_a_step_fits(monkeypatch, capsys):
    asked = []

    def compiled(self, target, devices, choice, what, is_quick):
        asked.append(choice)
        if choice.model == 2:
            raise errors.UserError("no such mesh")
        needed = 20e9 / choice.num_microbatches / choice.fsdp
        memory = hlo_cost.Memory(0, int(needed), int(needed))
        bounds = {"arithmetic": choice.num_microbatches / choice.data}
        return compiled_lib.CompiledProgram(
            choice, "t", 16e9, memory, needed, "", 1.0, 1.0, {}, bounds, 0.0
        )

    monkeypatch.setattr(programs.Experiment, "compile", compiled)
    monkeypatch.setattr(hardware.Target, "devices", lambda self: ())
    found = search.search(experiment(), hardware.find_target("v5e-4"))
    first = [s for s in asked if (s.data, s.fsdp, s.model) == (4, 1, 1)]
    assert [(s.num_microbatches, s.remat_policy) for s in first] == [
        (1, "minimal"),
        (1, "full"),
        (2, "minimal"),
    ]
    assert [made.fits for made in found] == sorted((f.fits for f in found), reverse=True)
    assert str(found[0].choice).startswith("data 4 x fsdp 1 x model 1, 2 micro-batches")
    assert "no such mesh" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "wanted"), [("", (8, 1, 1)), ("model=4", (2, 1, 4)), ("data=1, fsdp=8", (1, 8, 1))]
)
def test_meshes_in_words(text, wanted):
    assert search.parse_mesh(text, 8) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [("modle=2", "Did you mean 'model'"), ("model=x", "expected sizes"), ("model=3", "2 x 1 x 3")],
)
def test_meshes_that_are_none(text, message):
    with pytest.raises(errors.UserError, match=message):
        search.parse_mesh(text, 8)


@pytest.mark.parametrize(
    ("program", "wanted"), [("train", (8, 1, 1, 2, "minimal")), ("eval", (8, 1, 1, 1, "none"))]
)
def test_a_mesh_by_rule(monkeypatch, program, wanted):
    asked = []

    def compiled(self, target, devices, choice, what, is_quick):
        asked.append((choice, what))
        memory = hlo_cost.Memory(0, 1, 1)
        return compiled_lib.CompiledProgram(
            choice, "t", 2.0, memory, 1.0, "", 1.0, 1.0, {}, {}, 0.0
        )

    monkeypatch.setattr(programs.Experiment, "compile", compiled)
    monkeypatch.setattr(hardware.Target, "devices", lambda self: ())
    given = dataclasses.replace(experiment(batch_size=128), eval_batch_size=128)
    settings = {"microbatches": 1, "remat": "minimal", "price": None}
    flags = {"is_search": False, "is_quick": False, "as_json": True}
    target = hardware.find_target("v5e-8")
    assert command_lib.run(given, target, program, "auto", **settings, **flags) == 0
    assert asked == [(compiled_lib.Choice(*wanted), program)]


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(errors.UserError, match="A batch of 6"):
        experiment(batch_size=6).compile(
            HERE, jax.devices(), compiled_lib.Choice(8, 1, 1, 1, "full")
        )


def test_mistakes_come_before_compiling(capsys):
    files = ["preflight", "--gin_file", "experiments/mov/3b/mov_10.gin"]
    assert main.main([*files, "--target", "v5x:4x4"]) == main.USER_ERROR
    assert "Did you mean" in capsys.readouterr().err
    for wrong, message in (
        (["--program", "evil"], "Did you mean 'eval'"),
        (["--program", "eval", "--slices", "0"], "expected a number of slices"),
        (["--remat", "ful"], "Did you mean 'full'"),
    ):
        assert main.main([*files, "--target", "v5e:4x4", *wrong]) == main.USER_ERROR
        assert message in capsys.readouterr().err


def test_what_a_refusal_asked_for():
    usual = (
        "Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm by 4.75G"
    )
    early = "the total memory required for HLO temporaries (298.02G) exceeds available HBM (15.75G)"
    assert compiled_lib.needed_memory(usual, 7) == 20.5 * 2**30
    assert compiled_lib.needed_memory(early, 10**9) == pytest.approx(298.02 * 2**30 + 1e9)
    assert compiled_lib.needed_memory("exceeds something", 7) == 0
    made = compiled_lib.CompiledProgram(
        compiled_lib.Choice(1, 1, 1, 1, "full"), "t", 16e9, None, 20e9, usual, 1.0, 0.0, {}, {}, 0.0
    )
    assert "4.00 more than there are" in view.summary(made)
    unsaid = dataclasses.replace(made, needed=0.0)
    assert not unsaid.fits
    assert "refused by the compiler: Ran out" in view.summary(unsaid)


def run(*arguments):
    """The command in a process of its own, which libtpu needs; the program that it prints."""
    command = [sys.executable, "-m", "moe_peft", "preflight", "--json", *arguments]
    environ = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environ)
    assert done.returncode == 0, done.stderr
    (made,) = json.loads(done.stdout)
    return made


@NEEDS_LIBTPU
@pytest.mark.slow
def test_a_published_experiment_for_sixteen_tpus():
    experiment_ = ["--gin_file", "experiments/mov/770m/mov_10.gin"]
    made = run(*experiment_, "--target", "v5e:4x4", "--mesh", "model=4", "--quick")
    assert made["fits"]
    assert 0.3e9 < made["memory"]["arguments"] < 1e9
    assert made["collectives"]["all-reduce"]["count"] > 24 * 4


@NEEDS_LIBTPU
@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e:2x2", "v4:2x2x1"])
def test_gradients_cross_slices_and_activations_do_not(chip):
    files = ("models/tiny.gin", "methods/lora.gin", "optimizers/adafactor.gin")
    small = [part for file in files for part in ("--gin_file", file)]
    small += ["--gin.BATCH_SIZE=8", "--gin.FEATURE_LENGTHS={'inputs': 32, 'targets': 16}"]
    made = run(*small, "--target", chip, "--slices", "2", "--mesh", "model=2", "--quick")
    assert made["setting"]["data"] == 4  # a chip of v4 is one device
    sent = made["collectives"]
    assert 0 < sent["between slices"]["num_bytes"] < sent["all-reduce"]["num_bytes"]

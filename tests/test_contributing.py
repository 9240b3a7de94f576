"""Every example of CONTRIBUTING.md, applied to a copy of the project, works."""

import functools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parents[1]
COPIED = ("moe_peft", "tasks", "gin", "tests", "pyproject.toml")
_IGNORED = shutil.ignore_patterns("__pycache__", "fixtures")

_SECTION = re.compile(r"^## ([^\n]+): (\d+) files?\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"^`([\w./]+)`\n\n```(\w+)\n(.*?\n)```$", re.MULTILINE | re.DOTALL)
EXAMPLES = {
    title: (int(number), _FILE.findall(text))
    for title, number, text in _SECTION.findall((ROOT / "CONTRIBUTING.md").read_text())
}

# A test of the copy: what all checks share, and the check of each example.
PRELUDE = """
import gin, jax, numpy as np
from moe_peft import methods, patching
from moe_peft.cli import main
from moe_peft.models import encoder_decoder, t5
from moe_peft.training import optimizers, step

TOKENS = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
TINY = t5.T5Config(16, 8, 2, 4, 16, 1, 1, dropout_rate=0.0)

def trained(method, optimizer, module=t5.Transformer(TINY), steps=2):
    "Adapter leaves before and after some steps, by path; the model and the frozen tree."
    model = encoder_decoder.EncoderDecoder(method.patch(module), method=method)
    batch = {name: np.full((2, 4), 3, np.int32) for name in TOKENS}
    frozen, trainable = method.split(jax.jit(lambda: model.init(jax.random.key(0), batch))())
    before = jax.device_get(patching.flatten(trainable))
    built = optimizer.build(trainable, method.learning_rate_group)
    state = step.create_state(trainable, built, 0)
    update = step.make_train_step(model, built, patching.merge)
    for _ in range(steps):
        state, metrics = update(state, frozen, batch)
    assert metrics["bad_leaf"] == step.ALL_FINITE
    return before, jax.device_get(patching.flatten(state.trainable)), frozen

def plan(*files, bindings=()):
    gin.clear_config()
    return main.configure("plan", list(files), bindings)()

ONE_LAYER = ("T5Config.num_encoder_layers=1", "T5Config.num_decoder_layers=1")
"""
CHECKS = {
    "A method": """
from moe_peft.weights import identity, records

size = "models/tiny.gin"
found = plan(size, "methods/rs_lora.gin", bindings=ONE_LAYER)  # rank 16; lora.gin has rank 4
lora = plan(size, "methods/lora.gin", bindings=ONE_LAYER)
assert found.trainable == 4 * lora.trainable > 0
method = methods.rs_lora(rank=2, alpha=6.0)
assert records.method(identity.as_json(method.describe()), "file").describe() == method.describe()
""",
    "A router": """
method = methods.mov(num_experts=3, routing="sharp")
before, after, _ = trained(method, optimizers.adafactor(1e-2))
moved = {path.split("/")[-1] for path in before if (before[path] != after[path]).any()}
assert moved == {"vectors", "kernel"}, moved
""",
    "An optimiser": """
files = ["models/tiny.gin", "methods/ia3.gin", "data/cldr.gin", "runs/train.gin"]
needed = ["BACKBONE=random:0", "BATCH_SIZE=8", "TRAIN_STEPS=2", "MODEL_DIR=/nowhere"]
main.configure("train", [*files, "optimizers/lion.gin"], needed)
optimizer = gin.query_parameter("%OPTIMIZER").scoped_configurable_fn()
assert optimizer.describe()["b2"] == 0.99
before, after, _ = trained(methods.ia3(), optimizer, steps=1)
assert before
for path in before:
    np.testing.assert_allclose(np.abs(after[path] - before[path]), 1e-4, rtol=1e-2)
""",
    "A benchmark of your own": """
import moe_peft.data.vocabularies
import moe_peft.tasks.sums
from moe_peft.data import identity, pipeline

gin.bind_parameter("vocabularies.configured.vocabulary", "bytes")
lengths = {"inputs": 32, "targets": 8}
batch = next(pipeline.train_batches("sums", 16, lengths, seed=0))
assert set(batch["task_ids"].tolist()) == {0, 1}
vocabulary = pipeline.vocabulary("sums")
for question, answer in zip(batch["encoder_input_tokens"], batch["decoder_target_tokens"]):
    a, word, b = vocabulary.decode(question.tolist()).split()
    found = int(a) + int(b) if word == "plus" else int(a) - int(b)
    assert vocabulary.decode(answer.tolist()) == str(found)
described = identity.describe("sums", lengths, 16, seed=0)
assert described["gin"]["sums.configured.largest"] == 99
""",
    "A backbone family": """
from moe_peft.models import mixer
from moe_peft.preflight import operations
from moe_peft.weights import identity, records

found = plan("models/mixer_tiny.gin", "methods/mov.gin", bindings=["mov.family = 'mixer'"])
assert [rule.layers for rule in found.rules] == [("body/blocks_0/down", "body/blocks_1/down")]
assert found.trainable == 2 * 10 * (64 + 64)  # vectors and routers of ten experts
module = gin.query_parameter("%MODEL").scoped_configurable_fn()
described = identity.as_json({"model": identity.describe_model(module)})
assert records.network(described, "file") == module
assert operations.forward(module.config, 8, 8) == 2 * 8 * 32 * (4 * 64 + 384)
""",
}
# Tests of the project that see the example.
ARCHITECTURE = [
    f"tests/test_architecture.py::{name}"
    for name in ("test_imports_run_down", "test_no_circle", "test_files_and_functions_are_short")
]
WHOLE_MODEL, RECORDS = "tests/patching/test_whole_model.py", "tests/weights/test_records.py"
TESTS = {
    "A method": [
        f"{WHOLE_MODEL}::test_every_adapter_has_a_row",
        f"{WHOLE_MODEL}::test_base_tree_is_untouched_and_adapters_have_axes[rs_lora-unscanned]",
        f"{RECORDS}::test_made_again[rs_lora]",
        f"{RECORDS}::test_every_adapter_and_router_is_made_again",
    ],
    "A router": [
        "tests/routing/test_routers.py::test_temperature",
        f"{RECORDS}::test_made_again[mov sharp]",
        f"{RECORDS}::test_every_adapter_and_router_is_made_again",
    ],
    "A backbone family": [
        "tests/models/test_mixer.py",
        "tests/config/test_packaged_files.py::test_model_plans[models/mixer_tiny.gin]",
        "tests/weights/test_t5_sizes.py::test_unknown_names",
    ],
}


def test_every_example_is_checked():
    assert set(EXAMPLES) == set(CHECKS)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the project with all examples in it: none stands in the way of another."""
    folder = tmp_path_factory.mktemp("copy")
    for name in COPIED:
        copy = functools.partial(shutil.copytree, symlinks=True, ignore=_IGNORED)
        (copy if (ROOT / name).is_dir() else shutil.copy2)(ROOT / name, folder / name)
    for number, files in EXAMPLES.values():
        assert len({path for path, *_ in files}) == len(files) == number
        for path, kind, text in files:
            if kind == "diff":
                subprocess.run(["git", "apply", "-"], cwd=folder, input=text, text=True, check=True)
            else:
                assert not (folder / path).exists()
                (folder / path).write_text(text)
    return folder


def test_examples_are_in_the_style_of_the_project(copy):
    paths = {path for _, files in EXAMPLES.values() for path, *_ in files if path.endswith(".py")}
    assert len(paths) >= len(EXAMPLES)
    _run(copy, "ruff", "check", *sorted(paths))
    _run(copy, "ruff", "format", "--check", *sorted(paths))


def test_examples_work(copy):
    checks = copy / "tests" / "test_examples.py"
    written = [PRELUDE.rstrip()]
    for title, check in CHECKS.items():
        written.append(f"def test_{re.sub(' ', '_', title)}():{textwrap.indent(check, '    ')}")
    checks.write_text("\n\n".join(written))
    project = dict.fromkeys(test for tests in TESTS.values() for test in tests)
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist")
    printed = _run(copy, "pytest", *options, str(checks), *ARCHITECTURE, *project)
    least = len(CHECKS) + len(ARCHITECTURE) + len(project)
    assert int(re.search(r"(\d+) passed", printed)[1]) >= least


def _run(folder, *command):
    """Runs a Python module in the copy."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

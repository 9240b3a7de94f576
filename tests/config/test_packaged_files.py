"""Every gin file that comes with the package parses, is complete in its place, and plans."""

import re

import gin
import pytest

from moe_peft.cli import commands, main
from moe_peft.config import gin_files
from moe_peft.experiments import files as files_lib

ROOT = gin_files.packaged_folder()


def names(folder):
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.gin"))


# What a file needs besides itself to be complete.
TINY = ("models/tiny.gin", "methods/ia3.gin", "data/cldr.gin")
RUN = [
    "BACKBONE=random:0",
    "BATCH_SIZE=8",
    "TRAIN_STEPS=2",
    "MODEL_DIR=/nowhere",
]
ONE_LAYER = ["T5Config.num_encoder_layers=1", "T5Config.num_decoder_layers=1"]
SCANNED = "T5Config.scan_layers=True"  # one layer stands for a stack: faster, same adapters

SEEN = {"models", "methods", "optimizers", "data", "runs", "samples", "monitors", "experiments"}
ELSEWHERE = {"t5x"}  # tests/t5x/test_runs.py
# So many files there are at least, so that a test of each does not pass for want of any.
LEAST = {"models": 22, "methods": 19, "optimizers": 4, "data": 6, "monitors": 3, "experiments": 150}


@pytest.fixture(autouse=True)
def _clean_gin():
    yield
    gin.clear_config()


def test_no_file_is_left_out():
    assert {name.split("/")[0] for name in names(".")} == SEEN | ELSEWHERE
    assert not {folder for folder, least in LEAST.items() if len(names(folder)) < least}
    assert (len(EXPERIMENTS), len(FIRST_OF_TABLE)) == (139, 17)


def test_folder_cannot_hide_the_gin_library():
    assert not list(ROOT.rglob("*.py"))


# The other sizes of T5 are counted in tests/models/test_gin_sizes.py.
PLANNED = [n for n in names("models") if "t5_" not in n or n.endswith("_small.gin")]


@pytest.mark.parametrize("name", PLANNED)
def test_model_plans(name):
    is_t5 = "T5Config" in (ROOT / name).read_text()
    method, scanned = ("ia3", [SCANNED]) if is_t5 else ("full", [])
    plan = main.configure("plan", [name, f"methods/{method}.gin"], scanned)()
    assert plan.base > 0
    assert plan.trainable > 0


@pytest.mark.parametrize("name", names("methods"))
def test_method_plans_and_holds_no_size(name, tmp_path):
    macros = tmp_path / "macros.gin"
    macros.write_text("NUM_TASKS = 5\nVARIANT = 'z'\n")
    base = "methods/mhr.gin" if name == "methods/transferred.gin" else "models/tiny.gin"
    plan = main.configure("plan", ["models/tiny.gin", str(macros), base, name], ONE_LAYER)()
    assert plan.target_method == ("mhr_z" if name == "methods/transferred.gin" else None)
    assert plan.trainable + plan.frozen == plan.base + plan.adapters
    assert (plan.trainable == 0) == (name == "methods/frozen.gin")
    assert "T5Config" not in (ROOT / name).read_text()


@pytest.mark.parametrize("name", names("optimizers"))
def test_optimizer_is_complete(name):
    main.configure("train", [*TINY, "runs/train.gin", name], RUN)
    assert gin.query_parameter("%OPTIMIZER").scoped_configurable_fn().name


# A user's own files: tests/cli/test_own_data.py.
OF_BENCHMARKS = [name for name in names("data") if name != "data/own.gin"]


@pytest.mark.parametrize("name", OF_BENCHMARKS)
def test_data_names_a_mixture(name):
    main.configure("plan", [*TINY, name])
    assert isinstance(gin.query_parameter("%MIXTURE"), str)
    assert set(gin.query_parameter("%FEATURE_LENGTHS")) == {"inputs", "targets"}


@pytest.mark.parametrize("name", names("monitors"))
def test_monitors_watch_training(name):
    main.configure("train", [*TINY, "runs/train.gin", "optimizers/adamw.gin", name], RUN)
    watching = gin.query_parameter("train.monitors")
    expected = name.removeprefix("monitors/").removesuffix(".gin").split("_and_")
    assert len(watching) == len(expected)
    for monitor, word in zip(watching, expected, strict=True):
        made = monitor.scoped_configurable_fn()
        assert made.name == word
        assert made.period == 100


@pytest.mark.parametrize(
    ("files", "want"),
    [
        (["runs/eval_p3.gin"], ("p3_(.*)", "exact_match", True, "tasks", "validation")),
        (
            ["runs/eval_p3.gin", "runs/anli_merged.gin"],
            ("p3_(.*?)(?:_r[123])?", "exact_match", True, "groups", "validation"),
        ),
        (["runs/eval_superni.gin"], (None, "rouge_l", False, "examples", "test")),
        (["runs/eval_crossfit.gin"], ("crossfit_(.*)", "task", False, "tasks", "test")),
    ],
)
def test_reports_of_the_benchmarks(files, want):
    benchmark = files[0].split("_")[-1]
    data = ["models/tiny.gin", "methods/ia3.gin", f"data/{benchmark}"]
    main.configure("eval", [files[0], *data, *files[1:]], [*RUN[:1], *RUN[3:], "VOCABULARY=bytes"])
    made = gin.get_configurable("evaluation.Evaluator")()
    settings = made.settings
    names = ("metric", "rank_choices", "average", "split")
    group = made._group and made._group.pattern
    assert (group, *(settings[name] for name in names)) == want
    assert settings["bootstrap"]["resamples"] == 1000
    if want[1] != "exact_match":
        assert "num_beams=4" in settings["decoding"]


EXPERIMENTS = [n for n in names("experiments") if not n.endswith("/common.gin")]
FIRST_OF_TABLE = {name.rsplit("/", 1)[0]: name for name in reversed(EXPERIMENTS)}.values()


def commands_of(name):
    """Every command line in the head that names the file."""
    head = (ROOT / name).read_text().split("\ninclude", 1)[0].replace("\\\n#", "")
    for line in head.splitlines():
        if "moe-peft " in line and name in line:
            yield files_lib.CommandLine.parse(line[line.index("moe-peft ") :])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_says_what_it_is_and_its_commands_parse(name):
    head = (ROOT / name).read_text().split("\ninclude", 1)[0]
    for part in ("# Number:", "# Command:", "# Expected:", "# Hardware:", "# In two minutes:"):
        assert part in head
    assert "@HW@" not in head
    if "/cldr/" not in name:
        assert re.search(r"^# In two minutes: samples/\w+\.gin ", head, re.MULTILINE)
    commands = list(commands_of(name))
    assert commands
    for line in commands:
        main.configure(line.command, line.gin_files, line.bindings)
    if sample := re.search(r"samples/\w+\.gin", head):
        assert (ROOT / sample[0]).exists()


# Lines of a table differ in what runs on all data tell: above.
@pytest.mark.parametrize(
    "name",
    [n if n in FIRST_OF_TABLE else pytest.param(n, marks=pytest.mark.slow) for n in EXPERIMENTS],
)
def test_commands_on_samples_parse(name, tmp_path):
    head = (ROOT / name).read_text().split("\ninclude", 1)[0]
    sample = re.search(r"samples/\w+\.gin", head)
    assert sample or "/cldr/" in name
    for line in commands_of(name) if sample else ():
        line = line.on_samples(sample[0], tmp_path)
        main.configure(line.command, line.gin_files, line.bindings)


def plan(name):
    large = [SCANNED] if "/cldr/" not in name else []
    return main.configure("plan", [name], large)()


# Each has the same method on another backbone or benchmark among those that always run.
LATER = {"mhr/t0_xl", "mhr/t0_3b", "mhr/superni", "mov/3b", "mov/11b", "poly_s/t0"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow)
        if n.removeprefix("experiments/").rpartition("/")[0] in LATER
        else n
        for n in FIRST_OF_TABLE
    ],
)
def test_first_experiment_of_a_table_plans(name):
    assert plan(name).base > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in EXPERIMENTS if "/cldr/" in n])
def test_experiment_plans(name):
    # Those of papers: tests/experiments/test_checks.py.
    assert (plan(name).trainable == 0) == ("methods/frozen.gin" in (ROOT / name).read_text())


@pytest.mark.parametrize("name", ["plan", "preflight", "merge", "data show"])
def test_files_may_name_optimizers_before_they_import_them(name):
    assert "moe_peft.training.optimizers" in commands.ALL[name].modules

"""The committed table of preflights: the rule that chooses meshes, resuming, one sample again."""

import datetime
import importlib.util
import json
import os
import pathlib
import random
import subprocess
import sys
from unittest import mock

import pytest

from moe_peft.preflight import compiled as compiled_lib
from moe_peft.preflight import hardware, search

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "preflight_table.py"
# Rows that the slow test compiles again, one of each compiler: "all", or a seed; by default others
# each week.
ROWS = os.environ.get("MOE_PEFT_PREFLIGHT_ROWS", str(datetime.date.today().isocalendar().week))


def load():
    spec = importlib.util.spec_from_file_location("preflight_table", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["preflight_table"] = module  # dataclasses look themselves up
    with mock.patch.dict(os.environ):  # which it makes ready for compilers, not for other tests
        spec.loader.exec_module(module)
    return module


table = load()


@pytest.mark.parametrize(
    ("rows", "weights", "target", "wanted"),
    [
        (32, (5.7e9, 32e6), "v5e-16", (16, 1, 1, 1)),
        (32, (22.2e9, 95e6), "v5e-16", (1, 16, 1, 1)),  # a copy does not fit a chip
        (32, (22.2e9, 95e6), "v5e-256", (32, 1, 8, 1)),  # more chips than rows
        (256, (0, 11.4e9), "h100:8", (8, 1, 1, 1)),
        (256, (0, 44e9), "h100:8", (1, 8, 1, 1)),  # gradients count too
        (256, (0, 3e9), "v5e-16", (16, 1, 1, 2)),  # 16 rows a chip, 8 at a time
        (256, (0, 3e9), "h100:1", (1, 1, 1, 8)),
        (24, (1e9, 0), "v5e-16", (8, 1, 2, 1)),
    ],
)
def test_the_rule_for_meshes(rows, weights, target, wanted):
    choice = search.by_rule(rows, weights, hardware.find_target(target))
    assert choice == compiled_lib.Choice(*wanted, "full")


def test_the_rule_for_several_slices():
    target = hardware.find_target("v5e-16", slices=2)
    found = search.by_rule(32, (22.2e9, 95e6), target)
    assert found == compiled_lib.Choice(2, 16, 1, 1, "full")


def row(case, **changes):
    return {
        "size": case.size,
        "method": case.method,
        "target": case.target,
        "needed": 8.0e9,
        "capacity": 16.0e9,
        "fits": True,
        "xla_flags": "",
        "operations": 1e12,
        "seconds_at_least": 0.1,
        "collectives": {"all-reduce": {"count": 3, "num_bytes": 1000}},
        "settings": "abc",
        "compiler": table.compiler(case.target),
        **changes,
    }


def test_rows_that_are_there_are_kept(tmp_path, monkeypatch):
    wanted = table.cases(sizes=("3b",), methods=("lora", "ia3"), places=("v5e-16",))
    compiled = []

    def compile_(case, xla_flags):
        compiled.append(case)
        return row(case)

    monkeypatch.setattr(table, "in_child", lambda function, *args: function(*args) or 0)
    monkeypatch.setattr(table.Case, "compile", compile_)
    monkeypatch.setattr(table.Case, "planned", lambda case: (None, None, "abc"))
    path = tmp_path / "table.json"
    table.fill(path, wanted[:1])
    table.fill(path, wanted)
    assert compiled == wanted
    assert [each["method"] for each in json.loads(path.read_text())["rows"]] == ["ia3", "lora"]
    monkeypatch.setattr(table.Case, "planned", lambda case: (None, None, "other settings"))
    table.fill(path, wanted[:1])
    assert compiled == [*wanted, wanted[0]]
    monkeypatch.setattr(table, "compiler", lambda target: "another version")
    monkeypatch.setattr(table.Case, "planned", lambda case: (None, None, "abc"))
    table.fill(path, wanted[:1])
    table.fill(path, wanted[1:], is_again=True)
    assert len(compiled) == 5


def test_what_crashes_a_compiler_is_compiled_without_triton(tmp_path, monkeypatch):
    (case,) = table.cases(("3b",), ("mhr_64",), ("h100:1",))
    codes = iter([-6, 0])

    def in_child(function, *args):
        code = next(codes)
        if not code:
            function(*args)
        return code

    monkeypatch.setattr(table, "in_child", in_child)
    monkeypatch.setattr(table.Case, "compile", lambda case, flags: row(case, xla_flags=flags))
    path = tmp_path / "table.json"
    table.fill(path, [case])
    assert table.read(path)[case]["xla_flags"] == table.NO_TRITON
    assert "| 8.0*, 100 ms |" in table.markdown(table.read(path))


def test_what_counts_as_a_difference():
    case = table.Case("3b", "lora", "v5e-16")
    assert not table.differences(row(case), row(case, needed=8.1e9))
    assert "needed" in table.differences(row(case), row(case, needed=8.5e9))[0]
    gathered = {"all-gather": {"count": 1, "num_bytes": 9}}
    found = table.differences(row(case), row(case, collectives=gathered))
    assert [line.split(":")[0] for line in found] == ["all-gather", "all-reduce"]
    assert table.differences(row(case), row(case, settings="d")) == ["the settings changed"]


def test_markdown():
    cases = table.cases(("3b",), ("ia3", "full"), ("v5e-16",))
    rows = {cases[0]: row(cases[0]), cases[1]: row(cases[1], fits=False, needed=20.5e9)}
    lines = table.markdown(rows).splitlines()
    assert lines[0].startswith("| | v5e-16 |")
    assert lines[2].startswith("| 3b ia3 | 8.0, 100 ms |")
    assert lines[3].startswith("| 3b full | 4.50 GB too many |")
    assert len(lines) == 4


def test_a_committed_row_has_the_settings_of_the_experiments():
    rows = table.read(table.DEFAULT)
    case = random.Random(ROWS).choice(sorted(rows, key=str))
    assert case.planned()[2] == rows[case]["settings"], f"{case}: run {SCRIPT.name} again"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["v5e", "v4", "h100"])
def test_a_sample_compiles_as_it_did(kind):
    rows = {case: row for case, row in table.read(table.DEFAULT).items() if kind in case.target}
    if not rows:
        pytest.skip(f"the table has no rows of {kind} yet")
    cases = sorted(rows, key=str)
    if ROWS != "all":
        cases = random.Random(ROWS).sample(cases, 1)
    for case in cases:
        here, there = table.compiler(case.target), rows[case]["compiler"]
        if here != there:
            pytest.skip(f"the row is of {there}, here is {here}")
        command = [sys.executable, SCRIPT, "--compare", "--sizes", case.size]
        command += ["--methods", case.method, "--targets", case.target]
        environ = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environ)
        assert done.returncode == 0, done.stdout + done.stderr[-2000:]
        assert "as in the file" in done.stdout

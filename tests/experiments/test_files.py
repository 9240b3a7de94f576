"""Experiment files against the papers' tables: every row has a file, and says what is printed."""

import json

import pytest

from moe_peft import errors
from moe_peft.experiments import files as files_lib
from moe_peft.experiments import record as record_lib

# {paper: {table: {file: as printed}}}, in the order of the tables. Of MoV's two numbers the first
# is the median's average, the second the mean's. Columns of MHR's table 5 are numbers of steps.
TABLES = {
    "mhr": {
        "2": {
            "superni/lora": "67.6 ± 0.8",
            "superni/lora_big": "67.2 ± 0.7",
            "superni/poly_z": "64.6 ± 0.3",
            "superni/poly": "67.8 ± 0.8",
            "superni/mhr_z": "68.0 ± 0.2",
            "superni/mhr": "68.5 ± 0.3",
        },
        "3": {
            "t0_11b/t_few": "72.5 ± 0.9",
            "t0_11b/lora": "72.3 ± 1.0",
            "t0_11b/poly_z": "70.0 ± 0.6",
            "t0_11b/poly": "74.9 ± 0.6",
            "t0_11b/mhr_z": "72.9 ± 0.8",
            "t0_11b/mhr": "74.7 ± 0.6",
        },
        "4": {
            "t0_xl/lora": "66.0 ± 1.6",
            "t0_xl/adapter_soup": "62.1 ± 1.0",
            "t0_xl/poly": "68.0 (table 4: ± 0.8)",
            "t0_xl/poly_mu": "67.8 ± 0.6",
            "t0_xl/mhr": "69.1 (table 4: ± 1.1)",
            "t0_xl/mhr_mu": "69.1 ± 0.9",
            "superni/lora": "67.6 ± 0.8",
            "superni/poly": "67.8 ± 0.8",
            "superni/poly_mu": "68.3 ± 0.5",
            "superni/mhr": "68.5 (table 4: ± 0.6)",
            "superni/mhr_mu": "68.5 ± 0.8",
        },
        "5": {
            "zero_shot/xl_backbone": "43.2",
            "zero_shot/xl_lora": "56.5 (k = 0), then 56.0, 56.1, 55.7",
            "zero_shot/xl_poly_mu": "46.0 (k = 0), then 53.0, 56.8, 56.3",
            "zero_shot/xl_mhr_mu": "48.0 (k = 0), then 58.0, 57.1, 56.3",
            "zero_shot/t0_11b_backbone": "61.0",
            "zero_shot/t0_11b_lora": "61.2 (k = 0), then 61.6, 61.5, 61.5",
            "zero_shot/t0_11b_poly_mu": "62.1 (k = 0), then 63.6, 63.9, 64.4",
            "zero_shot/t0_11b_mhr_mu": "63.5 (k = 0), then 64.5, 64.5, 64.4",
        },
        "6": {
            "t0_xl/full_lora": "68.9",
            "t0_xl/ia3": "62.4 ± 0.4",
            "t0_xl/adapter_soup": "62.1 ± 1.0",
            "t0_xl/lora": "66.0 ± 1.6",
            "t0_xl/lora_big": "65.4 ± 0.9",
            "t0_xl/poly_z": "66.4 ± 0.3",
            "t0_xl/poly": "68.0 ± 1.0",
            "t0_xl/mhr_z": "68.3 ± 0.8",
            "t0_xl/mhr": "69.1 ± 1.0",
            "t0_3b/t_few": "66.2 ± 0.5",
            "t0_3b/adapter_soup": "66.1 ± 0.6",
            "t0_3b/lora": "67.4 ± 0.8",
            "t0_3b/lora_big": "68.0 ± 0.8",
            "t0_3b/poly_z": "65.3 ± 1.0",
            "t0_3b/poly": "69.0 ± 0.8",
            "t0_3b/mhr_z": "68.4 ± 1.2",
            "t0_3b/mhr": "69.3 ± 1.2",
            "t0_3b_light/lora": "66.2 ± 0.9",
            "t0_3b_light/lora_rank16": "67.6 ± 1.1",
            "t0_3b_light/adapter_soup": "64.9 ± 1.0",
            "t0_3b_light/poly_z": "62.9 ± 1.2",
            "t0_3b_light/poly": "68.0 ± 0.5",
            "t0_3b_light/mhr_z": "66.8 ± 1.1",
            "t0_3b_light/mhr": "68.5 ± 0.7",
            "superni/lora": "67.6 ± 0.8",
            "superni/lora_big": "67.2 ± 0.7",
            "superni/poly_z": "64.6 ± 0.3",
            "superni/poly": "67.8 ± 0.8",
            "superni/mhr_z": "68.0 ± 0.2",
            "superni/mhr": "68.5 ± 0.3",
        },
    },
    "poly_s": {
        "2": {
            "crossfit/shared": "55.9 ± 0.7",
            "crossfit/private_mu": "47.2 ± 1.6",
            "crossfit/random_mu": "55.7 ± 1.4",
            "crossfit/poly_mu": "57.0 ± 0.5",
            "crossfit/poly": "56.7 ± 0.4",
            "crossfit/poly_s": "57.8 ± 0.5",
        },
        "3": {
            "superni/shared": "64.9 ± 0.5",
            "superni/full_ft": "66.1 ± 0.4",
            "superni/poly_mu": "65.9 ± 0.7",
            "superni/poly": "67.2 ± 0.7",
            "superni/poly_s": "70.2 ± 0.4",
        },
        "4": {  # median (interquartile range)
            "t0/shared": "66.9 (0.7)",
            "t0/poly_mu": "67.2 (1.1)",
            "t0/poly": "67.1 (1.4)",
            "t0/poly_s": "67.5 (0.5)",
        },
    },
    "mov": {
        "2": {
            "770m/full": "56.01 (53.54)",
            "770m/ia3": "50.39 (50.09)",
            "770m/lora": "52.30 (52.00)",
            "770m/mov_5": "51.57 (51.36)",
            "770m/mov_10": "52.47 (51.78)",
            "770m/mov_20": "51.89 (51.64)",
            "770m/mov_30": "51.22 (51.81)",
            "770m/mov_60": "53.63 (53.42)",
            "770m/molora_10": "55.52 (53.99)",
        },
        "3": {
            "3b/t0_published": "51.91 (51.22)",
            "3b/full": "60.06 (59.14)",
            "3b/ia3": "52.90 (52.98)",
            "3b/lora_r4": "57.51 (57.01)",
            "3b/lora_r8": "58.89 (57.03)",
            "3b/lora_r16": "59.54 (57.05)",
            "3b/mov_2": "53.34 (53.91)",
            "3b/mov_5": "59.01 (57.43)",
            "3b/mov_10": "59.93 (58.35)",
            "3b/mov_20": "59.70 (57.81)",
            "3b/mov_30": "60.61 (58.77)",
            "3b/mov_60": "59.83 (57.59)",
            "3b/mov_10_top1": "54.92 (52.82)",
            "3b/mov_10_top2": "57.45 (55.67)",
            "3b/molora_2": "60.12 (57.76)",
            "3b/molora_5": "58.60 (56.82)",
            "3b/molora_10": "59.77 (57.71)",
            "3b/molora_15": "60.79 (58.90)",
        },
        "4": {
            "11b/t0_published": "63.56 (61.70)",
            "11b/full": "65.03 (63.57)",
            "11b/ia3": "59.12 (57.41)",
            "11b/mov_10": "62.30 (61.50)",
            "11b/mov_20": "61.77 (60.53)",
            "11b/mov_30": "62.22 (60.99)",
            "11b/mov_60": "64.08 (62.58)",
        },
        "5": {
            "sentence/token_770m": "55.12 (54.37)",
            "sentence/mov_10_770m": "53.50 (53.21)",
            "sentence/token_3b": "62.94 (61.14)",
            "sentence/mov_10_3b": "57.82 (56.49)",
            "sentence/token_11b": "64.65 (63.90)",
            "sentence/mov_10_11b": "64.05 (63.02)",
        },
        "6": {
            "3b/ia3": "52.90",
            "3b/mov_10": "59.93",
            "3b/mov_30": "60.61",
            "11b/ia3": "59.12",
            "11b/mov_10": "62.30",
            "11b/mov_30": "62.22",
        },
    },
}
# Reported in a sentence.
IN_TEXT = {"mhr/t0_xl/random_mu": "66.0"}

PRINTED = [
    (f"{paper}/{row}", table, value)
    for paper, tables in TABLES.items()
    for table, rows in tables.items()
    for row, value in rows.items()
]


def test_every_row_has_a_file_and_every_file_a_row():
    assert len(PRINTED) == 122
    assert set(files_lib.names()) == {name for name, _, _ in PRINTED} | set(IN_TEXT)


def test_files_name_the_tables_that_print_them():
    assert len(files_lib.names()) == 104
    for name in files_lib.names():
        tables = sorted(table for row, table, _ in PRINTED if row == name)
        assert sorted(files_lib.load(name).tables) == tables, name


@pytest.mark.parametrize(("name", "table", "value"), PRINTED)
def test_files_give_the_printed_value(name, table, value):
    del table
    expected = files_lib.load(name).expected
    number, remark, spread = value.partition(" (table")
    assert expected.startswith(number)
    assert not expected[len(number) :][:1].isdigit()
    assert remark + spread in expected


def test_size_and_counts():
    found = files_lib.load("mhr/t0_xl/full_lora")
    assert (found.size, found.trainable) == ("3B", (2_850_000_000, 2_211_840))
    assert files_lib.load("poly_s/superni/full_ft").trainable == (738_000_000, 738_000_000)
    assert files_lib.load("mov/11b/mov_10").trainable == (15_820_800, None)
    assert files_lib.load("mov/11b/t0_published").trainable == (None, None)
    assert files_lib.load("mhr/t0_11b/lora").size == "11B"


def test_size_is_that_of_the_model():
    nominal = {"770M": "770_000_000", "3B": "3_000_000_000", "11B": "11_000_000_000"}
    seen = set()
    for found in map(files_lib.load, files_lib.names()):
        settings = list(files_lib._settings(found.gin_file))
        assert f"NOMINAL_SIZE = {nominal[found.size]}" in settings, found.name
        seen.add(found.size)
    assert seen == nominal.keys()


def test_two_minute_version_of_a_shared_run(tmp_path):
    found = files_lib.load("mhr/t0_xl/mhr_mu")
    train, adapt = found.two_minutes(tmp_path)
    source = f"{files_lib.load('mhr/t0_xl/mhr').folder(tmp_path)}/source"
    assert train.gin_files == ("experiments/mhr/t0_xl/mhr.gin", "samples/p3.gin")
    assert train.arguments[0] == "train"
    assert train.bindings == (f"MODEL_DIR={source}",)
    assert adapt.bindings == (
        f"SOURCE={source}",
        f"MODEL_DIR={found.folder(tmp_path)}/adapted",
    )


def test_two_minute_version_reads_the_weights_of_an_earlier_command(tmp_path):
    found = files_lib.load("mhr/t0_xl/full_lora")
    train, adapt = found.two_minutes(tmp_path)
    assert train.bindings == (f"MODEL_DIR={found.folder(tmp_path)}/source",)
    assert f"BACKBONE=run:{found.folder(tmp_path)}/source" in adapt.bindings


@pytest.fixture
def gin_folder(tmp_path, monkeypatch):
    """A folder of gin files of one experiment, mhr/t/row, and what it includes."""
    files = {
        "experiments/mhr/t/row.gin": "# A row.\n#\n"
        "# Paper: Somebody 2023\n"
        "# Printed in: table 1\n"
        "# Number: accuracy: in\n#   per cent\n"
        "# Expected: 1.0 ± 0.1\n"
        "# Size: 3B\n"
        "# Command:\n"
        "#   moe-peft train --gin_file experiments/mhr/t/row.gin --gin.A=1 \\\n"
        "#     --gin.B=2\n"
        "#   moe-peft eval --gin.C=3\n"
        "# In two minutes: samples/p3.gin in place of all\n"
        "# Hardware: none\n"
        "# Trains: 1,234 parameters\n"
        "# Operations: 1.2e+03 of training\n"
        "include 'models/t5_1_1_xl.gin'\ninclude 'data/p3.gin'\nA = 1\n",
        "models/t5_1_1_xl.gin": "SIZE = 1\n",
        "data/p3.gin": "DATA = 1\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(files_lib.gin_files_lib, "packaged_folder", lambda: tmp_path)
    files_lib.load.cache_clear()
    yield tmp_path
    files_lib.load.cache_clear()


def fingerprint():
    files_lib.load.cache_clear()
    return files_lib.load("mhr/t/row").fingerprint


def test_head_is_read(gin_folder):
    del gin_folder
    found = files_lib.load("mhr/t/row")
    assert (found.title, found.source, found.expected) == ("A row", "table 1", "1.0 ± 0.1")
    assert [line.bindings for line in found.commands] == [("A=1", "B=2"), ("C=3",)]
    assert (found.sample, found.size, found.after) == ("samples/p3.gin", "3B", None)
    assert (found.trainable, found.operations, found.is_full) == ((1234, None), 1200.0, False)


@pytest.mark.parametrize("name", ["experiments/mhr/t/row.gin", "models/t5_1_1_xl.gin"])
def test_fingerprint_changes_with_settings(gin_folder, name):
    before = fingerprint()
    with open(gin_folder / name, "a") as file:
        file.write("C = 3\n")
    assert fingerprint() != before


def test_fingerprint_does_not_change_with_remarks_or_how_data_is_read(gin_folder):
    before = fingerprint()
    row = gin_folder / "experiments/mhr/t/row.gin"
    row.write_text(row.read_text().replace("A row.", "The row.").replace("A = 1", "\nA = 1  # one"))
    (gin_folder / "data/p3.gin").write_text("DATA = 2\n")
    assert fingerprint() == before


def test_missing_part_of_a_head(gin_folder):
    row = gin_folder / "experiments/mhr/t/row.gin"
    row.write_text(row.read_text().replace("# Expected:", "# Hoped:"))
    with pytest.raises(errors.UserError, match=r"row\.gin: its head lacks Expected"):
        files_lib.load("mhr/t/row")


def test_what_was_recorded_counts_today():
    """No record is of settings that have changed since."""
    record = json.loads(record_lib.default_record().read_text())
    stale = [n for n, entry in record.items() if files_lib.load(n).fingerprint != entry["settings"]]
    assert len(record) == 104
    assert not stale, f"check them again: {' '.join(stale)}"

"""Backbones whose padding, end and start are not T5's, from a folder to answers."""

import json

import gin
import jax
import letters_t5
import numpy as np
import pytest

import moe_peft
from moe_peft import errors
from moe_peft.cli import main
from moe_peft.models import decoding, special_ids
from moe_peft.partitioning import mesh as mesh_lib
from moe_peft.training import summary, train
from moe_peft.weights import saved_run

# The second has the ids of MADLAD-400 but for the start. The two are one function of texts.
LIKE_T5 = special_ids.SpecialIds(0, 1, 0)
OTHER = special_ids.SpecialIds(1, 2, 1)
MADLAD = special_ids.SpecialIds(1, 2, 0)
ROWS = letters_t5.rows(24)
FOLDERS = {"like_t5": LIKE_T5, "other": OTHER, "madlad": MADLAD}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ids")
    for name, ids in FOLDERS.items():
        letters_t5.folder(folder / name, ids)
    with open(folder / "train.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in letters_t5.rows(24))
    return folder


@pytest.fixture(autouse=True)
def _here(place, monkeypatch):
    monkeypatch.setenv("MOE_PEFT_CACHE", str(place / "cache"))
    monkeypatch.chdir(place)
    monkeypatch.setattr(mesh_lib, "all_devices", lambda: jax.devices()[:1])
    yield
    gin.clear_config()


def trained(name, **settings):
    """(a model, its metrics after three steps)."""
    method = moe_peft.methods.molora(num_experts=2, rank=2, placement=".*/(query|wi_0)")
    model = moe_peft.load(f"hf:{name}", method=method)
    metrics = model.train(ROWS, steps=3, batch_size=4, learning_rate=0.01, **settings)
    return model, {name: float(value) for name, value in metrics.items() if "second" not in name}


def numbers(name):
    """All that can be asked of a model after three steps."""
    model, metrics = trained(name)
    asked = [row["inputs"] for row in ROWS[:5]]
    return {
        "metrics": metrics,
        "answers": model.generate(asked, max_tokens=6),
        "scores": model.score(asked, ["good", "b%d"], batch_size=2),
        "free": model.evaluate(ROWS, batch_size=5, max_tokens=6),
    }


def more_numbers(name):
    """Answers of beams, and choices in a file's rows."""
    model, metrics = trained(name)
    asked = [row["inputs"] for row in ROWS[:5]]
    choices = [row | {"choices": ["good", "b%d", "%"]} for row in ROWS]
    return {
        "metrics": metrics,
        "beams": model.generate(asked, 6, decoding=decoding.BeamSearch(num_beams=2), batch_size=3),
        "ranked": model.evaluate(choices, batch_size=5),
    }


def packed(name):
    """What a run of packed rows measures."""
    _, metrics = trained(name, pack=True, feature_lengths={"inputs": 32, "targets": 16})
    return metrics


# Beams of such ids are in tests/models/test_special_ids.py too, choices in `score` above.
@pytest.mark.parametrize(
    "found", [numbers, packed, pytest.param(more_numbers, marks=pytest.mark.slow)]
)
def test_the_order_of_ids_changes_nothing(place, found):
    one, other = found("like_t5"), found("other")
    flat = lambda found: jax.tree_util.tree_leaves_with_path(found)
    assert len(flat(one)) == len(flat(other)) > 10
    for (path, own), (_, theirs) in zip(flat(one), flat(other), strict=True):
        if isinstance(own, str):
            assert own == theirs, path
        else:
            np.testing.assert_allclose(own, theirs, rtol=2e-4, err_msg=str(path))


def test_a_run_with_madlads_ids_keeps_them(place, capsys):
    line = "train --method ia3 --backbone hf:madlad --data train.jsonl --steps 2 --batch_size 4"
    assert main.main([*line.split(), "--out", "trained"]) == 0
    assert "T5Config.pad_id = 1\n" in (place / "trained/config.gin").read_text()
    config = saved_run.description_of("trained")["model"]["config"]
    assert (config["pad_id"], config["eos_id"]) == (1, 2)
    assert "start_id" not in config  # as of every T5
    assert (
        main.main([*line.replace("steps 2", "steps 3").split(), "--out", "trained"]) == 0
    )  # goes on
    with open("asked.txt", "w") as file:
        file.write("so % so 3\n")
    assert main.main(["infer", "trained", "--inputs", "asked.txt", "--outputs", "said.jsonl"]) == 0
    assert main.main(["eval", "trained", "--data", "train.jsonl"]) == 0
    answer = json.loads((place / "said.jsonl").read_text())["prediction"]
    assert moe_peft.load("trained").generate("so % so 3", max_tokens=8) == answer
    capsys.readouterr()
    merged = "convert --from trained --merge --to hf:merged --overwrite"
    assert main.main(merged.split()) == 0
    for name in ("config.json", "tokenizer_config.json", "spiece.model"):
        assert (place / "merged" / name).read_bytes() == (place / "madlad" / name).read_bytes()


def test_ids_that_differ_are_one_line(place, capsys):
    tiny = "plan --method ia3 --backbone hf:madlad"
    sizes = [f"--gin.T5Config.{name}={value}" for name, value in letters_t5.SIZES.items()]
    model = ["--gin.MODEL=@models.Transformer()", "--gin.Transformer.config=@models.T5Config()"]
    assert main.main([*tiny.split(), *model, *sizes]) == 2
    said = capsys.readouterr().err
    assert "hf:" in said
    assert "has the ids padding 1, end 2, start 0; the model config says padding 0" in said
    assert said.count("\n") == 1
    model = moe_peft.load("hf:madlad", vocabulary="like_t5")
    for ask in (
        lambda: model.generate("good"),
        lambda: model.score("good", ["a"]),
        lambda: model.train(letters_t5.rows(8), steps=1),
        lambda: model.evaluate(letters_t5.rows(8)),
    ):
        with pytest.raises(errors.UserError, match="has the id 0 for padding, and the model 1"):
            ask()
    settings = json.loads((place / "like_t5/tokenizer_config.json").read_text())
    other = place / "unknown_is_padding"
    other.mkdir()
    (other / "spiece.model").write_bytes(letters_t5.tokenizer(special_ids.SpecialIds(2, 1, 0)))
    (other / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": None}))
    with pytest.raises(errors.UserError, match="id 0 for what it cannot spell, and the model for"):
        moe_peft.load("hf:like_t5", vocabulary="unknown_is_padding").generate("good")


def test_seqio_is_not_given_other_padding(place):
    with pytest.raises(errors.UserError, match="SeqIO and T5X pad with the id 0, and this .* 1"):
        moe_peft.as_seqio_task("train.jsonl", vocabulary="madlad")


def test_dropout_is_the_folders_unless_a_user_sets_it(place, monkeypatch):
    letters_t5.folder(place / "without", LIKE_T5, dropout_rate=0.0)
    assert moe_peft.load("hf:without").network.config.dropout_rate == 0.0
    ran = []
    monkeypatch.setattr(train, "fit", lambda **given: ran.append(given) or _Nothing)
    monkeypatch.setattr(summary, "conclude", lambda *args: None)
    line = "train --method ia3 --backbone hf:without --data train.jsonl --steps 1 --batch_size 4"
    for name, more, rate in (("own", [], 0.0), ("set", ["--gin.DROPOUT_RATE=0.3"], 0.3)):
        assert main.main([*line.split(), "--out", f"runs/{name}", *more]) == 0
        assert ran[-1]["settings"].model.config.dropout_rate == rate
        assert ran[-1]["described"]["model"]["config"]["dropout_rate"] == rate
        gin.clear_config()


class _Nothing:
    """Of a run that was not made."""

    metrics = {}

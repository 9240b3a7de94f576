"""`moe_peft.load` and what its model can do."""

import json
import pathlib
import subprocess
import sys

import gin
import jax
import numpy as np
import own_data
import pytest

import moe_peft
from moe_peft.data import vocabularies
from moe_peft.partitioning import mesh as mesh_lib
from moe_peft.weights import saved_run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    own_data.t5_folder(folder / "t5")
    own_data.write(folder / "train.jsonl", ROWS)
    (folder / "longer").mkdir()
    settings = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 200}
    (folder / "longer" / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(autouse=True)
def _here(place, monkeypatch):
    monkeypatch.setenv("MOE_PEFT_CACHE", str(place / "cache"))
    monkeypatch.chdir(place)


def one_layer():
    """For what is the same with any method."""
    return moe_peft.methods.lora(rank=2, placement="encoder/.*/query")


STEPS, ROWS = 150, own_data.rows(12)


@pytest.fixture(scope="module")
def trained(place):
    """A model after enough steps to know the answers of its training rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_PEFT_CACHE", str(place / "cache"))
        patch.chdir(place)
        patch.setattr(mesh_lib, "all_devices", lambda: jax.devices()[:1])
        model = moe_peft.load("hf:./t5", method=moe_peft.methods.lora(rank=8, placement="light"))
        metrics = model.train(
            "train.jsonl", steps=STEPS, batch_size=12, learning_rate=1e-2, out="runs/a"
        )
    assert metrics["exact_match"] > 0.7  # with dropout, while it learned
    return model


def test_a_model_answers_what_it_learned(trained):
    answers = trained.generate([row["inputs"] for row in ROWS], max_tokens=8)
    right = sum(answer == row["targets"] for answer, row in zip(answers, ROWS, strict=True))
    assert right >= 11
    assert trained.generate(ROWS[0]["inputs"], max_tokens=8) == answers[0]
    scores = trained.score(ROWS[0]["inputs"], choices=["good", "bad"])
    assert scores["good"] > scores["bad"]
    assert sum(np.exp(list(scores.values()))) <= 1.0
    found = trained.evaluate(ROWS)
    assert (found["mean"], found["num_examples"]) == (right / 12, 12)
    assert trained.evaluate("train.jsonl") == {**found, "tasks": {"train": found["mean"]}}


def test_save_and_load(trained, place):
    folder = trained.save("adapter", overwrite=True)
    names = {path.name for path in pathlib.Path(folder).iterdir()}
    assert names >= {"adapter.safetensors", "adapter_config.json", "README.md"}
    text, choices = own_data.rows(1)[0]["inputs"], ["good", "bad"]
    loaded = (
        moe_peft.load("adapter"),
        moe_peft.load("adapter", backbone="hf:./t5"),
        moe_peft.load("runs/a"),
    )
    # All that answers depend on is compared, and one is asked.
    for again in loaded:
        assert again.network == trained.network
        assert again.method.describe() == trained.method.describe()
        jax.tree.map(np.testing.assert_array_equal, again.params, trained.params)
        assert vocabularies.get(again.vocabulary) == vocabularies.get(trained.vocabulary)
    assert loaded[0].score(text, choices) == trained.score(text, choices)
    assert f"trained {STEPS} steps" in repr(loaded[0])


def test_the_command_line_takes_what_python_trained(trained, place, capsys):
    from moe_peft.cli import main

    own_data.write(place / "q.jsonl", own_data.rows(3))
    command = "infer runs/a --inputs q.jsonl --outputs answers.jsonl"
    assert main.main(command.split()) == 0
    gin.clear_config()
    answers = [json.loads(line) for line in (place / "answers.jsonl").read_text().splitlines()]
    texts = [row["inputs"] for row in own_data.rows(3)]
    assert [row["prediction"] for row in answers] == trained.generate(texts, max_tokens=8)
    assert not (place / "runs/a/config.gin").exists()  # what gin was told elsewhere is not its own


def test_rows_of_every_kind_train_alike(place):
    rows, digests = own_data.rows(20), []
    pairs = [(row["inputs"], row["targets"]) for row in rows]
    own_data.write(place / "some.jsonl", rows)
    for number, data in enumerate((iter(rows), pairs, ["some.jsonl"])):
        model = moe_peft.load("hf:./t5", method=one_layer())
        model.train(data, steps=2, batch_size=4, out=f"runs/kind{number}")
        digests.append(saved_run.load(f"runs/kind{number}").record["digests"]["trainable"])
    assert len(set(digests)) == 1


def test_a_run_goes_on(place):
    train = lambda **more: moe_peft.load("hf:./t5", method=one_layer()).train(
        "train.jsonl", batch_size=4, learning_rate=lambda step: 1e-3, **more
    )
    train(steps=2, out="runs/whole")
    train(steps=1, out="runs/parts")
    train(steps=2, out="runs/parts")
    digests = [saved_run.load(f"runs/{name}").record["digests"] for name in ("whole", "parts")]
    assert digests[0] == digests[1]


def test_a_backbone_answers_without_training(place):
    model = moe_peft.load("t5")  # what kind of folder it is shows
    assert "frozen on hf:" in repr(model)
    assert isinstance(model.generate("great", max_tokens=2), str)
    with pytest.raises(moe_peft.UserError, match="Nothing was trained"):
        model.save("nothing")


MISTAKES = {
    "nothing there": (lambda: moe_peft.load("nowhere"), "nowhere"),
    "a run and a method": (
        lambda: moe_peft.load("runs/a", method=moe_peft.methods.ia3()),
        "tells its own method",
    ),
    "no vocabulary": (lambda: moe_peft.load("random:0", network=object()), "vocabulary"),
    "missing file": (
        lambda: moe_peft.load("t5", method=moe_peft.methods.ia3()).train("no.jsonl"),
        "no.jsonl is not there",
    ),
    "another vocabulary": (
        lambda: moe_peft.load("t5", vocabulary="longer").generate("a"),
        "'longer' has token ids up to 458, the model's vocab_size is 384",
    ),
    "no texts": (lambda: moe_peft.load("t5").generate([]), "at least one text"),
    "a row of three": (
        lambda: moe_peft.load("t5", method=moe_peft.methods.ia3()).train([("a", "b", "c")]),
        "Row 1 is .*a pair",
    ),
    "no rows": (
        lambda: moe_peft.load("t5", method=moe_peft.methods.ia3()).train([]),
        "is empty",
    ),
}


@pytest.mark.parametrize(("call", "said"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(trained, call, said):
    with pytest.raises(moe_peft.UserError, match=said):
        call()


def test_importing_is_instant_and_names_few():
    code = "import sys, time; t = time.process_time(); import moe_peft; "
    code += "print(time.process_time() - t, 'jax' in sys.modules, sorted(moe_peft.__all__))"
    root = str(pathlib.Path(moe_peft.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    seconds, has_jax, *names = done.stdout.split(maxsplit=2)
    assert float(seconds) < 0.2
    assert has_jax == "False"
    assert eval(names[0]) == ["Model", "UserError", "as_seqio_task", "load", "methods"]

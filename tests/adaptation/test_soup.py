"""Neighbours of new tasks: chosen by cosine, weighed equally, from shots alone."""

import json
import types

import gin
import numpy as np
import pytest

from moe_peft import errors
from moe_peft.adaptation import soup
from moe_peft.cli import main
from moe_peft.data import fewshot, lookup
from moe_peft.tasks import cldr  # noqa: F401  registers the suite

NUM_TASKS = 249


def kind(name):
    return name.split("_")[1]


@pytest.fixture(autouse=True)
def _clean_gin():
    yield
    gin.clear_config()


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [
        ({"num_neighbours": 2}, [1, 3]),
        ({"num_neighbours": 9}, [0, 1, 3, 4]),
        ({"num_neighbours": 9, "threshold": 0.4}, [1, 3]),
        ({"num_neighbours": 1, "threshold": 0.4}, [1]),
        ({"num_neighbours": 3, "threshold": 0.99}, [1]),
    ],
)
def test_the_most_similar_are_chosen_with_equal_weights(settings, chosen):
    weights = soup.Neighbours(**settings).weights_from(np.array([0.1, 0.9, np.nan, 0.4, -0.5]))
    np.testing.assert_array_equal(np.flatnonzero(weights), chosen)
    np.testing.assert_allclose(weights[chosen], 1 / len(chosen))


def letters(texts):
    """An encoder that counts a, b and c."""
    return np.array([[text.count(letter) for letter in "abc"] for text in texts], float)


def test_embeddings_are_means_and_similarities_cosines(monkeypatch):
    texts = [("one", ["aab", "b"]), ("", []), ("three", ["c"])]
    monkeypatch.setattr(soup, "_source_texts", lambda *args: texts)
    settings = soup.Neighbours(1, encoder=soup.pretrained(letters))
    found = soup.Sources("any", 3, settings).compare({"new": ["a", "abbb"], "like three": ["ccc"]})
    new, one = np.array([1.0, 1.5, 0.0]), np.array([1.0, 1.0, 0.0])
    cosine = new @ one / np.linalg.norm(new) / np.linalg.norm(one)
    np.testing.assert_allclose(found.similarities["new"], [cosine, np.nan, 0.0])
    np.testing.assert_array_equal(found.weights["new"], [1, 0, 0])
    assert found.chosen_for("like three") == [("three", pytest.approx(1.0), 1.0)]


def test_new_cldr_tasks_find_their_function(tmp_path):
    found = soup.compare(
        "cldr_train", "cldr_fewshot", NUM_TASKS, soup.Neighbours(3, max_examples=8)
    )
    assert set(found.weights) == {task.name for task in lookup.tasks_of("cldr_fewshot")}
    assert "" not in found.sources
    for new, weights in found.weights.items():
        assert weights.shape == (NUM_TASKS,)
        assert weights.sum() == pytest.approx(1.0)
        assert [kind(name) for name, *_ in found.chosen_for(new)] == [kind(new)] * 3
    table, data = found.write(tmp_path)
    assert "| cldr_country_gl | cldr_country_" in table.read_text()
    saved = json.loads(data.read_text())["cldr_country_gl"]
    assert len(saved) == 3
    assert saved[0]["cosine"] >= saved[2]["cosine"]
    # Names stand at the ids under which the multi-task run knows them.
    named = lookup.tasks_of("cldr_train")[::50]
    assert len(named) == 5
    for task in named:
        assert found.sources[task.source.rows("train").scalars["task_ids"][0]] == task.name


def test_templates_may_be_tasks():
    gin.bind_parameter("per_template.num_templates", 4)
    settings = soup.Neighbours(1, max_examples=2)
    found = soup.Sources("cldr_country_af", 4 * NUM_TASKS, settings)
    first = 4 * int(
        lookup.tasks_of("cldr_country_af")[0].source.rows("train").scalars["task_ids"][0]
    )
    assert found.names[first : first + 4] == [f"cldr_country_af, template {i}" for i in range(4)]
    assert set(found.names[:first]) == {""}


def test_a_run_is_known_by_its_shots_alone(monkeypatch):
    seen = []

    class Sources:
        def __init__(self, *args):
            pass

        def compare(self, new):
            seen.append(new)
            return types.SimpleNamespace(weights={name: np.ones(1) for name in new})

    monkeypatch.setattr(soup, "Sources", Sources)
    weights = soup.task_weights("cldr_train", NUM_TASKS, shots=3, wordings=4)
    name = "cldr_country_gl"
    (task,) = lookup.tasks_of(name)
    for seed in (0, 1):
        np.testing.assert_array_equal(weights(types.SimpleNamespace(task=name, seed=seed)), [1])
        rows = task.source.rows("train")
        drawn = fewshot.draw(name, len(rows), fewshot.Sizes(3, 0, 4), seed).shots.reshape(-1)
        decode = task.output_features["inputs"].vocabulary.decode
        assert seen[-1] == {name: [decode(rows.inputs[int(i)].tolist()) for i in drawn]}
    assert len(seen[0][name]) == 12
    assert seen[0] != seen[1]


def test_targets_count_only_where_asked():
    example = types.SimpleNamespace(inputs="x", targets="y")
    assert soup.Neighbours().text(example) == "x"
    assert soup.Neighbours(with_targets=True).text(example) == "x y"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: soup.Neighbours(0), "num_neighbours is 0"),
        (lambda: soup.char_ngrams(3, 2), "shortest <= longest"),
        (lambda: soup.compare("cldr_trian", "cldr_fewshot", 249), "Did you mean 'cldr_train'"),
        (lambda: soup.compare("cldr_train", "cldr_fewshot", 100), "tells 100 tasks apart"),
    ],
)
def test_mistakes_are_one_line(call, words):
    with pytest.raises(errors.UserError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_gin_file_is_complete():
    files = ["models/tiny.gin", "data/cldr.gin", "runs/fewshot.gin", "methods/private.gin"]
    files += ["methods/transferred.gin", "runs/soup.gin", "optimizers/adamw_mhr.gin"]
    settings = ["BACKBONE=random:0", "MODEL_DIR=/nowhere", "SOURCE=/run", "BATCH_SIZE=8"]
    settings += ["TRAIN_STEPS=2", "SHOTS=8", "SOURCE_MIXTURE=cldr_train", "WORDINGS=4"]
    main.configure("adapt", files, settings)
    weights = gin.query_parameter("adapt.task_weights").scoped_configurable_fn()
    assert callable(weights)

"""Which examples are shots, which select, and what a step sees."""

import numpy as np
import pytest

from moe_peft import errors
from moe_peft.data import fewshot
from moe_peft.models import few_shot
import moe_peft.tasks.cldr  # noqa: F401  # registers the tasks

LENGTHS = {"inputs": 56, "targets": 28}


def test_shots_are_those_of_t_few():
    """Its data reader shuffles a list with np.random.seed(seed) and takes the first."""
    state = np.random.get_state()
    np.random.seed(42)
    examples = [f"example {i}" for i in range(20)]
    np.random.shuffle(examples)
    np.random.set_state(state)
    found = fewshot.draw("t", 20, fewshot.Sizes(shots=6, validation=5), seed=42)
    assert [f"example {i}" for i in found.shots[:, 0]] == examples[:6]
    assert [f"example {i}" for i in found.validation[:, 0]] == examples[6:11]


def test_validation_examples_are_no_shots_in_any_wording():
    sizes = fewshot.Sizes(shots=4, validation=3, wordings=4)
    found = fewshot.draw("t", 40, sizes, seed=1)
    assert found.shots.shape == (4, 4)
    assert found.validation.shape == (3, 4)
    assert not set(found.shots.flat) & set(found.validation.flat)
    np.testing.assert_array_equal(found.shots - found.shots[:, :1], [[0, 1, 2, 3]] * 4)
    assert not np.any(found.shots[:, 0] % 4)
    other = fewshot.draw("t", 40, sizes, seed=2)
    assert not np.array_equal(found.shots, other.shots)


def test_counts_may_be_given_by_task_name():
    sizes = fewshot.Sizes({"a_.*": 2, ".*": 5}, {"a_1": 1, ".*": 0}, {"b": 2, ".*": 1})
    assert [sizes.counts_of(name) for name in ("a_1", "a_2", "b")] == [(2, 1), (2, 0), (5, 0)]
    assert [sizes.wordings_of(name) for name in ("b", "c")] == [2, 1]
    # Whole names: "a_.*" does not match "xa_1".
    assert sizes.counts_of("xa_1") == (5, 0)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (fewshot.Sizes(11), "'t' has 10 training examples; 11 shots were asked for"),
        (fewshot.Sizes(8, 3), "10 training examples; 8 shots and 3 for validation were asked"),
        (fewshot.Sizes(4, wordings=3), "10 rows, which do not divide into examples of 3 wordings"),
        (fewshot.Sizes(4, wordings=5), "'t' has 2 training examples"),
        (fewshot.Sizes({"u": 4}), "shots says nothing about the task 't'; it has u"),
        (fewshot.Sizes(0), "shots of 't' is 0; expected 1 or more"),
        (fewshot.Sizes(1, -1), "validation_shots of 't' is -1; expected 0 or more"),
        (fewshot.Sizes("8"), "shots of 't' is '8'"),
        (fewshot.Sizes(1, wordings=0), "wordings of 't' is 0"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(sizes, message):
    with pytest.raises(errors.UserError, match=message) as error:
        fewshot.draw("t", 10, sizes, seed=0)
    assert "\n" not in str(error.value)


def test_an_epoch_sees_every_shot_at_most_once_and_drops_what_is_left():
    assert fewshot.steps_in_epoch(10, 4) == 2
    found = fewshot.schedule(10, 1, 4, seed=0, steps=range(6))
    assert found.shape == (6, 4)
    for epoch in range(3):
        seen = found[2 * epoch : 2 * epoch + 2].reshape(-1)
        assert len(set(seen)) == 8
        assert set(seen) <= set(range(10))
    assert not np.array_equal(found[:2], found[2:4])


def test_a_step_does_not_depend_on_where_reading_began():
    whole = fewshot.schedule(10, 4, 3, seed=5, steps=range(20))
    np.testing.assert_array_equal(fewshot.schedule(10, 4, 3, seed=5, steps=range(7, 20)), whole[7:])
    assert not np.array_equal(fewshot.schedule(10, 4, 3, seed=6, steps=range(20)), whole)


def test_every_access_draws_a_wording():
    found = fewshot.schedule(8, 4, 8, seed=0, steps=range(200))
    counts = np.bincount(found.reshape(-1), minlength=32)
    assert counts.min() > 20  # 50 of each are expected
    np.testing.assert_array_equal(counts.reshape(8, 4).sum(axis=1), 200)


def test_fewer_shots_than_a_batch_are_the_batch():
    found = fewshot.schedule(3, 2, 5, seed=0, steps=range(4))
    for row in found:
        assert sorted(row[:3] // 2) == [0, 1, 2]
        assert list(row[3:]) == [-1, -1]


@pytest.fixture(scope="module")
def weekday():
    return fewshot.Task("cldr_weekday_gl", LENGTHS, "validation", with_choices=True)


def test_a_task_encodes_its_wordings_together(weekday):
    shots, validation, wordings = weekday.draw(fewshot.Sizes(3, 2, 4), seed=0)
    assert (len(shots), len(validation), wordings) == (12, 8, 4)
    answers = [example.targets for example in shots.examples]
    assert [answers[i] for i in (0, 4, 8)] == [answers[i + 3] for i in (0, 4, 8)]
    assert [example.template_id for example in shots.examples[:4]] == [0, 1, 2, 3]
    assert not {e.inputs for e in shots.examples} & {e.inputs for e in validation.examples}
    assert not {e.inputs for e in shots.examples} & {e.inputs for e in weekday.test.examples}
    assert "task_ids" not in shots.features


def test_the_right_choice_is_the_target(weekday):
    found = weekday.test
    for example, choices, gold, targets in zip(
        found.examples,
        found.features[fewshot.CHOICES],
        found.features[few_shot.GOLD],
        found.features["decoder_target_tokens"],
        strict=True,
    ):
        assert example.answer_choices[gold] == example.targets
        np.testing.assert_array_equal(choices[gold], targets[targets > 0])
        assert len(choices) == 7


def test_a_target_that_is_cut_is_known():
    short = fewshot.Task("cldr_weekday_gl", {"inputs": 56, "targets": 5}, "validation", False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fewshot.evaluation_data.encoding, "warn_if_cut", lambda *args: None)
        assert np.all(short.test.is_cut)


def test_a_split_that_is_not_there_is_one_line():
    with pytest.raises(errors.UserError, match="has no split 'test'"):
        fewshot.Task("cldr_weekday_gl", LENGTHS, "test", False)
    heldout = fewshot.Task("cldr_month_af", LENGTHS, "validation", False)
    if "train" in heldout._task.splits:
        pytest.skip("cldr_month_af trains")
    with pytest.raises(errors.UserError, match="has no split 'train'"):
        heldout.draw(fewshot.Sizes(1), 0)

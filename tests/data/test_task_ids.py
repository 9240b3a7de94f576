"""What a task id names, and whether a method knows it."""

import gin
import numpy as np
import pytest

from moe_peft import errors, methods
from moe_peft.data import pipeline, task_ids
from moe_peft.tasks import cldr

LENGTHS = {"inputs": 56, "targets": 28}


@pytest.fixture
def per_template():
    gin.parse_config("per_template.num_templates = 4")
    yield
    gin.clear_config()


def test_an_id_per_task_and_template(per_template):
    batch = next(pipeline.train_batches("cldr_train", 32, LENGTHS, seed=0))
    gin.clear_config()
    plain = next(pipeline.train_batches("cldr_train", 32, LENGTHS, seed=0))
    np.testing.assert_array_equal(batch["encoder_input_tokens"], plain["encoder_input_tokens"])
    np.testing.assert_array_equal(batch["task_ids"], 4 * plain["task_ids"] + plain["template_ids"])
    assert batch["task_ids"].dtype == np.int32
    assert len(np.unique(batch["task_ids"])) > len(np.unique(plain["task_ids"]))


def test_evaluation_reads_the_same_setting(per_template):
    name = cldr.suite.tasks("train")[7].name
    batch = next(pipeline.eval_examples(name, LENGTHS, batch_size=8))
    np.testing.assert_array_equal(batch.features["task_ids"], 4 * 7 + np.arange(8) % 4)


def test_mistakes(per_template):
    batch = {"task_ids": np.array([0, 1])}
    with pytest.raises(errors.UserError, match="needs the feature 'template_ids'"):
        task_ids.per_template(batch)
    batch["template_ids"] = np.array([0, 4])
    with pytest.raises(errors.UserError, match="Template id 4 is not below .*num_templates, 4"):
        task_ids.per_template(batch)


def test_ids_are_checked_batch_by_batch():
    method = methods.poly(num_tasks=3)
    batches = ({"task_ids": np.array([0, last])} for last in (2, 3))
    checked = task_ids.checked_batches(batches, method, "m")
    assert next(checked)["task_ids"].tolist() == [0, 2]
    with pytest.raises(errors.UserError, match=r"'m' has the task id 3.*0 to 2"):
        next(checked)
    with pytest.raises(errors.UserError, match="-1"):
        task_ids.check_ids(np.array([-1]), 3, "m")
    free = iter([{"task_ids": np.array([9])}, {}])
    assert len(list(task_ids.checked_batches(free, methods.lora(), "m"))) == 2

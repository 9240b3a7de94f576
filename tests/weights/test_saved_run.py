"""What was trained is found in a file, in an adaptation, and in the seams that take a run."""

import json

import numpy as np
import pytest

from moe_peft import errors, methods
from moe_peft.methods import transfer
from moe_peft.training import restore
from moe_peft.training import start as start_lib
from moe_peft.weights import identity, safetensors_files, saved_run

PATH = "encoder/attention/adapter/vectors"
DESCRIPTION = {
    "method": identity.as_json(methods.ia3().describe()),
    "backbone": {"fingerprint": "abc", "frozen_dtype": "float32"},
    "backbone_spec": "random:0",
}


def tree(value):
    return {"encoder": {"attention": {"adapter": {"vectors": np.full(3, value, np.float32)}}}}


@pytest.fixture
def file(tmp_path):
    saved = saved_run.Saved(7, tree(2.0), {}, {"description": DESCRIPTION})
    return saved_run.save(saved, tmp_path / "ia3.safetensors")


@pytest.fixture
def adaptation(tmp_path):
    """Two groups of runs; the second is not finished."""
    folder = tmp_path / "fewshot"
    jobs = [[{"task": "a", "seed": 0}, {"task": "b", "seed": 1}], [{"task": "c", "seed": 0}]]
    (folder / "groups" / "000").mkdir(parents=True)
    plan = {"description": DESCRIPTION, "groups": jobs}
    (folder / "groups" / "plan.json").write_text(json.dumps(plan))
    stacked = {"adapter": {"vectors": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    safetensors_files.save_tree(stacked, folder / "groups" / "000" / "adapters.safetensors")
    finished = {"runs": [{"chosen_step": 10}, {"chosen_step": 20}]}
    (folder / "groups" / "000" / "finished.json").write_text(json.dumps(finished))
    return folder


def test_a_file_holds_the_run(file):
    saved = saved_run.load(file)
    np.testing.assert_array_equal(saved.trainable["encoder"]["attention"]["adapter"]["vectors"], 2)
    assert (saved.step, saved.description) == (7, DESCRIPTION)
    assert saved_run.load(file, 7).step == 7
    assert saved_run.is_adapter_file(file)
    with pytest.raises(errors.UserError, match="holds step 7, not step 8"):
        saved_run.load(file, 8)


def test_files_without_a_record_or_damaged_are_named(file, tmp_path):
    plain = safetensors_files.save_tree(tree(1.0), tmp_path / "plain.safetensors")
    with pytest.raises(errors.UserError, match="plain.safetensors has no 'method'"):
        saved_run.load(plain)
    assert not saved_run.is_adapter_file(plain)
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(errors.UserError, match="ia3.safetensors cannot be read as safetensors"):
        saved_run.load(file)


def test_a_path_that_is_not_there(file):
    with pytest.raises(errors.UserError, match="no training checkpoint in .*Did you mean 'ia3.s"):
        saved_run.load(file.with_name("ia.safetensors"))
    with pytest.raises(errors.UserError, match="no training checkpoint in .*folder .*not exist"):
        saved_run.load(file.with_name("no") / "run")


def test_one_run_of_an_adaptation(adaptation, file):
    saved = saved_run.load(adaptation, member="b:1")
    np.testing.assert_array_equal(saved.trainable["adapter"]["vectors"], [3, 4, 5])
    assert (saved.step, saved.description["member"]) == (20, "b:1")
    refused = {
        "adaptation of 3 runs TASK:SEED, of which one has to be named": None,
        "which has no 'b:2'.*Did you mean 'b:1'": "b:2",
        "The run 'c:0' .* is not finished": "c:0",
    }
    for words, member in refused.items():
        with pytest.raises(errors.UserError, match=words):
            saved_run.load(adaptation, member=member)
    with pytest.raises(errors.UserError, match="is not an adaptation"):
        saved_run.load(file, member="b:1")


def test_a_transferred_method_starts_from_a_file(file):
    kept = transfer.transferred(methods.ia3(), "keep")
    source = start_lib.Source.load(kept, str(file))
    assert source.step == 7
    np.testing.assert_array_equal(source.trainable["encoder"]["attention"]["adapter"]["vectors"], 2)
    source.check_backbone("abc")


def test_evaluation_takes_a_file_as_it_is(file, monkeypatch):
    fresh = start_lib.Trees({"encoder": {"kernel": np.ones(2)}}, tree(1.0), "abc")
    monkeypatch.setattr(start_lib.Start, "trees", lambda *args, **kwargs: fresh)
    start = start_lib.Start(None, None, methods.ia3(), {})
    for place in ({"start_from": str(file), "model_dir": "/nowhere"}, {"model_dir": str(file)}):
        params, step = restore.params(start, "random:0", **place)
        assert step == 7
        np.testing.assert_array_equal(params["encoder"]["attention"]["adapter"]["vectors"], 2)
    other = start_lib.Start(None, None, methods.lora(), {})
    with pytest.raises(errors.UserError, match="ia3.safetensors are of a run with another method"):
        restore.params(other, "random:0", str(file))

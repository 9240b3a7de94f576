"""Rules of axes, features, what is restored and what is saved."""

import types

import jax
import numpy as np
import pytest
import seqio
import tensorflow as tf

from moe_peft import errors, methods, patching
from moe_peft.training import restore
from moe_peft.training import start as start_lib
from moe_peft.weights import safetensors_files, saved_run


@pytest.fixture
def t5x(guest):
    names = ("adapted", "axes", "features", "restoring", "saving")
    return guest.load(*(f"moe_peft.t5x.{name}" for name in names))


MHR = lambda: methods.mhr(3, num_skills=2, num_splits=2)


def test_rules_of_adapters_axes_follow_from_the_method(t5x):
    rules = t5x.axes.rules(methods.molora(num_experts=3))
    assert ("expert", None) in rules
    assert ("rank", None) in rules
    assert ("heads", "model") in rules
    assert ("expert", None) in t5x.axes.rules(methods.mov(num_experts=3, routing="sentence"))
    assert {"skill", "split", "task"} <= {name for name, _ in t5x.axes.rules(MHR())}
    first = t5x.axes.rules(methods.molora(num_experts=3), first=[("expert", "model")])
    assert first[0] == ("expert", "model")
    assert ("expert", None) not in first


def dataset():
    rows = {
        "inputs": tf.constant([[5, 6, 1]]),
        "targets": tf.constant([[7, 1]]),
        "task_ids": tf.constant([2]),
        "template_ids": tf.constant([1]),
    }
    return tf.data.Dataset.from_tensor_slices(rows)


LENGTHS = {"inputs": 4, "targets": 3}


def test_features_of_a_method_that_routes_by_task(guest, t5x):
    make = t5x.features.converter(guest.base_model("t5"), MHR())
    (row,) = make(pack=False)(dataset(), LENGTHS).as_numpy_iterator()
    np.testing.assert_array_equal(row["encoder_input_tokens"], [5, 6, 1, 0])
    assert row["task_ids"] == 2
    assert row["task_ids"].shape == ()
    with pytest.raises(errors.UserError, match="cannot be packed: set train/utils.DatasetConfig"):
        make(pack=True)
    few = t5x.features.converter(guest.base_model("t5"), methods.mhr(2, num_skills=2))
    found = few(pack=False)(dataset(), LENGTHS)
    with pytest.raises(tf.errors.InvalidArgumentError, match="tells 2 tasks apart"):
        list(found)
    plain = t5x.features.converter(guest.base_model("t5"), methods.mov())
    assert plain is seqio.EncDecFeatureConverter


def test_sentence_embeddings(guest, t5x):
    vocabulary = seqio.ByteVocabulary()
    encode = lambda texts: np.asarray([[len(text), 1.0] for text in texts], np.float32)
    make = t5x.features.RoutingFeatureConverter(False, methods.mov(), vocabulary, encode)
    (row,) = make(dataset(), LENGTHS).as_numpy_iterator()
    np.testing.assert_array_equal(row["sentence_embeddings"], [2.0, 1.0])


def saved_and_wanted():
    leaf = lambda *shape: np.zeros(shape, np.float32)
    base = {"a": {"kernel": leaf(2, 3)}, "b": {"kernel": leaf(4)}}
    adapters = {"a": {"adapter": {"lora_a": leaf(2, 1), "lora_b": leaf(1, 3)}}}
    merged = {"a": base["a"] | adapters["a"], "b": dict(base["b"])}
    state = {"step": np.int32(7), "param_states": {"a": {"kernel": leaf(1)}}}
    return {"target": base, "state": state}, {"target": merged, "state": {"step": 0}}


def test_a_backbone_is_restored_whole_or_not_at_all(t5x):
    saved, wanted = saved_and_wanted()
    restored = t5x.restoring.backbone
    found = restored(saved, wanted)
    assert found == {"target": saved["target"], "state": {"step": 7}}
    assert restored(wanted, wanted) is wanted
    with pytest.raises(errors.UserError, match="lacks 2 of 4 leaves, the first is a/adapter"):
        restored(saved, wanted, is_resuming=True)
    del wanted["target"]["a"]["adapter"]["lora_b"]
    more = saved_and_wanted()[1]
    with pytest.raises(
        errors.UserError, match="lacks 1 of 4 leaves, the first is a/adapter/lora_b"
    ):
        restored(wanted, more)
    saved["target"]["b"]["kernel"] = np.zeros(5)
    with pytest.raises(errors.UserError, match=r"b/kernel is \(5,\) in the checkpoint, \(4,\)"):
        restored(saved, more)
    del saved["target"]["b"]
    with pytest.raises(errors.UserError, match="lacks 1 of 2 leaves, the first is b/kernel"):
        restored(saved, more)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["t5", "scalable_t5"])
def test_adapters_go_to_the_built_in_trainer_and_back(guest, t5x, network, tmp_path):
    method = MHR()
    model = t5x.adapted.model(guest.base_model(network), method)
    params = guest.moved(guest.variables(model)["params"], method)
    state = {"target": params, "state": {"step": np.int32(12), "param_states": {}}}
    saver = t5x.saving.Adapters(method, str(tmp_path), str(tmp_path / "none"))
    assert saver(state, {}) == (state, {})
    path = tmp_path / "adapters" / "step_12.safetensors"

    ours = guest.built_in(method, scan_layers=network == "scalable_t5")
    base = guest.built_in(methods.frozen(), scan_layers=network == "scalable_t5")
    weights = tmp_path / "base.safetensors"
    frozen, trainable = method.split(params)
    safetensors_files.save_tree(frozen, weights)
    shapes = {name: leaf.shape for name, leaf in guest.BATCH.items()}
    start = start_lib.Start(ours, base, method, shapes)
    loaded, step = restore.params(start, f"file:{weights}", path)
    assert step == 12
    want = jax.jit(model.score_batch)(params, guest.BATCH)
    np.testing.assert_allclose(jax.jit(ours.score)(loaded, guest.BATCH), want, rtol=1e-5)

    again = tmp_path / "again.safetensors"
    saved_run.save(saved_run.load(path), again)
    back = t5x.adapted.model(guest.base_model(network), method, adapters=str(again))
    fresh = guest.variables(back)["params"]
    whole = patching.merge(frozen, method.split(fresh)[1])
    np.testing.assert_allclose(jax.jit(back.score_batch)(whole, guest.BATCH), want, rtol=1e-6)
    other = "scalable_t5" if network == "t5" else "t5"
    stray = t5x.adapted.model(guest.base_model(other), method, adapters=str(again))
    with pytest.raises(errors.UserError, match="do not fit the model.*Does only one of them"):
        guest.variables(stray)
    with pytest.raises(errors.UserError, match="There is no file of adapters .*none"):
        t5x.adapted.model(guest.base_model(network), method, adapters=str(tmp_path / "none"))
    with pytest.raises(errors.UserError, match="another method"):
        t5x.adapted.model(guest.base_model(network), methods.mov(), adapters=str(again))


def test_other_padding_than_t5xs_is_refused(guest, t5x):
    model = guest.base_model("t5")
    model.module = types.SimpleNamespace(config=types.SimpleNamespace(pad_id=1, start_id=0))
    with pytest.raises(errors.UserError, match="T5X pads with the id 0 .* has padding 1, end 1"):
        t5x.adapted.model(model, methods.lora())

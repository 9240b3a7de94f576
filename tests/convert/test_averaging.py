"""Averages of files are averages of their leaves."""

import numpy as np
import pytest

from moe_peft import errors, methods
from moe_peft.convert import averaging


def member(toy, value, method=None, **description):
    tree = {"encoder": {"adapter": {"vectors": np.full(3, value, np.float32)}}}
    return toy.saved(method or methods.ia3(), tree, **description)


def mean_of(saved):
    return saved.trainable["encoder"]["adapter"]["vectors"]


def test_mean_and_weighted_mean(toy):
    members = {"a": member(toy, 1.0), "b": member(toy, 2.0), "c": member(toy, 6.0)}
    found = averaging.average(members)
    np.testing.assert_allclose(mean_of(found), 3.0, rtol=1e-6)
    assert mean_of(found).dtype == np.float32
    weighted = averaging.average(members, [0.5, 0.25, 0.25])
    np.testing.assert_allclose(mean_of(weighted), 2.5)
    assert weighted.description["average"][1] == {"from": "b", "step": 7, "weight": 0.25}
    assert weighted.description["method"] == members["a"].description["method"]


def test_what_does_not_go_together_is_one_line(toy):
    one = member(toy, 1.0)
    other_backbone = member(toy, 1.0, backbone={"fingerprint": "another"})
    wide = member(toy, 1.0)
    wide.trainable["encoder"]["adapter"]["vectors"] = np.ones(4, np.float32)
    cases = {
        "at least two adapters, got 1": ({"a": one}, None),
        "There are 1 weights for 2 adapters": ({"a": one, "b": one}, [1.0]),
        "add up to 0.9; expected 1": ({"a": one, "b": one}, [0.5, 0.4]),
        "method.name is 'ia3' in a and 'lora' in b": (
            {"a": one, "b": member(toy, 1.0, methods.lora())},
            None,
        ),
        "backbone.fingerprint is 'of the toy' in a and 'another' in b": (
            {"a": one, "b": other_backbone},
            None,
        ),
        r"a and b cannot be averaged: encoder/adapter/vectors is \(3,\) in a and \(4,\) in b": (
            {"a": one, "b": wide},
            None,
        ),
    }
    for words, (members, weights) in cases.items():
        with pytest.raises(errors.UserError, match=words):
            averaging.average(members, weights)

"""The names of feed-forward blocks in config.json."""

import pytest

from moe_peft import errors
from moe_peft.weights import feed_forward

BLOCKS = {
    "relu": ("relu",),
    "gelu": ("gelu_exact",),
    "gelu_new": ("gelu",),
    "silu": ("silu",),
    "gated-gelu": ("gelu", "linear"),
    "gated-relu": ("relu", "linear"),
    "gated-silu": ("silu", "linear"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_names(name):
    settings = {"feed_forward_proj": name}
    assert feed_forward.activations(settings, "here") == BLOCKS[name]
    assert feed_forward.said(BLOCKS[name], {}) == settings
    assert feed_forward.said(BLOCKS[name], settings | {"d_model": 3}) == settings


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ("relu",)),
        ({"model_type": "mt5"}, ("gelu", "linear")),
        ({"model_type": "umt5"}, ("gelu", "linear")),
        ({"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu"}, ("gelu_exact", "linear")),
        ({"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new"}, ("gelu", "linear")),
        ({"feed_forward_proj": "gated-silu", "is_gated_act": False}, ("silu",)),
    ],
)
def test_what_is_stored_next_to_the_name_counts(settings, expected):
    assert feed_forward.activations(settings, "here") == expected
    said = feed_forward.said(expected, settings)
    assert feed_forward.activations(settings | said, "here") == expected
    if "dense_act_fn" in settings:
        assert said == settings


def test_another_block_than_before_is_said_everywhere():
    old = {"feed_forward_proj": "relu", "dense_act_fn": "relu", "is_gated_act": False}
    new = {"feed_forward_proj": "gated-silu", "dense_act_fn": "silu", "is_gated_act": True}
    assert feed_forward.said(("silu", "linear"), old) == new


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"feed_forward_proj": "gated-silo"}, "here: feed_forward_proj is 'gated-silo'.*silu"),
        ({"feed_forward_proj": "gated-quick_gelu"}, "feed_forward_proj is 'gated-quick_gelu'"),
        ({"dense_act_fn": "mish"}, "here: dense_act_fn is 'mish'; expected one of relu, gelu"),
    ],
)
def test_functions_that_the_network_does_not_have(settings, words):
    with pytest.raises(errors.UserError, match=words):
        feed_forward.activations(settings, "here")


def test_blocks_that_transformers_does_not_have():
    with pytest.raises(errors.UserError, match=r"no feed-forward block of \('silu', 'relu'\)"):
        feed_forward.said(("silu", "relu"), {})

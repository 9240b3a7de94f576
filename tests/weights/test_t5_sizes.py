"""Networks told from shapes, and their names."""

import dataclasses

import pytest

from moe_peft import errors
from moe_peft.weights import t5_sizes


@pytest.mark.parametrize(
    "name", ["t5_1_0_small", "t5_1_1_xxl", "mt5_base", "byt5_large", "tiny", "cldr_tiny"]
)
@pytest.mark.parametrize("scan_layers", [False, True])
def test_released_sizes(name, scan_layers):
    config = dataclasses.replace(t5_sizes.config_named(name), scan_layers=scan_layers)
    found = t5_sizes.recognise(t5_sizes.shapes_of(config), "here")
    assert found == config
    assert t5_sizes.name_of(found) == name
    assert t5_sizes.describe(found).startswith(f"{name}: {config.num_encoder_layers} + ")


def test_another_size_has_no_name():
    config = dataclasses.replace(t5_sizes.config_named("t5_1_1_small"), vocab_size=32100)
    assert t5_sizes.name_of(config) is None
    assert t5_sizes.describe(config).startswith("no size with a name: 8 + 8 layers, width 512")
    assert t5_sizes.differences(config, t5_sizes.config_named("t5_1_1_small")) == ["vocab_size"]


def test_unknown_names():
    with pytest.raises(errors.UserError, match="Did you mean 'mt5_small'"):
        t5_sizes.config_named("mt5_smal")
    with pytest.raises(errors.UserError, match="here is not a T5 .*no token_embedder/embedding"):
        t5_sizes.recognise({"wte/embedding": (3, 4)}, "here")

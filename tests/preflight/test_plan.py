"""The plan's counts are those of the papers' released formulas, found without weights."""

import io
import json

import gin
import numpy as np
import pytest
import rich.console

from moe_peft import errors, methods, patching
from moe_peft.adapters import IA3
from moe_peft.cli import main
from moe_peft.models import t5
from moe_peft.preflight import plan
from moe_peft.training import start
from moe_peft.weights import hugging_face
from moe_peft.weights import t5_sizes as sizes


@pytest.fixture(autouse=True)
def _clean_gin():
    yield
    gin.clear_config()


def planned(*files, bindings=()):
    return main.configure("plan", files, bindings)()


def tiny(num_layers=1, **kwargs):
    sizes = {"vocab_size": 16, "emb_dim": 8, "num_heads": 2, "head_dim": 4, "mlp_dim": 12}
    layers = dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), num_layers)
    return t5.Transformer(t5.T5Config(**sizes, **layers, **kwargs))


# Counts that follow from the released code; the per cents as printed, truncated.
PUBLISHED = [
    ("t5_1_1_xl", "ia3", (), 540_672, "0.018"),
    ("t5_1_1_large", "mov", (), 4_270_080, "0.55"),
    ("t5_1_1_xl", "mov", (), 7_956_480, "0.26"),
    ("t5_1_1_xxl", "mov", ("mov.num_experts=60",), 94_924_800, "0.862"),
    ("t5_1_1_large", "molora", (), 43_130_880, "5.60"),
    ("t5_1_1_large", "lora_released", (), 3_833_856, "0.497"),
    ("t5_1_1_xl", "lora_poly", (), 2_211_840, "0.07"),
    ("t5_1_1_xl", "lora_big", (), 35_389_440, "1.17"),
    ("t5_1_1_xl", "full", (), 2_849_757_184, "94.9"),
    ("t5_1_1_xl", "frozen", (), 0, "0.0"),
]


@pytest.mark.parametrize(("size", "method", "bindings", "count", "percent"), PUBLISHED)
def test_counts_and_nominal_per_cent(size, method, bindings, count, percent):
    # One scanned layer stands for a stack and gives the same counts as 24 layers, faster.
    scanned = "T5Config.scan_layers=True"
    found = planned(f"models/{size}.gin", f"methods/{method}.gin", bindings=[*bindings, scanned])
    position_bias_copies = found.base - planned_base(size)
    trains_base = method == "full"
    assert found.trainable - trains_base * position_bias_copies == count
    if not trains_base:
        assert f"{found.nominal_percent:.6f}".startswith(percent)


def planned_base(size):
    return {
        "t5_1_1_large": 783_150_080,
        "t5_1_1_xl": 2_849_757_184,
        "t5_1_1_xxl": 11_135_332_352,
    }[size]


def test_parts_rules_and_leaves_add_up():
    found = plan.plan(model=tiny(), method=methods.mov(num_experts=5))
    assert found.trainable == found.adapters == sum(found.parts.values())
    assert found.adapters == sum(rule.num_parameters for rule in found.rules)
    assert found.adapters == sum(leaf.num_parameters for leaf in found.leaves)
    assert found.frozen == found.base
    assert [(rule.adapter, len(rule.layers)) for rule in found.rules] == [("MoV", 6), ("MoV", 2)]
    assert sum(leaf.count for leaf in found.leaves) == 2 * 8


def test_every_adapter_leaf_has_named_axes():
    found = plan.plan(model=tiny(), method=methods.molora(num_experts=3, rank=2))
    assert len(found.leaves) > 0
    for leaf in found.leaves:
        assert len(leaf.axes) == len(leaf.shape), leaf
        assert "expert" in leaf.axes


def test_scanned_and_unscanned_count_the_same():
    unscanned, scanned = (
        plan.plan(model=tiny(2, scan_layers=s), method=methods.mov()) for s in (False, True)
    )
    assert unscanned.adapters == scanned.adapters
    assert any("layers" in leaf.axes for leaf in scanned.leaves)


def test_relatives_of_t5_are_counted(tmp_path):
    """A bias of 2 heads and 64 buckets in each of 4 layers, instead of 32 in each of 2 stacks."""
    relative = tiny(2, relpos_in_every_layer=True, relpos_buckets=64)
    found, plain = (plan.plan(model=model, method=methods.mov()) for model in (relative, tiny(2)))
    assert found.base - plain.base == 4 * 2 * 64 - 2 * 2 * 32
    assert found.adapters == plain.adapters == found.trainable
    flat = {p: np.zeros(s, np.float32) for p, s in sizes.shapes_of(relative.config).items()}
    folder = hugging_face.write(tmp_path / "umt5", relative.config, flat)
    again = plan.plan(model=relative, method=methods.mov(), backbone=f"hf:{folder}")
    assert again.base == sum(values.size for values in flat.values())
    with pytest.raises(errors.UserError, match="relpos_in_every_layer True .model config: False"):
        plan.plan(model=tiny(2, relpos_buckets=64), method=methods.mov(), backbone=f"hf:{folder}")


def test_a_backbone_with_another_gate_is_refused(tmp_path):
    """Shapes are the same; config.json and the model's config are not."""
    gelu, silu = tiny(), tiny(mlp_activations=("silu", "linear"))
    flat = {p: np.zeros(s, np.float32) for p, s in sizes.shapes_of(gelu.config).items()}
    spec = f"hf:{hugging_face.write(tmp_path / 'm', gelu.config, flat)}"
    with pytest.raises(errors.UserError, match=r"mlp_activations \('gelu', 'linear'\)"):
        plan.plan(model=silu, method=methods.mov(), backbone=spec)
    lengths = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    begin = start.Start.of_network(silu, methods.mov(), dict.fromkeys(lengths, (1, 2)))
    with pytest.raises(errors.UserError, match=r"mlp_activations \('gelu', 'linear'\)"):
        begin.trees(spec, 0, "float32")


def test_ungated_feed_forward_is_adapted_too():
    assert plan.plan(model=tiny(mlp_activations=("relu",)), method=methods.ia3()).rules[-1].pattern


def test_rule_matching_nothing_lists_what_exists():
    method = methods.Method("odd", (patching.Rule(".*/keyy", IA3),))
    with pytest.raises(errors.UserError, match="'.*/keyy' matches no layer.*attention/key"):
        plan.plan(model=tiny(), method=method)


def test_json_has_every_number_the_table_has(capsys):
    found = plan.plan(model=tiny(), method=methods.mov(), nominal_size=1_000_000)
    plan.show(found, as_json=True)
    loaded = json.loads(capsys.readouterr().out)
    assert loaded["trainable"] == found.trainable
    assert loaded["leaves"][0]["axes"] == list(found.leaves[0].axes)

    text = io.StringIO()
    plan.show(found, console=rich.console.Console(file=text, width=200))
    for number in (found.base, found.trainable, found.parts["router"], found.nominal_size):
        assert f"{number:,}" in text.getvalue()
    assert ".*/(key|value)" in text.getvalue()
    assert "expert heads kv" in text.getvalue()


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (31_800_000, "31.8 MB"), (5e12, "5e+03 GB")]
)
def test_bytes_are_readable(count, text):
    assert plan._bytes(count) == text


def test_a_backbone_of_another_size_is_told(tmp_path, capsys):
    config = sizes.config_named("tiny")
    shapes = sizes.shapes_of(config)
    flat = {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
    hugging_face.write(tmp_path / "m", config, flat)
    files = ["--gin_file", "methods/ia3.gin", f"--gin.BACKBONE=hf:{tmp_path / 'm'}"]
    assert main.main(["plan", "--gin_file", "models/tiny.gin", "--json", *files]) == 0
    gin.clear_config()
    assert main.main(["plan", "--gin_file", "models/cldr_tiny.gin", *files]) == main.USER_ERROR
    printed = capsys.readouterr().err
    assert "vocab_size 384 (model config: 272)" in printed
    assert "Take models/tiny.gin." in printed
    assert printed.count("\n") == 1

"""The paths of T5, and two families at once. CONTRIBUTING.md has a whole second family."""

import dataclasses

import pytest

from moe_peft import errors, methods, patching
from moe_peft.models import family, t5, t5_family
from moe_peft.patching import paths

TOY = paths.Paths(
    {"body": None}, "blocks_", placements={"toy": ".*/up"}, scaled=(paths.Scaled(".*/up"),)
)


NESTED = ("net/decoder", None, False)  # in another network


@pytest.fixture
def toy(monkeypatch):
    """A second family, known for one test."""
    for name in ("FAMILIES", "PLACEMENTS"):
        monkeypatch.setattr(paths, name, dict(getattr(paths, name)))
    monkeypatch.setattr(family, "FAMILIES", dict(family.FAMILIES))
    recognise = lambda shapes: {}["body/up"]
    own = dataclasses.replace(
        t5_family.FAMILY, name="toy", title="toy", config=dict, paths=TOY, recognise=recognise
    )
    family.register(own)
    return own


@pytest.mark.parametrize(
    ("path", "block", "part", "stack", "reads_encoder"),
    [
        ("encoder/layers_3/mlp/wi", ("encoder", 3, "encoder/layers_3"), "encoder", None, True),
        ("net/decoder/layers_0/x", ("net/decoder", 0, "net/decoder/layers_0"), *NESTED),
        ("encoder/encoder/mlp/wi", None, "encoder", "encoder/encoder", True),
        ("decoder/decoder/encoder_decoder_attention/key", None, "decoder", "decoder/decoder", True),
        ("decoder/decoder_norm/scale", None, "decoder", None, False),
        ("token_embedder/embedding", None, None, None, False),
    ],
)
def test_paths_of_t5(path, block, part, stack, reads_encoder):
    assert paths.block(path) == block
    assert paths.part(path) == part
    assert paths.scanned_stack(path) == patching.trees.stack(path) == stack
    assert paths.reads_encoder(path) == reads_encoder


def test_both_families_are_asked(toy):
    assert paths.block("body/blocks_12/up") == ("body", 12, "body/blocks_12")
    assert paths.block("body/layers_12/up") is None
    assert paths.block("encoder/layers_1/mlp/wi").number == 1
    assert [rule.pattern for rule in methods.ia3("toy").rules] == [".*/up"]
    assert family.of({}) is toy
    assert family.of(t5.T5Config(8, 8, 1, 8, 8, 1, 1)).name == "t5"
    message = "here is not a T5 .*no token_embedder/embedding .*here is not a toy.* no body/up"
    with pytest.raises(errors.UserError, match=message):
        family.recognise({"wte": (3, 4)}, "here")
    with pytest.raises(errors.UserError, match="Unknown family 'toi'. Did you mean 'toy'"):
        methods.mov(family="toi")


def test_names_are_not_taken_twice(toy):
    family.register(toy)  # again is nothing
    with pytest.raises(ValueError, match="'other' takes the name 'toy' of another"):
        paths.register("other", TOY)
    with pytest.raises(ValueError, match="'toy' takes the name 'toy' of another"):
        paths.register("toy", paths.Paths({"trunk": None}, "layer_"))

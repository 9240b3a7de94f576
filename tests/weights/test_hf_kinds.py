"""What config.json of transformers leaves out, and what no network here computes."""

import json

import pytest
import safetensors.numpy

from moe_peft import errors
from moe_peft.models import t5
from moe_peft.weights import hf_kinds, hugging_face

TIED = t5.T5Config(24, 8, 2, 4, 12, 1, 1, mlp_activations=("relu",), logits_via_embedding=True)


def test_output_layer_of_its_own_that_scales(tmp_path, flat):
    folder = hugging_face.write(tmp_path / "t5", TIED, flat(TIED))
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["shared.weight"] + 1
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | {"scale_decoder_outputs": True}
    path.write_text(json.dumps(settings))
    with pytest.raises(
        errors.UserError, match="scale_decoder_outputs is true, and lm_head"
    ) as said:
        hugging_face.open_folder(folder)
    assert "\n" not in str(said.value)
    # As the message says:
    tensors["lm_head.weight"] *= TIED.emb_dim**-0.5
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    changes = {"scale_decoder_outputs": False, "tie_word_embeddings": False}
    path.write_text(json.dumps(settings | changes))
    found = hugging_face.open_folder(folder)
    assert not found.config.logits_via_embedding
    found.report().check()


@pytest.mark.parametrize("name", ["T5", "MT5", "UMT5"])
def test_class_tells_the_kind_where_nothing_else_does(name):
    architectures = {"architectures": [f"{name}ForConditionalGeneration"]}
    assert hf_kinds.with_kind(architectures)["model_type"] == name.lower()
    told = {"model_type": "bart", **architectures}
    assert hf_kinds.with_kind(told) == told
    assert "model_type" not in hf_kinds.with_kind({"architectures": ["LongT5Model"]})

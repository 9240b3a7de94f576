"""Logits of transformers' T5 with PEFT's adapters equal ours, after export and after import."""

import functools

import numpy as np
import pytest

from moe_peft import methods
from moe_peft.convert import adapter_folder
from moe_peft.convert.peft import adapters
from moe_peft.convert.peft import config as config_lib
from moe_peft.weights import hugging_face, records, saved_run

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def torch():
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    return pytest.importorskip("torch")


@functools.cache
def base(toy, layout):
    """A model of transformers and the folder with it."""
    import tempfile

    import torch
    import transformers

    config = toy.network(layout).config
    is_1_0 = config.logits_via_embedding
    torch.manual_seed(0)
    settings = transformers.T5Config(
        vocab_size=config.vocab_size,
        d_model=config.emb_dim,
        num_heads=config.num_heads,
        d_kv=config.head_dim,
        d_ff=config.mlp_dim,
        num_layers=config.num_encoder_layers,
        num_decoder_layers=config.num_decoder_layers,
        feed_forward_proj="relu" if is_1_0 else "gated-gelu",
        tie_word_embeddings=is_1_0,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(settings).eval()
    if not is_1_0:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0.0, 0.3).add_(1.0 if "layer_norm" in name else 0.0)
    folder = tempfile.mkdtemp() + "/base"
    model.save_pretrained(folder)
    return folder


def fresh(toy, layout):
    import transformers

    return transformers.T5ForConditionalGeneration.from_pretrained(base(toy, layout)).eval()


def their_logits(toy, model, kind):
    import torch

    batch = toy.batch()
    more = {"task_ids": torch.tensor(batch["task_ids"]).long()} if kind == "POLY" else {}
    with torch.no_grad():
        return model(
            input_ids=torch.tensor(batch["encoder_input_tokens"]).long(),
            decoder_input_ids=torch.tensor(batch["decoder_input_tokens"]).long(),
            **more,
        ).logits.numpy()


def our_logits(toy, saved, layout):
    config, params = hugging_face.read(base(toy, layout))
    method = records.method(saved.description["method"], "toy")
    return toy.logits(method, toy.network(layout), params, saved.trainable, toy.batch())


OURS = ("lora", "qv", "ia3", "poly", "mhr4", "mhr8")
CASES = [(name, "t5_1_1") for name in OURS] + [("ia3", "t5_1_0"), ("poly", "t5_1_0")]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_exported_adapters_give_our_logits_in_peft(torch, toy, name, layout, tmp_path):
    import peft as theirs

    saved = toy.trained(toy.METHODS[name](), layout)
    adapters.write(saved, tmp_path / "a", "toy")
    kind = config_lib.read(tmp_path / "a")["peft_type"]
    bare = their_logits(toy, fresh(toy, layout), "none")
    model = theirs.PeftModel.from_pretrained(fresh(toy, layout), tmp_path / "a").eval()
    want = their_logits(toy, model, kind)
    assert np.abs(want - bare).max() > 0.1
    np.testing.assert_allclose(our_logits(toy, saved, layout), want, **TOLERANCE)


@pytest.mark.parametrize("name", ["lora", "ia3", "poly", "mhr8"])
def test_peft_opens_an_adapter_folder(torch, toy, name, tmp_path):
    import peft as theirs

    saved = toy.trained(toy.METHODS[name](), "t5_1_1")
    folder = adapter_folder.write(saved, tmp_path / "a")
    kind = config_lib.read(folder)["peft_type"]
    model = theirs.PeftModel.from_pretrained(fresh(toy, "t5_1_1"), folder).eval()
    want = their_logits(toy, model, kind)
    assert np.abs(want - their_logits(toy, fresh(toy, "t5_1_1"), "none")).max() > 0.1
    gap = np.abs(our_logits(toy, saved_run.load(folder), "t5_1_1") - want).max()
    assert gap < 1e-5 * np.abs(want).max()


def test_peft_refuses_the_folder_of_another_method(torch, toy, tmp_path):
    import peft as theirs

    folder = adapter_folder.write(toy.trained(methods.mov(2)), tmp_path / "a")
    with pytest.raises(KeyError, match="peft_type"):
        theirs.PeftModel.from_pretrained(fresh(toy, "t5_1_1"), folder)


def configs():
    import peft as theirs

    lora = functools.partial(theirs.LoraConfig, r=4, lora_alpha=8)
    poly = functools.partial(
        theirs.PolyConfig, task_type="SEQ_2_SEQ_LM", r=2, n_tasks=3, n_skills=2
    )
    everything = ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]
    return {
        "lora": ("t5_1_1", lora(target_modules=["q", "v"])),
        "lora_all": ("t5_1_1", lora(target_modules=everything, lora_dropout=0.1)),
        "rslora": ("t5_1_1", lora(target_modules=["q", "v"], use_rslora=True)),
        "some_layers": ("t5_1_1", lora(target_modules=["q"], layers_to_transform=[0])),
        "regex": ("t5_1_0", lora(target_modules=r".*decoder.*EncDecAttention.*(q|v)$")),
        "ia3": (
            "t5_1_1",
            theirs.IA3Config(target_modules=["k", "v", "wi_1"], feedforward_modules=[]),
        ),
        "ia3_default": ("t5_1_0", theirs.IA3Config()),
        "ia3_wo": (
            "t5_1_1",
            theirs.IA3Config(target_modules=["k", "v", "wo"], feedforward_modules=["wo"]),
        ),
        "ia3_attention": (
            "t5_1_1",
            theirs.IA3Config(target_modules=["k", "v"], feedforward_modules=[]),
        ),
        **{
            f"poly_{p}": ("t5_1_1", poly(n_splits=p, target_modules=["q", "wo"])) for p in (1, 4, 8)
        },
    }


NAMES = ["lora", "lora_all", "rslora", "some_layers", "regex", "ia3", "ia3_default", "ia3_wo"]
NAMES += ["ia3_attention", "poly_1", "poly_4", "poly_8"]


@pytest.mark.parametrize("name", NAMES)
def test_imported_adapters_have_pefts_logits(torch, toy, name, tmp_path):
    import peft as theirs

    layout, config = configs()[name]
    model = theirs.get_peft_model(fresh(toy, layout), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.3 * torch.randn_like(weight))
    model.save_pretrained(tmp_path / "a")
    want = their_logits(toy, model, config.peft_type.value)
    assert np.abs(want - their_logits(toy, fresh(toy, layout), "none")).max() > 0.1
    where = adapters.Base(f"hf:{base(toy, layout)}", toy.network(layout).config, "of the toy")
    saved = adapters.read(tmp_path / "a", where)
    np.testing.assert_allclose(our_logits(toy, saved, layout), want, **TOLERANCE)
    gap = adapters.gap(saved, tmp_path / "a")
    assert gap.largest < 1e-5 * gap.scale

    adapters.write(saved, tmp_path / "b", "toy")
    again = theirs.PeftModel.from_pretrained(fresh(toy, layout), tmp_path / "b").eval()
    np.testing.assert_allclose(their_logits(toy, again, config.peft_type.value), want, **TOLERANCE)


@pytest.mark.parametrize("name", ["lora", "ia3", "poly_4"])
def test_what_peft_pickles_is_what_it_saves(torch, toy, name, tmp_path):
    import peft as theirs

    layout, config = configs()[name]
    model = theirs.get_peft_model(fresh(toy, layout), config).eval()
    for folder, is_safe in (("new", True), ("old", False)):
        model.save_pretrained(tmp_path / folder, safe_serialization=is_safe)
    assert (tmp_path / "old" / "adapter_model.bin").exists()
    where = adapters.Base(f"hf:{base(toy, layout)}", toy.network(layout).config, "of the toy")
    new, old = (adapters.read(tmp_path / folder, where) for folder in ("new", "old"))
    assert toy.same(new.trainable, old.trainable)
    assert new.description == old.description

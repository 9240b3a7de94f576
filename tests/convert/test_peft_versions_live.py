"""`moe_peft.load` of what PEFT itself saves: its logits to 1e-5, and its greedy answers."""

import functools

import numpy as np
import pytest

import moe_peft
from moe_peft.data import vocabularies
from moe_peft.weights import merging

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
TEXTS = ["What is a mixture?", "no", "Translate: ein Hund"]


@pytest.fixture(scope="module")
def torch():
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def base(torch, tmp_path_factory):
    """The folder of a tiny T5 1.1 over bytes."""
    import transformers

    torch.manual_seed(0)
    settings = transformers.T5Config(
        vocab_size=384,
        d_model=16,
        num_heads=2,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_decoder_layers=1,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(settings).eval()
    model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0.0, 0.3).add_(1.0 if "layer_norm" in name else 0.0)
        model.lm_head.weight[131:] = 0  # what is no ASCII is never the answer, nor is an end
        model.lm_head.weight[:3] = 0
    folder = tmp_path_factory.mktemp("live") / "base"
    model.save_pretrained(folder)
    return folder


def adapted(torch, base, config):
    """PEFT's model with an adapter that is far from fresh."""
    import peft
    import transformers

    fresh = transformers.T5ForConditionalGeneration.from_pretrained(base).eval()
    model = peft.get_peft_model(fresh, config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.add_((0.02 if "lm_head" in name else 0.2) * torch.randn_like(weight))
    return model


def check_same(torch, model, folder, base):
    """Compares logits on a random batch, and greedy answers to three texts."""
    ours = moe_peft.load(folder, backbone=f"hf:{base}", vocabulary="bytes")
    batch = merging.random_batch(384, seed=3)
    inputs, outputs = (torch.tensor(batch[name]).long() for name in merging.TOKENS[:2])
    with torch.no_grad():
        want = model(input_ids=inputs, decoder_input_ids=outputs).logits.numpy()
        with model.disable_adapter():
            bare = model(input_ids=inputs, decoder_input_ids=outputs).logits.numpy()
    found = np.asarray(ours._start.model.logits(ours.params, batch))
    assert np.abs(bare - want).max() > 0.1
    assert np.abs(found - want).max() < 1e-5 * max(1.0, np.abs(want).max())
    vocabulary, answers = vocabularies.get("bytes"), []
    for text in TEXTS:
        ids = torch.tensor([[*vocabulary.encode(text), 1]])
        made = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, num_beams=1)
        made = made[0, 1:].tolist()
        answers.append(vocabulary.decode(made[: made.index(1)] if 1 in made else made))
    assert ours.generate(TEXTS, max_tokens=6) == answers
    assert all(answers)


def save_torch(torch, model, folder, keep=lambda key: "lora_" in key, rename=lambda key: key):
    """As people save by themselves: the state dict, with the adapter's name in its keys."""
    found = {rename(key): one for key, one in model.state_dict().items() if keep(key)}
    (folder / "adapter_model.safetensors").unlink()
    torch.save(found, folder / "adapter_model.bin")


def configs():
    import peft

    lora = functools.partial(peft.LoraConfig, task_type="SEQ_2_SEQ_LM", r=4, lora_alpha=8)
    qv = functools.partial(lora, target_modules=["q", "v"])
    uneven = {"rank_pattern": {"q": 2, r"block\.0\.layer\.0\.SelfAttention\.v": 6}}
    uneven |= {"alpha_pattern": {"SelfAttention.v": 3, "wo": 16}}
    return {
        "by default": lora(),
        "no kind of task": peft.LoraConfig(r=4, target_modules=["q", "v"]),
        "all-linear": lora(target_modules="all-linear"),
        "a pattern": lora(target_modules=r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$"),
        "feed-forward": lora(target_modules=["wi_0", "wi_1", "wo"]),
        "names with dots": lora(target_modules=["SelfAttention.q", "EncDecAttention.o"]),
        "without some": qv(exclude_modules=["EncDecAttention.q"]),
        "some blocks": qv(layers_to_transform=[1], layers_pattern="block"),
        "uneven": lora(target_modules="all-linear", **uneven),
        "uneven, stabilised": lora(target_modules=["q", "v", "wo"], use_rslora=True, **uneven),
        "fan_in_fan_out": qv(fan_in_fan_out=True),
        "biases": qv(bias="all"),
        "orthogonal": qv(init_lora_weights="orthogonal"),
        "a trained head": qv(modules_to_save=["lm_head"]),
        "ia3 of inputs": peft.IA3Config(
            target_modules=["k", "v", "wo"], feedforward_modules=["wo"], fan_in_fan_out=True
        ),
    }


NAMES = ["by default", "no kind of task", "all-linear", "a pattern", "feed-forward"]
NAMES += ["names with dots", "without some", "some blocks", "uneven", "uneven, stabilised"]
NAMES += ["fan_in_fan_out", "biases", "orthogonal", "a trained head", "ia3 of inputs"]


@pytest.mark.parametrize("name", NAMES)
def test_what_peft_saves(torch, base, name, tmp_path):
    model = adapted(torch, base, configs()[name])
    model.save_pretrained(tmp_path / "a")
    check_same(torch, model, tmp_path / "a", base)


@pytest.mark.parametrize("name", ["uneven", "a trained head"])
def test_what_people_pickle(torch, base, name, tmp_path):
    model = adapted(torch, base, configs()[name])
    model.save_pretrained(tmp_path / "a")
    keep = lambda key: "lora_" in key or "modules_to_save" in key
    short = lambda key: key.removeprefix("base_model.model.")
    save_torch(torch, model, tmp_path / "a", keep, short)
    check_same(torch, model, tmp_path / "a", base)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(torch, base, dtype, tmp_path):
    import peft
    import safetensors.torch
    import transformers

    adapted(torch, base, configs()["by default"]).save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    found = safetensors.torch.load_file(path)
    safetensors.torch.save_file({k: v.to(getattr(torch, dtype)) for k, v in found.items()}, path)
    fresh = transformers.T5ForConditionalGeneration.from_pretrained(base).eval()
    model = peft.PeftModel.from_pretrained(fresh, tmp_path / "a").eval()
    check_same(torch, model, tmp_path / "a", base)


def test_the_base_is_found_by_its_name(torch, base, tmp_path):
    model = adapted(torch, base, configs()["by default"])
    model.save_pretrained(tmp_path / "a")
    ours = moe_peft.load(tmp_path / "a", vocabulary="bytes")
    assert ours.backbone == f"hf:{base}"


def test_files_of_t_few(torch, base, tmp_path):
    import peft

    names = ["k", "v", "wi_1"]
    config = peft.IA3Config(target_modules=names, feedforward_modules=[])
    model = adapted(torch, base, config)
    found = {
        key.removeprefix("base_model.model.").replace("ia3_l.default", "multi_lora_b"): one
        for key, one in model.state_dict().items()
        if "ia3_l" in key
    }
    torch.save(found, tmp_path / "t03b_ia3_finish.pt")
    check_same(torch, model, tmp_path / "t03b_ia3_finish.pt", base)

"""MADLAD-400's and Pile-T5's special ids against transformers, where torch is installed."""

import json

from etils import epath
import jax
import letters_t5
import numpy as np
import pytest

import moe_peft
from moe_peft import patching
from moe_peft.data import encoding, files, vocabularies
from moe_peft.models import decoding, encoder_decoder, special_ids, t5
from moe_peft.weights import hugging_face, t5_names

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

# float32 in two libraries that sum in different orders.
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
IDS = {
    "madlad": special_ids.SpecialIds(1, 2, 0),
    "pile": special_ids.SpecialIds(0, 2, 0),
    "t5": special_ids.T5,
}
LENGTH = 10


@pytest.fixture(params=IDS)
def theirs(request, tmp_path):
    """A model of transformers with random weights, and the folder that it was saved to."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    ids = IDS[request.param]
    sizes = {"d_model": 24, "num_heads": 3, "d_kv": 8, "d_ff": 32, "num_layers": 2}
    named = {"pad_token_id": ids.pad, "eos_token_id": ids.eos, "decoder_start_token_id": ids.start}
    config = transformers.T5Config(
        vocab_size=48, feed_forward_proj="gated-gelu", tie_word_embeddings=False, **sizes, **named
    )
    torch.manual_seed(1)
    model = transformers.T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    folder = tmp_path / "theirs"
    model.save_pretrained(folder)
    (folder / "spiece.model").write_bytes(letters_t5.tokenizer(ids))
    told = {"tokenizer_class": "T5Tokenizer", "pad_token": "<s>", "extra_ids": 0}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return model, folder, ids


@pytest.fixture
def ours(theirs):
    config, params = hugging_face.read(theirs[1])
    return encoder_decoder.EncoderDecoder(t5.Transformer(config)), params


@pytest.fixture
def batch(theirs, tmp_path, monkeypatch):
    """Rows of a file, unknown pieces inside, as training reads them."""
    _, folder, ids = theirs
    monkeypatch.setenv("MOE_PEFT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in letters_t5.rows(6)))
    own = files.Files(str(path), str(folder), eval_fraction=0.0)
    (task,) = own.tasks
    source = task.rows("train")
    found = encoding.encode([(source, row) for row in range(6)], (24, 8), ids=ids)
    unknown = vocabularies.get(str(folder)).unk_id
    assert (found["encoder_input_tokens"] == unknown).any(axis=1).sum() > 3
    return found


def their_output(model, batch, ids):
    import torch

    inputs, targets = (
        torch.tensor(batch[name]).long()
        for name in ("encoder_input_tokens", "decoder_target_tokens")
    )
    seen = {"input_ids": inputs, "attention_mask": (inputs != ids.pad).long()}
    labels = targets.masked_fill(targets == ids.pad, -100)
    return seen, model(**seen, labels=labels)


def test_logits_loss_and_gradients(theirs, ours, batch):
    (model, _, ids), (network, params) = theirs, ours
    _, expected = their_output(model, batch, ids)
    is_real = batch["decoder_loss_weights"] > 0
    logits = jax.jit(network.logits)(params, batch)
    np.testing.assert_allclose(
        logits[is_real], expected.logits.detach().numpy()[is_real], **TOLERANCE
    )
    loss = jax.jit(jax.value_and_grad(lambda params: network.loss(params, batch)[0]))
    found, gradients = loss(params)
    np.testing.assert_allclose(found, expected.loss.detach().numpy(), **TOLERANCE)
    expected.loss.backward()
    gradients = patching.flatten(gradients)
    tied = "decoder/logits_dense/kernel"  # transformers 5 ties a fresh model always
    gradients["token_embedder/embedding"] += gradients.pop(tied).T
    checked = set()
    for name, parameter in model.named_parameters():
        path = t5_names.path_of(name)
        own = parameter.grad.numpy()
        own = own.T if t5_names.is_transposed(path) else own
        assert np.abs(gradients[path] - own).max() / np.abs(own).max() < 1e-4, name
        checked.add(path)
    assert checked == gradients.keys()


def test_greedy_answers(theirs, ours, batch):
    (model, folder, ids), (network, params) = theirs, ours
    seen, _ = their_output(model, batch, ids)
    made = model.generate(**seen, max_new_tokens=LENGTH, do_sample=False)[:, 1:].numpy()
    expected = np.full((len(made), LENGTH), ids.pad)
    expected[:, : made.shape[1]] = made
    predict = jax.jit(lambda p, b: network.predict(p, b, decoding.Greedy(LENGTH)))
    np.testing.assert_array_equal(predict(params, batch), expected)
    # The same, by the words of a user.
    words = vocabularies.get(str(folder))
    asked = [row["inputs"] for row in letters_t5.rows(6)]
    answers = moe_peft.load(f"hf:{folder}").generate(asked, max_tokens=LENGTH)
    without = [[i for i in row if i != ids.pad] for row in expected.tolist()]
    assert answers == [words.decode(row) for row in without]


def test_a_round_trip_keeps_every_bit_and_word(theirs, tmp_path):
    _, folder, _ = theirs
    found = hugging_face.open_folder(folder)
    again = hugging_face.write(
        tmp_path / "ours", found.config, found.leaves, settings=found.settings, copy_from=folder
    )
    for name in ("config.json", "generation_config.json", "spiece.model"):
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name
    one, other = (hugging_face.open_tensors(epath.Path(place)) for place in (folder, again))
    assert one.keys() == other.keys()
    for key, leaf in one.items():
        assert leaf.read().tobytes() == other[key].read().tobytes()

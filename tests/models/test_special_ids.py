"""Other ids of padding, end and start than T5's: the numbers are those of transformers."""

import functools
import pathlib

import jax
import numpy as np
import pytest

from moe_peft import errors, methods
from moe_peft.data import encoding, rows
from moe_peft.models import (
    batches,
    decoding,
    encoder_decoder,
    few_shot,
    scoring,
    special_ids,
    t5,
)

GOLDEN = pathlib.Path(__file__).parents[1] / "golden/special_ids.npz"
IDS = {
    "madlad": special_ids.SpecialIds(pad=1, eos=2, start=0),
    "pile": special_ids.SpecialIds(pad=0, eos=2, start=0),
}
# float32 in two libraries that sum in different orders.
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
SIZES = {"vocab_size": 32, "emb_dim": 12, "num_heads": 3, "head_dim": 4, "mlp_dim": 20}
SIZES |= {"num_encoder_layers": 2, "num_decoder_layers": 2}


def network(ids, **options):
    named = {f"{name}_id": value for name, value in vars(ids).items()}
    return t5.Transformer(t5.T5Config(**SIZES, **named, **options))


def subtree(arrays, prefix):
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


@pytest.fixture(params=IDS)
def name(request):
    return request.param


@pytest.fixture
def arrays(name):
    with np.load(GOLDEN) as found:
        return subtree(dict(found), f"{name}/")


@pytest.fixture
def model(name):
    return encoder_decoder.EncoderDecoder(network(IDS[name]))


@pytest.fixture
def params(arrays, from_transformers):
    return from_transformers(subtree(arrays, "weight/"))


def unpadded(array, pad):
    return [row[: np.flatnonzero(row != pad)[-1] + 1] for row in array]


@pytest.fixture
def batch(name, arrays):
    """As the data of a run makes it: ids without end marks become rows."""
    ids = IDS[name]
    texts, answers = (
        rows.Ragged.from_sequences([row[:-1] for row in unpadded(arrays[side], ids.pad)])
        for side in ("inputs", "targets")
    )
    source = rows.Rows(texts, answers)
    lengths = (arrays["inputs"].shape[1], arrays["targets"].shape[1])
    found = encoding.encode([(source, row) for row in range(len(texts))], lengths, ids=ids)
    np.testing.assert_array_equal(found["encoder_input_tokens"], arrays["inputs"])
    np.testing.assert_array_equal(found["decoder_target_tokens"], arrays["targets"])
    assert (found["decoder_input_tokens"][:, 0] == ids.start).all()
    return found


def test_logits_loss_and_gradients(name, arrays, model, params, batch, from_transformers):
    is_real = batch["decoder_loss_weights"] > 0
    assert is_real.sum() == sum(map(len, unpadded(arrays["targets"], IDS[name].pad)))
    without = {key: value for key, value in batch.items() if key != "decoder_loss_weights"}

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def compute(params):
        # Without weights, they are told from the targets.
        told = model.loss(params, without)[0]
        return model.loss(params, batch)[0], (told, model.logits(params, batch))

    (found, (told, logits)), gradients = compute(params)
    np.testing.assert_allclose(found, arrays["loss"], **TOLERANCE)
    np.testing.assert_allclose(told, arrays["loss"], **TOLERANCE)
    np.testing.assert_allclose(logits[is_real], arrays["logits"][is_real], **TOLERANCE)
    expected = from_transformers(subtree(arrays, "gradient/"))
    for (path, own), theirs in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(expected), strict=True
    ):
        difference = np.abs(own - theirs).max() / np.abs(theirs).max()
        assert difference < 1e-4, jax.tree_util.keystr(path)


def test_greedy_answers(name, arrays, model, params, batch):
    expected, ids = arrays["greedy"], IDS[name]
    ends = (expected == ids.eos).any(axis=1)
    assert ends.any(), "some of the stored rows should end early, and some should not"
    assert not ends.all()
    length = expected.shape[1]
    strategies = [
        decoding.Greedy(length),
        decoding.Sample(length, top_k=1),
        decoding.BeamSearch(length, num_beams=1, alpha=0.0, length_penalty="transformers"),
    ]
    if name == "pile":  # Its end mark is that of "madlad", its other ids are T5's.
        del strategies[1:]
    for strategy in strategies:
        predict = jax.jit(lambda p, b, how=strategy: model.predict(p, b, how, jax.random.key(0)))
        np.testing.assert_array_equal(predict(params, batch), expected)
    weights = expected != ids.pad
    asked = {**batch, "decoder_target_tokens": expected, "decoder_loss_weights": weights}
    asked["decoder_input_tokens"] = np.c_[np.full(len(expected), ids.start), expected[:, :-1]]
    assert model.exact_match(params, asked).all()
    wrong = {**asked, "decoder_target_tokens": np.where(expected == ids.eos, 3, expected)}
    np.testing.assert_array_equal(model.exact_match(params, wrong), ~ends)


def test_another_end_mark_than_the_networks(name, arrays, model, params, batch):
    length = arrays["greedy"].shape[1]
    end = int(arrays["greedy"][0, 0])
    found = np.asarray(model.predict(params, batch, decoding.Greedy(length, eos_id=end)))
    assert found[0, 0] == end
    assert (found[0, 1:] == IDS[name].pad).all()


def test_choices_score_as_alone(name, arrays, model, params, batch):
    ids = IDS[name]
    choices = [[9, 4, ids.eos], [6, 3, 17, ids.eos]]
    packed = scoring.pack_choices([choices] * len(arrays["inputs"]), 8, ids)
    asked = {"encoder_input_tokens": batch["encoder_input_tokens"], **packed}
    found = jax.jit(lambda p, b: model.score_choices(p, b, 2))(params, asked)
    np.testing.assert_allclose(found.log_likelihood, arrays["choices"], **TOLERANCE)
    np.testing.assert_array_equal(found.num_tokens, [[3, 4]] * len(arrays["inputs"]))


@pytest.mark.parametrize(
    "name",  # The other pads as T5 does: tests/models/test_few_shot.py.
    ["madlad", pytest.param("pile", marks=pytest.mark.slow)],
    indirect=True,
)
def test_few_shot_losses_do_not_see_padding(name, model, params, batch):
    ids, asked = IDS[name], {"encoder_input_tokens": batch["encoder_input_tokens"]}
    choices = [[[9, 4, ids.eos], [6, 3, 17, ids.eos]]] * 4
    model = few_shot.FewShotModel(model, num_choices=2)

    def losses(length, num_rows):
        packed = {**asked, **scoring.pack_choices(choices, length, ids)}
        packed[few_shot.GOLD] = np.array([0, 1, 1, 0])
        filled = batches.filled_up(packed, num_rows, ids.pad)
        return jax.jit(model.loss_sums)(params, filled)

    short, long = (jax.tree.leaves(losses(*shape)) for shape in ((7, 4), (12, 6)))
    np.testing.assert_allclose(short, long, rtol=1e-5)


def test_routers_see_what_the_network_sees(name, batch):
    ids = IDS[name]
    seen = batches.context(batch, methods.frozen(), ids.pad)
    np.testing.assert_array_equal(seen.encoder_mask, batch["encoder_input_tokens"] != ids.pad)
    np.testing.assert_array_equal(seen.decoder_mask, batch["decoder_loss_weights"] > 0)


@pytest.mark.parametrize("name", ["madlad"], indirect=True)
def test_packed_rows_are_the_same_examples(model, params, batch, arrays, name):
    ids = IDS[name]
    texts, answers = (
        rows.Ragged.from_sequences([row[:-1] for row in unpadded(arrays[side], ids.pad)])
        for side in ("inputs", "targets")
    )
    source = rows.Rows(texts, answers)
    examples = [(source, row) for row in range(4)]
    packed = encoding.encode(examples, (14, 10), [0, 1, 1, 0], 2, ids)
    assert packed["encoder_segment_ids"].max() == 2
    starts = np.diff(packed["decoder_segment_ids"], axis=1, prepend=0) > 0
    assert (packed["decoder_input_tokens"][starts] == ids.start).all()
    nothing = packed["decoder_segment_ids"] == 0
    assert (packed["decoder_input_tokens"][nothing] == ids.pad).all()
    one, other = (jax.jit(model.loss)(params, each) for each in (batch, packed))
    np.testing.assert_allclose(one[0], other[0], rtol=1e-5)
    np.testing.assert_allclose(one[1]["tokens"], other[1]["tokens"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pad_id": 32}, "T5Config.pad_id is 32; expected a number from 0 to 31"),
        ({"start_id": -1}, "T5Config.start_id is -1"),
        ({"pad_id": 1}, "pad_id and eos_id are both 1"),
    ],
)
def test_ids_that_no_network_has(options, words):
    with pytest.raises(errors.UserError, match=words):
        t5.T5Config(**SIZES, **options)


def test_a_network_that_does_not_tell_has_t5s():
    assert special_ids.of(object()) == special_ids.of(network(special_ids.T5)) == special_ids.T5
    patched = methods.lora().patch(network(IDS["madlad"]))
    assert special_ids.of(patched) == IDS["madlad"]

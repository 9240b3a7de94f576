"""Few-shot runs of a network whose padding is not 0, and whose id 0 is a piece."""

import jax
import numpy as np
import pytest

from moe_peft.adaptation import data, scores
from moe_peft.data import encoding, fewshot, rows
from moe_peft.models import encoder_decoder, few_shot, special_ids, t5

IDS = special_ids.SpecialIds(pad=1, eos=2, start=0)
CONFIG = t5.T5Config(
    vocab_size=16,
    emb_dim=8,
    num_heads=2,
    head_dim=4,
    mlp_dim=8,
    num_encoder_layers=1,
    num_decoder_layers=1,
    pad_id=1,
    eos_id=2,
)
TEXTS = ([5] + [0] * 20, [3, 0], [7, 8, 9])
ANSWERS = ([4, 0], [0], [6])


@pytest.fixture
def encoded():
    source = rows.Rows(*(rows.Ragged.from_sequences(each) for each in (TEXTS, ANSWERS)))
    features = encoding.encode([(source, row) for row in range(3)], (64, 32), ids=IDS)
    features = {name: features[name] for name in features if "weights" not in name}
    features[fewshot.CHOICES] = [([*answer, 2], [10, 2]) for answer in ANSWERS]
    features[few_shot.GOLD] = np.zeros(3, np.int32)
    return fewshot.Encoded(features, np.zeros(3, bool), ["a", "b", "c"], IDS)


@pytest.mark.parametrize("with_choices", [False, True])
def test_rows_of_padding_count_nowhere(encoded, with_choices):
    shape = data._shape([encoded], {"inputs": 64, "targets": 32}, with_choices)
    assert shape.inputs == 32  # the unknown pieces of the first text are counted
    (chunk,) = data.chunks([encoded], shape, 5)
    for name in ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens"):
        assert chunk[name].shape[:2] == (1, 5)
        assert (chunk[name][0, 3:] == IDS.pad).all()
    starts = chunk["decoder_input_tokens"][0, :3, 0]
    np.testing.assert_array_equal(starts, IDS.start)
    batch = {name: value[0] for name, value in chunk.items()}
    model = encoder_decoder.EncoderDecoder(t5.Transformer(CONFIG))
    rows = {name: value for name, value in batch.items() if name != few_shot.GOLD}
    params = jax.jit(lambda: model.init(jax.random.key(0), rows))()
    found = jax.jit(scores.score_rows(model, shape.num_choices, True))({}, params, batch)
    score, loss, _ = map(np.asarray, found)
    assert not score[3:].any()
    assert not loss[3:].any()
    assert (loss[:3] > 0).all()
    # The loss is that of the answer alone.
    alone = {name: value[:3] for name, value in batch.items()}
    if not with_choices:
        alone["decoder_loss_weights"] = np.isin(alone["decoder_target_tokens"], [1], invert=True)
        lengths = alone["decoder_loss_weights"].sum(axis=-1)
        np.testing.assert_array_equal(lengths, [3, 2, 2])
        expected = -jax.jit(model.score)(params, alone) / lengths
        np.testing.assert_allclose(loss[:3], expected, rtol=1e-5)

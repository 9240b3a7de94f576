"""Rank classification with a shared encoder against one row per choice: examples per second.

The same T5 1.1 small scores the same choices of the same inputs both ways, forward only.

    python benchmarks/rank_classification.py [--rounds 5] [--choices 4] [--output ranking.json]
"""

import argparse
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import measure
import numpy as np

from moe_peft.models import encoder_decoder, scoring, t5

EXAMPLES, INPUT_TOKENS, CHOICE_TOKENS = 8, 256, 8
SMALL = t5.T5Config(
    vocab_size=32128,
    emb_dim=512,
    num_heads=6,
    head_dim=64,
    mlp_dim=1024,
    num_encoder_layers=8,
    num_decoder_layers=8,
    dropout_rate=0.0,
)


def main() -> None:
    """Measures, prints, saves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--choices", type=int, default=4)
    parser.add_argument("--output", help="JSON file for the figures")
    options = parser.parse_args()

    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.integers(2, SMALL.vocab_size, shape).astype(np.int32)
    inputs = draw(EXAMPLES, INPUT_TOKENS)
    choices = draw(EXAMPLES, options.choices, CHOICE_TOKENS)
    shared = {"encoder_input_tokens": inputs, **scoring.pack_choices(choices)}
    alone = scoring.pack_choices(choices.reshape(-1, 1, CHOICE_TOKENS))
    del alone["decoder_segment_ids"]
    alone["encoder_input_tokens"] = np.repeat(inputs, options.choices, axis=0)

    model = encoder_decoder.EncoderDecoder(t5.Transformer(SMALL))
    shapes = jax.tree.map(np.shape, alone)
    params = jax.jit(lambda rng: model.init(rng, shapes))(jax.random.key(0))
    score = jax.jit(model.score)
    score_choices = jax.jit(model.score_choices, static_argnums=2)
    calls = {
        "one row per choice": lambda: score(params, alone),
        "shared encoder": lambda: score_choices(params, shared, options.choices).log_likelihood,
    }
    values = [np.asarray(call()).reshape(EXAMPLES, -1) for call in calls.values()]
    gap = float(np.max(np.abs(values[0] - values[1]) / np.abs(values[0])))
    num_same = int(np.sum(values[0].argmax(axis=1) == values[1].argmax(axis=1)))
    timings = measure.paired(calls, reference="shared encoder", rounds=options.rounds)
    low, median, high = timings["one row per choice"].ratio
    print(
        f"{measure.hardware()}\n"
        f"{EXAMPLES} inputs of {INPUT_TOKENS} tokens, {options.choices} choices of "
        f"{CHOICE_TOKENS}: sharing the encoder is {median:.2f}x ({low:.2f} to {high:.2f}) as fast "
        f"as one row per choice; {num_same} of {EXAMPLES} predictions are the same, largest "
        f"relative difference of scores {gap:.1e}"
    )
    measure.save(
        options.output,
        {
            "benchmark": "rank_classification",
            "choices": options.choices,
            "relative_gap": gap,
            "same_predictions": num_same,
            "seconds": {name: timing.seconds for name, timing in timings.items()},
            "one_by_one_over_shared": [low, median, high],
        },
    )


if __name__ == "__main__":
    main()

"""A small T5 as transformers saves it, and files of rows, for tests of a user's own job."""

import json
import pathlib

import jax
import jax.numpy as jnp

from moe_peft.models import t5
from moe_peft.weights import hugging_face

CONFIG = t5.T5Config(
    vocab_size=384,
    emb_dim=64,
    num_heads=4,
    head_dim=16,
    mlp_dim=128,
    num_encoder_layers=1,
    num_decoder_layers=1,
    dropout_rate=0.0,  # a step compiles in half the time
)
WORDS = {"good": ("great", "lovely", "superb"), "bad": ("poor", "dull", "awful")}


def t5_folder(place: pathlib.Path) -> pathlib.Path:
    """A random T5 over bytes: config.json, model.safetensors, tokenizer_config.json."""
    tokens = jnp.ones((1, 2), jnp.int32)
    init = lambda rng: t5.Transformer(CONFIG).init(
        rng, tokens, tokens, tokens, enable_dropout=False
    )["params"]
    hugging_face.write(place, CONFIG, jax.jit(init)(jax.random.key(0)))
    settings = {"tokenizer_class": "ByT5Tokenizer"}
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    return place


def rows(count: int, start: int = 0) -> list[dict[str, str]]:
    """Reviews and what they say, no two alike."""
    found = []
    for number in range(start, start + count):
        answer = ("good", "bad")[number % 2]
        word = WORDS[answer][number // 2 % 3]
        found.append({"inputs": f"{word} {number}", "targets": answer})
    return found


def write(path: pathlib.Path, found: list[dict]) -> pathlib.Path:
    """Writes rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path

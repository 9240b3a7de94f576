"""A random T5 over letters with any special ids: the same function, whatever their order."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from sentencepiece import sentencepiece_model_pb2 as proto

from moe_peft.models import special_ids, t5
from moe_peft.weights import hugging_face

SIZES = {"vocab_size": 48, "emb_dim": 24, "num_heads": 3, "head_dim": 8, "mlp_dim": 32}
SIZES |= {"num_encoder_layers": 1, "num_decoder_layers": 1}
LETTERS = "▁abcdefghijklmnopqrstuvwxyz0123456789"


def order(ids: special_ids.SpecialIds) -> list[int]:
    """The ids of padding, end and the unknown piece, all below 3."""
    return [ids.pad, ids.eos, ({0, 1, 2} - {ids.pad, ids.eos}).pop()]


def folder(place: pathlib.Path, ids: special_ids.SpecialIds, **settings) -> pathlib.Path:
    """Writes config.json with further settings, weights and a tokenizer; "%" is unknown to it."""
    named = {f"{name}_id": value for name, value in vars(ids).items()}
    config = t5.T5Config(**SIZES, **named, dropout_rate=0.0)  # compiles in half the time
    tokens = jnp.ones((1, 2), jnp.int32)
    init = lambda rng: t5.Transformer(config).init(
        rng, tokens, tokens, tokens, enable_dropout=False
    )["params"]
    params = jax.tree.map(np.array, jax.jit(init)(jax.random.key(0)))
    embedding = params["token_embedder"]["embedding"]
    logits = params["decoder"]["logits_dense"]["kernel"]
    embedding[order(ids)], logits[:, order(ids)] = embedding[:3].copy(), logits[:, :3].copy()
    hugging_face.write(place, config, params)
    path = place / "config.json"
    text = json.dumps(json.loads(path.read_text()) | settings, indent=2, sort_keys=True)
    path.write_text(text + "\n")
    (place / "spiece.model").write_bytes(tokenizer(ids))
    told = {"tokenizer_class": "T5Tokenizer", "pad_token": "<s>", "extra_ids": 0}
    (place / "tokenizer_config.json").write_text(json.dumps(told))
    return place


def tokenizer(ids: special_ids.SpecialIds) -> bytes:
    """A SentencePiece model, which knows no padding, as that of MADLAD-400."""
    made, kinds = proto.ModelProto(), proto.ModelProto.SentencePiece
    names = dict(zip(order(ids), ("<s>", "</s>", "<unk>"), strict=True))
    for name in (names[0], names[1], names[2]):
        made.pieces.add(piece=name, type=kinds.UNKNOWN if name == "<unk>" else kinds.CONTROL)
    for letter in LETTERS:
        made.pieces.add(piece=letter, score=-1.0)
    spec = made.trainer_spec
    spec.model_type, spec.vocab_size = proto.TrainerSpec.UNIGRAM, len(made.pieces)
    spec.pad_id, spec.eos_id, spec.unk_id, spec.bos_id = -1, *order(ids)[1:], -1
    return made.SerializeToString()


def rows(count: int) -> list[dict[str, str]]:
    """Questions and answers, with unknown pieces in both."""
    words = ("great %", "% dull", "so % so", "fine")
    return [
        {"inputs": f"{words[i % 4]} {i}", "targets": ("good", "b%d", "%")[i % 3]}
        for i in range(count)
    ]

"""Writes what transformers computes for relatives of T5 with tiny random weights, a file for each.

Needs torch and transformers:

    python tests/golden/make_relatives_golden.py [folder]

Each file holds config.json, the weights under their names in transformers, a padded batch, logits,
the gradient of the mean cross entropy by every weight, and greedy answers. Rows are so long that
distances reach buckets of several, in decoding too. Written with torch 2.13 and transformers 5.24,
float32; transformers 4.57 gives the same.
"""

import json
import pathlib
import sys

import make_t5_golden
import numpy as np
import torch
import transformers

_SIZES = {"vocab_size": 24, "d_model": 8, "num_heads": 2, "d_kv": 4, "d_ff": 12}
_SIZES |= {"num_layers": 2, "num_decoder_layers": 2, "dropout_rate": 0.0}
_SIZES |= {"decoder_start_token_id": 0, "tie_word_embeddings": False}
_UL2 = {"feed_forward_proj": "gated-silu", "d_kv": 3}
_ANKH = {"feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 64}
_DEEP = {"num_layers": 7, "num_decoder_layers": 1, "tie_word_embeddings": True}
# Name: kind, what its config.json has besides the sizes, and a seed with which
# answers say several words.
VARIANTS = {
    "ul2": ("T5", _UL2, 1),
    "ankh": ("T5", _ANKH | {"num_layers": 3}, 6),
    "umt5": ("UMT5", {"feed_forward_proj": "gated-gelu", "num_decoder_layers": 3}, 7),
    "deep_encoder": ("T5", _DEEP, 3),
}


def make_model(name: str) -> transformers.PreTrainedModel:
    """Returns a model whose weights, position biases included, all matter."""
    kind, options, seed = VARIANTS[name]
    settings = {**_SIZES, **options}
    config = getattr(transformers, f"{kind}Config")(**settings)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    if not settings["tie_word_embeddings"]:
        # transformers 5 ties a fresh model whatever the configuration says.
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight_name, weight in model.named_parameters():
            if "layer_norm" in weight_name:
                weight.uniform_(0.5, 1.5)
            else:
                is_wide = "relative" in weight_name or "shared" in weight_name
                weight.normal_(0.0, 1.0 if is_wide else 0.5)
    return model


def compute(model: transformers.PreTrainedModel) -> dict[str, np.ndarray]:
    """Returns config.json, weights, batch, logits, gradients and answers of one model."""
    random = np.random.default_rng(0)
    inputs, targets = random.integers(2, 24, (2, 26)), random.integers(2, 24, (2, 22))
    inputs[1, 9:], targets[1, 6:] = 0, 0
    decoder_inputs = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
    known = {
        "input_ids": torch.tensor(inputs),
        "attention_mask": torch.tensor(inputs > 0).long(),
    }
    logits = model(**known, decoder_input_ids=torch.tensor(decoder_inputs)).logits
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), torch.tensor(targets).reshape(-1), ignore_index=0
    )
    loss.backward()
    # A UMT5 with more layers in its decoder fails with a cache of transformers' own.
    how = {"max_new_tokens": 22, "do_sample": False, "num_beams": 1, "use_cache": False}
    answers = model.generate(**known, **how)
    greedy = np.zeros(targets.shape, np.int32)
    greedy[:, : answers.shape[1] - 1] = answers[:, 1:].numpy()
    settings = json.loads(model.config.to_json_string())
    arrays = {
        "config": np.array(json.dumps(settings, sort_keys=True)),
        "inputs": inputs.astype(np.int32),
        "decoder_inputs": decoder_inputs.astype(np.int32),
        "targets": targets.astype(np.int32),
        "logits": logits.detach().numpy(),
        "loss": loss.detach().numpy(),
        "greedy": greedy,
    }
    return arrays | make_t5_golden.weights_and_gradients(model)


def main() -> None:
    """Writes all files."""
    folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent)
    for name in VARIANTS:
        arrays = compute(make_model(name))
        np.savez_compressed(folder / f"{name}.npz", **arrays)
        print(name, arrays["loss"], arrays["greedy"].tolist())


if __name__ == "__main__":
    main()

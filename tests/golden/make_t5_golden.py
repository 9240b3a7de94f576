"""Writes t5_1_1.npz and t5_1_0.npz: what transformers' T5 computes with tiny random weights.

Needs torch and transformers:

    python tests/golden/make_t5_golden.py [folder]

Each file holds the weights under their names in transformers, a padded batch, logits, the gradient
of the mean cross entropy by every weight, and what `generate` returns. Written with torch 2.13 and
transformers 5.23, float32.
"""

import functools
import pathlib
import sys

import numpy as np
import torch
import transformers

# Name: feed-forward form and a seed with which some rows end early and others do not.
VARIANTS = {"t5_1_1": ("gated-gelu", 4), "t5_1_0": ("relu", 6)}
NUM_NEW_TOKENS = 12
NUM_BEAMS = 4

INPUTS = np.array(
    [
        [5, 9, 23, 14, 3, 8, 17, 1],
        [7, 2, 30, 1, 0, 0, 0, 0],
        [11, 12, 13, 14, 15, 1, 0, 0],
        [29, 4, 1, 0, 0, 0, 0, 0],
    ]
)
TARGETS = np.array(
    [[6, 10, 20, 31, 2, 1], [8, 8, 1, 0, 0, 0], [3, 27, 16, 5, 1, 0], [22, 1, 0, 0, 0, 0]]
)


def make_model(feed_forward: str, seed: int) -> transformers.T5ForConditionalGeneration:
    """Returns a T5 of 2 + 2 layers whose weights, position biases included, all matter."""
    is_tied = feed_forward == "relu"
    config = transformers.T5Config(
        vocab_size=32,
        d_model=12,
        num_heads=3,
        d_kv=4,
        d_ff=20,
        num_layers=2,
        num_decoder_layers=2,
        feed_forward_proj=feed_forward,
        tie_word_embeddings=is_tied,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    torch.manual_seed(seed)
    model = transformers.T5ForConditionalGeneration(config).eval()
    if not is_tied:
        # transformers 5 ties a fresh model whatever the configuration says.
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layer_norm" in name:
                weight.uniform_(0.5, 1.5)
            elif "relative" in name:
                weight.normal_(0.0, 1.0)
            elif "shared" in name:
                weight.normal_(0.0, 0.3 if is_tied else 1.0)
            else:
                weight.normal_(0.0, 0.45)
    assert (model.lm_head.weight is model.shared.weight) == is_tied
    return model


def compute(model: transformers.T5ForConditionalGeneration) -> dict[str, np.ndarray]:
    """Returns weights, batch, logits, gradients and generated ids of one model."""
    inputs, targets = torch.tensor(INPUTS), torch.tensor(TARGETS)
    decoder_inputs = torch.nn.functional.pad(targets[:, :-1], (1, 0))
    output = model(
        input_ids=inputs, attention_mask=(inputs > 0).long(), decoder_input_ids=decoder_inputs
    )
    loss = torch.nn.functional.cross_entropy(
        output.logits.reshape(-1, output.logits.shape[-1]), targets.reshape(-1), ignore_index=0
    )
    loss.backward()
    generate = functools.partial(
        model.generate,
        inputs,
        attention_mask=(inputs > 0).long(),
        max_new_tokens=NUM_NEW_TOKENS,
    )
    beams = generate(
        num_beams=NUM_BEAMS,
        num_return_sequences=1,
        length_penalty=1.0,
        early_stopping="never",
        return_dict_in_generate=True,
        output_scores=True,
    )
    arrays = {
        "inputs": INPUTS.astype(np.int32),
        "decoder_inputs": decoder_inputs.numpy().astype(np.int32),
        "targets": TARGETS.astype(np.int32),
        "logits": output.logits.detach().numpy(),
        "loss": loss.detach().numpy(),
        "greedy": pad(generate(do_sample=False, num_beams=1)),
        "beam": pad(beams.sequences),
        "beam_scores": beams.sequences_scores.numpy(),
    }
    # After its end a beam is filled with the padding id or the end id, depending on the version.
    is_after_end = np.cumsum(arrays["beam"] == 1, axis=1) - (arrays["beam"] == 1) > 0
    arrays["beam"][is_after_end] = 0
    return arrays | weights_and_gradients(model)


def weights_and_gradients(model) -> dict[str, np.ndarray]:
    """Of every parameter, after a backward pass."""
    found = {}
    for name, weight in model.named_parameters():
        found[f"weight/{name}"] = weight.detach().numpy()
        found[f"gradient/{name}"] = weight.grad.numpy()
    return found


def pad(generated: torch.Tensor) -> np.ndarray:
    """Returns ids without the start token, filled with zeros up to NUM_NEW_TOKENS."""
    ids = np.zeros((generated.shape[0], NUM_NEW_TOKENS), np.int32)
    ids[:, : generated.shape[1] - 1] = generated[:, 1:].numpy()
    return ids


def main() -> None:
    """Writes both files."""
    folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent)
    for name, (feed_forward, seed) in VARIANTS.items():
        arrays = compute(make_model(feed_forward, seed))
        np.savez_compressed(folder / f"{name}.npz", **arrays)
        print(name, arrays["loss"], arrays["greedy"].tolist())


if __name__ == "__main__":
    main()

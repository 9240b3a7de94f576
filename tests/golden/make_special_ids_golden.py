"""Writes special_ids.npz: what transformers' T5 computes where padding, end and start are not T5's.

Needs torch and transformers:

    python tests/golden/make_special_ids_golden.py [folder]

"madlad" has MADLAD-400's ids, whose id 0 is the unknown piece and stands inside of texts; "pile"
has Pile-T5's. For each there are weights under their names in transformers, a padded batch, logits,
loss and gradients with the decoder inputs that transformers itself makes of the labels, what
`generate` returns, and the log-likelihoods of two answers. Written with torch 2.13 and transformers
5.24, float32.
"""

import pathlib
import sys

import make_t5_golden
import numpy as np
import torch

# (padding, end, start), and a seed with which some answers end early and others do not.
VARIANTS = {"madlad": ((1, 2, 0), 9), "pile": ((0, 2, 0), 10)}
TEXTS = ([5, 9, 0, 14, 3, 8], [7, 0, 30], [11, 12, 0, 0, 15], [29, 4])
ANSWERS = ([6, 10, 20, 31], [8, 8], [3, 27, 16], [22])
CHOICES = ([9, 4], [6, 3, 17])


def rows(texts, ids: tuple[int, int, int]) -> np.ndarray:
    """Texts with end marks, padded; where padding would be inside of a text, another id is."""
    pad, eos, _ = ids
    texts = [[25 if i == pad else i for i in text] + [eos] for text in texts]
    length = max(map(len, texts))
    return np.array([text + [pad] * (length - len(text)) for text in texts])


def make_model(ids: tuple[int, int, int], seed: int):
    """Returns a T5 1.1 with random weights and these ids."""
    model = make_t5_golden.make_model("gated-gelu", seed)
    for config in (model.config, model.generation_config):
        config.pad_token_id, config.eos_token_id, config.decoder_start_token_id = ids
    return model


def compute(model, ids: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """Returns weights, batch, logits, loss, gradients, answers and scores of one model."""
    pad = ids[0]
    inputs, targets = torch.tensor(rows(TEXTS, ids)), torch.tensor(rows(ANSWERS, ids))
    seen = {"input_ids": inputs, "attention_mask": (inputs != pad).long()}
    output = model(**seen, labels=targets.masked_fill(targets == pad, -100))
    output.loss.backward()
    length = make_t5_golden.NUM_NEW_TOKENS
    with torch.no_grad():
        greedy = model.generate(**seen, max_new_tokens=length, do_sample=False)[:, 1:].numpy()
        log_probs = []
        for choice in rows(CHOICES, ids):
            labels = torch.tensor(choice).repeat(len(TEXTS), 1)
            labels = labels.masked_fill(labels == pad, -100)
            found = torch.log_softmax(model(**seen, labels=labels).logits, -1)
            own = torch.gather(found, -1, labels.clamp(min=0)[..., None])[..., 0]
            log_probs.append(own.masked_fill(labels == -100, 0.0).sum(-1).numpy())
    answers = np.full((len(TEXTS), length), pad)
    answers[:, : greedy.shape[1]] = greedy
    arrays = {
        "inputs": inputs.numpy().astype(np.int32),
        "targets": targets.numpy().astype(np.int32),
        "logits": output.logits.detach().numpy(),
        "loss": output.loss.detach().numpy(),
        "greedy": answers.astype(np.int32),
        "choices": np.stack(log_probs, -1),
    }
    return arrays | make_t5_golden.weights_and_gradients(model)


def main() -> None:
    """Writes the file."""
    folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent)
    found = {}
    for name, (ids, seed) in VARIANTS.items():
        arrays = compute(make_model(ids, seed), ids)
        found |= {f"{name}/{key}": value for key, value in arrays.items()}
        print(name, arrays["loss"], arrays["greedy"].tolist())
    np.savez_compressed(folder / "special_ids.npz", **found)


if __name__ == "__main__":
    main()

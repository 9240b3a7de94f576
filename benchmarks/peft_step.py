"""The same step in torch: transformers' T5 1.1 with PEFT's adapters."""

from collections.abc import Callable

import numpy as np

# Of Poly and MHR, in both frameworks.
NUM_TASKS = 8
NUM_SPLITS = 64


def available() -> str | None:
    """Returns why the comparison cannot run, or None."""
    try:
        import peft  # noqa: F401
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        return f"no comparison with transformers and PEFT: {error}"
    return None


def _config(name: str):
    import peft

    sites = ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]
    if name == "lora":
        return peft.LoraConfig(
            task_type="SEQ_2_SEQ_LM", r=4, lora_alpha=16, target_modules=sites, lora_dropout=0.0
        )
    if name == "ia3":
        return peft.IA3Config(
            task_type="SEQ_2_SEQ_LM",
            target_modules=["k", "v", "wi_1"],
            feedforward_modules=[],
        )
    if name in ("poly", "mhr"):
        return peft.PolyConfig(
            task_type="SEQ_2_SEQ_LM",
            poly_type="poly",
            r=1,
            n_tasks=NUM_TASKS,
            n_skills=8,
            n_splits=1 if name == "poly" else NUM_SPLITS,
            target_modules=sites,
        )
    raise ValueError(f"unknown PEFT method {name!r}")


def make_step(
    name: str, sizes: dict[str, int], batch: dict[str, np.ndarray]
) -> Callable[[], float]:
    """Returns a call that runs one AdamW step of a method of PEFT, or of "full", on `batch`.

    `sizes` has vocab_size, emb_dim, head_dim, mlp_dim, num_heads, num_layers; `batch` has
    encoder_input_tokens [b, t], decoder_target_tokens [b, t] and task_ids [b].
    """
    import peft
    import torch
    import transformers

    config = transformers.T5Config(
        vocab_size=sizes["vocab_size"],
        d_model=sizes["emb_dim"],
        d_kv=sizes["head_dim"],
        d_ff=sizes["mlp_dim"],
        num_layers=sizes["num_layers"],
        num_heads=sizes["num_heads"],
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        use_cache=False,
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config)
    if name != "full":
        model = peft.get_peft_model(model, _config(name))
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3)
    inputs = torch.tensor(batch["encoder_input_tokens"].astype(np.int64))
    labels = torch.tensor(batch["decoder_target_tokens"].astype(np.int64))

    tasks = {}
    if name in ("poly", "mhr"):
        tasks["task_ids"] = torch.tensor(batch["task_ids"].astype(np.int64))

    def step() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=inputs, labels=labels, **tasks).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step

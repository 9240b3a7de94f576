"""Parameters of one adapted layer, ours and PEFT's, and what PEFT computes with them."""

from collections.abc import Mapping

from jaxtyping import Float, Int
import numpy as np

from moe_peft.convert import adapter_trees
from moe_peft.routing import task_routers

Arrays = adapter_trees.Arrays

_LOGITS = f"router/{task_routers.LOGITS}"
SUFFIXES = {
    "LORA": ("lora_A.weight", "lora_B.weight"),
    "IA3": ("ia3_l",),
    "POLY": ("poly_lora_A", "poly_lora_B", "poly_router.module_logits"),
}


def to_peft(kind: str, own: Arrays, alpha: float, scales_inputs: bool) -> Arrays:
    """Returns {suffix: tensor} of one layer.

    Args:
      kind: "LORA", "IA3" or "POLY".
      own: our leaves by name.
      alpha: that B takes in.
      scales_inputs: of IA3.
    """
    if kind == "IA3":
        return {"ia3_l": own["vectors"].reshape((1, -1) if scales_inputs else (-1, 1))}
    a, b = own["lora_a"], own["lora_b"]
    if kind == "LORA":
        parts = a.reshape(-1, a.shape[-1]).T, b.reshape(len(b), -1).T
    else:
        parts = a, b * np.float32(alpha), own[_LOGITS].reshape(len(own[_LOGITS]), -1)
    return dict(zip(SUFFIXES[kind], parts, strict=True))


def from_peft(kind: str, tensors: Arrays, alpha: float) -> Arrays:
    """Returns our leaves of one layer, with flat features; the inverse of `to_peft`."""
    parts = [tensors[suffix].astype(np.float32) for suffix in SUFFIXES[kind]]
    if kind == "IA3":
        return {"vectors": parts[0]}
    if kind == "LORA":
        return {"lora_a": parts[0].T, "lora_b": parts[1].T}
    a, b, logits = parts
    return {"lora_a": a, "lora_b": b / np.float32(alpha), _LOGITS: logits}


def shapes(
    config: Mapping[str, int], layer: str, kernel: tuple[int, int]
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Returns the shapes that each tensor of a layer may have.

    Args:
      config: settings of the folder.
      layer: whose tensors they are.
      kernel: inputs and outputs of it.
    """
    kind, (inputs, outputs) = config["peft_type"], kernel
    if kind == "IA3":
        # What wi_1 returns may also be scaled as what wo reads.
        name = layer.rpartition("/")[2]
        fitting = {"wo": [(1, inputs)], "wi_1": [(outputs, 1), (1, outputs)]}
        return {"ia3_l": tuple(fitting.get(name, [(outputs, 1)]))}
    rank = config["r"]
    if kind == "LORA":
        found = (rank, inputs), (outputs, rank)
    else:
        splits, skills = config["n_splits"], config["n_skills"]
        found = (
            (splits, skills, inputs // splits, rank),
            (splits, skills, rank, outputs // splits),
            (config["n_tasks"], splits * skills),
        )
    return {suffix: (shape,) for suffix, shape in zip(SUFFIXES[kind], found, strict=True)}


def forward(
    config: Mapping[str, float],
    tensors: Arrays,
    x: Float[np.ndarray, "b t i"],
    y: Float[np.ndarray, "b t o"],
    task_ids: Int[np.ndarray, "b"],
) -> Float[np.ndarray, "b t o"]:
    """Returns what PEFT makes of a layer's inputs x and outputs y, in float64.

    (IA)3 scales y; give x for y where it scales inputs. Written from the methods' formulas, not
    with our adapters: conversions are checked against it.
    """
    kind = config["peft_type"]
    parts = [tensors[suffix].astype(np.float64) for suffix in SUFFIXES[kind]]
    if kind == "IA3":
        return y * parts[0].reshape(-1)
    rank = config["r"]
    if kind == "LORA":
        scale = config["lora_alpha"] / (np.sqrt(rank) if config.get("use_rslora") else rank)
        return y + scale * (x @ parts[0].T @ parts[1].T)
    a, b, logits = parts
    splits, skills = a.shape[:2]
    probs = 1 / (1 + np.exp(-logits[task_ids].reshape(-1, splits, skills)))
    weights = probs / (probs.sum(-1, keepdims=True) + 1e-12)
    a = np.einsum("bps,psjr->bpjr", weights, a).reshape(len(x), -1, rank)
    b = np.einsum("bps,psrk->brpk", weights, b).reshape(len(x), rank, -1)
    return y + np.einsum("bti,bir,bro->bto", x, a, b) / rank

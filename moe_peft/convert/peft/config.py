"""`adapter_config.json` of PEFT: written from a method, read with everything unsupported refused.

Only what changes numbers matters. Where adapters sit (`target_modules`, `exclude_modules`,
`layers_to_transform`) is not read: the tensors' names say it.
"""

from collections.abc import Mapping
import math
import pathlib
from typing import Any

from moe_peft import errors
from moe_peft.weights import safetensors_files

NAME = "adapter_config.json"

# What every file says besides the settings of its method.
WHOLE = {"modules_to_save": None, "task_type": "SEQ_2_SEQ_LM", "inference_mode": True}

_READ = {
    "LORA": ("r", "lora_alpha", "lora_dropout", "use_rslora"),
    "IA3": ("feedforward_modules",),
    "POLY": ("r", "n_tasks", "n_skills", "n_splits"),
}
# What a loaded adapter does not depend on.
_FREE = {
    *("peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"),
    *("task_type", "inference_mode", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "init_ia3_weights", "init_weights", "init_lora_weights"),
    *("qalora_group_size", "megatron_core", "runtime_config"),
}
_NEUTRAL = {"bias": "none", "poly_type": "poly"}
# Others change the frozen weights, to which the adapter is then relative.
_INITS = (None, True, False, "gaussian", "orthogonal")
_WHY_NOT = {
    "use_dora": "DoRA rescales columns by a learned magnitude",
    "rank_pattern": "ranks that differ from layer to layer",
    "alpha_pattern": "scales that differ from layer to layer",
    "modules_to_save": "whole modules trained besides the adapter",
    "bias": "trained biases, which a T5 does not have",
    "lora_bias": "trained biases",
}


def read(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the settings of an adapter folder.

    Raises UserError if it is not a LoRA, (IA)3 or Poly for a T5, or an option cannot be expressed.
    """
    path = folder / NAME
    config = safetensors_files.read_json(path)
    kind, task = config.get("peft_type"), config.get("task_type")
    errors.check_one_of(f"{path}: peft_type", kind, _READ)
    if task not in (None, "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"):
        expected = "an encoder-decoder's, 'SEQ_2_SEQ_LM'"
        raise errors.UserError(f"{path}: task_type is {task!r}; expected {expected}.")
    base = (config.get("auto_mapping") or {}).get("base_model_class")
    if base and not base.startswith(("T5", "MT5")):
        model = f"the base model is a {base}; expected a T5 or mT5"
        raise errors.UserError(f"{path}: auto_mapping says {model}.")
    for key in _READ[kind]:
        if key not in config and key != "use_rslora":
            raise errors.UserError(f"{path} has no {key!r}.")
    for key, value in config.items():
        neutral = _NEUTRAL.get(key)
        if key in _READ[kind] or key in _FREE or value == neutral or not value:
            continue
        why = f" ({_WHY_NOT[key]})" if key in _WHY_NOT else ""
        raise errors.UserError(
            f"{path}: {key} is {value!r}{why}, which no adapter here can express; expected "
            f"{neutral!r} or nothing."
        )
    if (init := config.get("init_lora_weights")) not in _INITS:
        raise errors.UserError(
            f"{path}: init_lora_weights is {init!r}, which changes the frozen weights; convert the "
            "adapter to a plain LoRA with PEFT first (save_pretrained with "
            "path_initial_model_for_weight_conversion)."
        )
    return config


def alpha(config: Mapping[str, Any]) -> float:
    """Returns scale times rank of a LoRA, the rank-stabilised scale alpha / sqrt(r) included."""
    factor = math.sqrt(config["r"]) if config.get("use_rslora") else 1.0
    return float(config["lora_alpha"]) * factor

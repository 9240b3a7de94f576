"""`adapter_config.json` of PEFT: written from a method, read with everything unsupported refused.

Only what changes numbers matters. Where adapters sit, and the rank and the scale of each, is in
`places`.
"""

import pathlib
import re
from typing import Any

from moe_peft import errors
from moe_peft.weights import safetensors_files

NAME = "adapter_config.json"
HEAD = "lm_head"  # the only module that may be trained besides the adapter

# What every file says besides the settings of its method.
WHOLE = {"modules_to_save": None, "task_type": "SEQ_2_SEQ_LM", "inference_mode": True}

_READ = {
    "LORA": ("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
    "IA3": ("feedforward_modules",),
    "POLY": ("r", "n_tasks", "n_skills", "n_splits"),
}
_OPTIONAL = ("use_rslora", "rank_pattern", "alpha_pattern")  # older versions of PEFT had none
# What a loaded adapter does not depend on. PEFT itself resets `fan_in_fan_out` for linear maps; the
# settings of an initialisation only count where `init_lora_weights` asks for it; a T5 has no bias.
_FREE = {
    *("peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"),
    *("task_type", "inference_mode", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "init_ia3_weights", "init_weights", "init_lora_weights"),
    *("qalora_group_size", "megatron_core", "runtime_config", "fan_in_fan_out", "merge_weights"),
    *("eva_config", "loftq_config", "corda_config", "lora_ga_config", "ensure_weight_tying"),
    *("bias",),
}
_NEUTRAL = {"poly_type": "poly"}
# Others change the frozen weights, to which the adapter is then relative.
_INITS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
_WHY_NOT = {
    "use_dora": "DoRA rescales columns by a learned magnitude",
    "lora_bias": "trained biases",
    "trainable_token_indices": "trained rows of the embedding",
    "layer_replication": "layers that are there several times",
    "target_parameters": "adapters of parameters that are no modules",
    "enable_lora": "one layer for queries, keys and values",
    "alora_invocation_tokens": "an adapter of some tokens only",
}
MERGED = (
    "merge it with PEFT (merge_and_unload, then save_pretrained) and take that folder as a "
    "backbone, hf:FOLDER"
)


def read(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the settings of an adapter folder.

    Raises UserError if it is not a LoRA, (IA)3 or Poly for a T5, or an option cannot be expressed.
    """
    path = folder / NAME
    config = safetensors_files.read_json(path)
    kind, task = config.get("peft_type"), config.get("task_type")
    if kind not in _READ:
        expected = f"{', '.join(_READ)}. If PEFT can merge that kind, {MERGED}"
        raise errors.UserError(f"{path}: peft_type is {kind!r}; expected one of {expected}.")
    if task not in (None, "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"):
        expected = "an encoder-decoder's, 'SEQ_2_SEQ_LM'"
        raise errors.UserError(f"{path}: task_type is {task!r}; expected {expected}.")
    base = (config.get("auto_mapping") or {}).get("base_model_class")
    if base and not base.startswith(("T5", "MT5")):
        model = f"the base model is a {base}; expected a T5 or mT5"
        raise errors.UserError(f"{path}: auto_mapping says {model}.")
    for key in _READ[kind]:
        if key not in config and key not in _OPTIONAL:
            raise errors.UserError(f"{path} has no {key!r}.")
    _check_values(path, config)
    for key, value in config.items():
        if key not in _READ[kind] and key not in _FREE and value and value != _NEUTRAL.get(key):
            _refuse(path, key, value, kind)
    if (init := config.get("init_lora_weights")) not in _INITS:
        how = (
            "merge it with PEFT, on the base that LoftQ made"
            if init == "loftq"
            else "convert the adapter to a plain LoRA with PEFT first (save_pretrained with "
            "path_initial_model_for_weight_conversion), or merge it with PEFT"
        )
        what = f"init_lora_weights is {init!r}, which changes the frozen weights"
        raise errors.UserError(f"{path}: {what}; {how}.")
    return config


def _check_values(path: pathlib.Path, config: dict[str, Any]) -> None:
    """Raises UserError for a number or a regular expression that is none."""
    patterns = [config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")]
    ranks = [config.get("r", 1), *patterns[0].values()]
    alphas = [config.get("lora_alpha", 1), *patterns[1].values()]
    for rank in ranks:
        if type(rank) is not int or rank < 1:
            raise errors.UserError(f"{path}: a rank is {rank!r}; expected a whole number from 1.")
    for alpha in alphas:
        if type(alpha) not in (int, float):
            raise errors.UserError(f"{path}: an alpha is {alpha!r}; expected a number.")
    places = [config.get(key) for key in ("target_modules", "exclude_modules")]
    for pattern in [one for one in places if isinstance(one, str)] + [*patterns[0], *patterns[1]]:
        try:
            re.compile(pattern)
        except re.error as error:
            what = f"is not a regular expression: {error}"
            raise errors.UserError(f"{path}: {pattern!r} {what}.") from error


def _refuse(path: pathlib.Path, key: str, value: Any, kind: str) -> None:
    """Raises UserError for an option that is set, unless it can be expressed after all."""
    if key == "modules_to_save":
        if value == [HEAD] and kind == "LORA":
            return
        what = f"only ['{HEAD}'] of a LoRA can be expressed; {MERGED}"
        raise errors.UserError(f"{path}: modules_to_save is {value!r}, and {what}.")
    if key in _WHY_NOT:
        what = f" ({_WHY_NOT[key]}), which no adapter here can express; {MERGED}"
    else:
        what = (
            f", which is not known here; expected {_NEUTRAL.get(key)!r} or nothing. If it does not "
            "change what a trained adapter computes, remove that line"
        )
    raise errors.UserError(f"{path}: {key} is {value!r}{what}.")

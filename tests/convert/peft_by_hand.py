"""Folders of PEFT with LoRAs for the toy networks, written by hand."""

import json

import numpy as np
import safetensors.numpy

ATTENTION, FEED_FORWARD = ("q", "k", "v", "o"), ("wi_0", "wi_1", "wo")
BLOCKS = [f"encoder.block.{n}.layer.0.SelfAttention" for n in range(2)]
BLOCKS += [f"decoder.block.0.layer.{n}" for n in ("0.SelfAttention", "1.EncDecAttention")]
ENDS = [f"encoder.block.{n}.layer.1.DenseReluDense" for n in range(2)]
ENDS += ["decoder.block.0.layer.2.DenseReluDense"]
MODULES = [f"{block}.{name}" for block in BLOCKS for name in ATTENTION]
MODULES += [f"{block}.{name}" for block in ENDS for name in FEED_FORWARD]

# As version 0.3 wrote it,
OLD = {
    "base_model_name_or_path": "google/flan-t5-base",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_alpha": 6,
    "lora_dropout": 0.05,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 2,
    "target_modules": ["q", "v"],
    "task_type": "SEQ_2_SEQ_LM",
}
# and what later ones added, up to 0.21.
NEW = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_bias": False,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "rank_pattern": {},
    "revision": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "kasa_config": None,
    "use_bdlora": None,
}


def of(*names):
    return [module for module in MODULES if module.rpartition(".")[2] in names]


def tensors(modules, ranks=lambda module: 2, seed=0, dtype=np.float32):
    """LoRAs of modules as PEFT names them, far from fresh."""
    rng, found = np.random.default_rng(seed), {}
    for module in modules:
        name, rank = module.rpartition(".")[2], ranks(module)
        inputs, outputs = 24 if name == "wo" else 16, 24 if name.startswith("wi") else 16
        for part, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            key = f"base_model.model.{module}.lora_{part}.weight"
            found[key] = (0.3 * rng.normal(size=shape)).astype(dtype)
    return found


def write(folder, config, arrays, writing=None):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if writing:
        (folder / "adapter_model.bin").write_bytes(writing.of_arrays(arrays, "serial"))
    else:
        safetensors.numpy.save_file(arrays, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder

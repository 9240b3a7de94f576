"""What each method computes next to a frozen layer. Imports no model and no trainer."""

from moe_peft.adapters.adapter import Adapter
from moe_peft.adapters.lora import LoRA, MoLoRA, mttl_uniform
from moe_peft.adapters.low_rank import low_rank_delta, molora_listing
from moe_peft.adapters.mov import IA3, MoV
from moe_peft.adapters.poly import SkilledIA3, SkilledLoRA

__all__ = [
    "Adapter",
    "IA3",
    "LoRA",
    "MoLoRA",
    "MoV",
    "SkilledIA3",
    "SkilledLoRA",
    "low_rank_delta",
    "molora_listing",
    "mttl_uniform",
]

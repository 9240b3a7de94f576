"""Networks, decoding, and the model that training and evaluation talk to."""

from moe_peft.models.t5 import T5Config, Transformer

__all__ = ["T5Config", "Transformer"]

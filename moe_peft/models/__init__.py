"""Networks, decoding, and the model that training and evaluation talk to."""

from moe_peft.models import family, t5_family
from moe_peft.models.t5 import T5Config, Transformer

family.register(t5_family.FAMILY)

__all__ = ["T5Config", "Transformer"]

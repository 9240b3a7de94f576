"""A T5 with adapters in Python; `moe_peft` has these names too."""

"""The guest of T5X: the project's methods in `python -m t5x.train`, `t5x.eval` and `t5x.infer`.

T5X is not changed and not copied. Its gin files build a model as ever; `adapted.model` takes it and
returns one of a subclass that runs with a method's adapters. What T5X has to know besides follows
from the method: which leaves its optimiser sees (`trainable`), rules for the axes of adapters
(`axes`), which leaves a checkpoint of the backbone must hold (`restoring`), and what is saved
next to T5X's own checkpoints (`saving`). gin/t5x/adapters.gin binds it all. All of it imports T5X.
"""

"""The ids that mean something to a network: padding, the end of a text, the decoder's start."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """Those of one network."""

    pad: int = 0  # fills rows up; nobody attends to it, and it has no loss
    eos: int = 1  # the end of inputs and of targets
    start: int = 0  # what a decoder reads first; often padding's

    def __str__(self) -> str:
        return f"padding {self.pad}, end {self.eos}, start {self.start}"


T5 = SpecialIds()  # of all that Google released but MADLAD-400, which has 1, 2, 0


def of(network: Any) -> SpecialIds:
    """Returns those of a network, patched or not; T5's where its config tells none."""
    return of_config(getattr(network, "config", None))


def of_config(config: Any) -> SpecialIds:
    """Returns those that a network's config tells."""
    told = {name: getattr(config, f"{name}_id", own) for name, own in vars(T5).items()}
    return SpecialIds(**told)

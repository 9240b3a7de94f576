"""What the rest of the package must know of a family of networks, such as T5."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from moe_peft import errors, patching

Config = Any  # a dataclass of sizes and options, with `vocab_size`
Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of networks: encoder-decoders with T5X's calls."""

    name: str
    title: str  # in messages
    config: type
    network: Callable[[Config], Any]  # class of a linen module whose one field is the config
    paths: patching.paths.Paths  # the names of its layers
    sizes: tuple[str, ...]  # fields of the config by which networks are told apart
    # The config of the network with these leaves; raises KeyError of a leaf that any has.
    recognise: Callable[[Shapes], Config]
    # Operations of one pass over one row of so many (inputs, targets), see `preflight.operations`.
    operations: Callable[[Config, int, int], float]
    describe: Callable[[Config], str] = str  # sizes, for a message
    # What transformers calls a parameter -> our path in the unscanned tree, with "{}" for the
    # number of a block.
    hugging_face: Mapping[str, str] = dataclasses.field(default_factory=dict)


FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Makes a family known by its name; raises ValueError if another one has its names."""
    patching.paths.register(family.name, family.paths)
    FAMILIES[family.name] = family


def of(config: Config) -> Family:
    """Returns the family of a network's config."""
    return next(family for family in FAMILIES.values() if isinstance(config, family.config))


def of_network(name: str | None) -> Family | None:
    """Returns the family whose network is the class of that name."""
    return next((each for each in FAMILIES.values() if each.network.__name__ == name), None)


def recognise(shapes: Shapes, where: str) -> Config:
    """Returns the config of the network that has these leaves, scanned or not.

    Raises UserError if leaves that any network has are missing `where` the weights are from; names
    the first for each family.
    """
    reasons = []
    for family in FAMILIES.values():
        try:
            return family.recognise(shapes)
        except KeyError as error:
            path = error.args[0]
            reasons.append(
                f"{where} is not a {family.title}: it has no {path} among its {len(shapes)} "
                f"leaves.{errors.near(path, shapes)}"
            )
    raise errors.UserError(" ".join(reasons))

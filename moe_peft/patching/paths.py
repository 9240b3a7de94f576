"""What the paths of layers mean, for every family of networks.

This is the part of `models.family.Family` that rules and routers ask, who see paths and no model.
"""

from collections.abc import Mapping
import dataclasses
import re
from typing import Literal, NamedTuple


@dataclasses.dataclass(frozen=True)
class Scaled:
    """A place that (IA)3 scales; fields as in `Rule`."""

    pattern: str
    side: Literal["outputs", "inputs"] = "outputs"
    beside: str | None = None
    site: str | None = None
    sibling: str | None = None  # whose output routers see; None: what is scaled


@dataclasses.dataclass(frozen=True)
class Paths:
    """The names of layers in one family of networks."""

    stacks: Mapping[str, str | None]  # parts made of blocks, each with its path where it is scanned
    numbered: str  # what stands before a block's number: "layers_" in "encoder/layers_0/mlp/wi"
    encoder_tokens: str = "(?!)"  # regular expression of layers that read the encoder's tokens
    placements: Mapping[str, str] = dataclasses.field(default_factory=dict)  # named patterns
    scaled: tuple[Scaled, ...] = ()

    def find(self, tail: str, path: str) -> re.Match | None:
        """Matches a path whose part of the network is group 1, and what comes after it."""
        # The network may be a part of another one.
        return re.fullmatch(rf"((?:.*?/)??(?:{'|'.join(self.stacks)}))/{tail}", path)


T5 = Paths(
    stacks={"encoder": "encoder/encoder", "decoder": "decoder/decoder"},
    numbered="layers_",
    encoder_tokens=r"encoder/.*|(.*/)?encoder_decoder_attention/(key|value)",
    # T5 1.0 has one up-projection `wi`, which stands for `wi_0` or `wi_1`.
    placements={
        "all7": r".*/(query|key|value|out|wi(_0|_1)?|wo)",
        "qkvo": r".*/(query|key|value|out)",
        "light": r".*/(key|value|wi(_1)?)",
        "molora_released": r".*/(query|key|value|out|wi(_0)?|wo)",
    },
    # The inside of the feed-forward block: in T5 1.1 the output of wi_1, which equals scaling the
    # gated product; in T5 1.0 the input of wo.
    scaled=(
        Scaled(".*/(key|value)"),
        Scaled(".*/wi_1", site="feed-forward", sibling="wi_0"),
        Scaled(".*/wo", side="inputs", beside="wi", site="feed-forward", sibling="wi"),
    ),
)
FAMILIES = {"t5": T5}
PLACEMENTS = dict(T5.placements)  # of all families


def register(name: str, found: Paths) -> None:
    """Makes a family's names of layers known; raises ValueError if a name is taken."""
    if FAMILIES.get(name) == found:
        return
    taken = sorted(PLACEMENTS.keys() & found.placements.keys()) + [name] * (name in FAMILIES)
    if taken:
        raise ValueError(f"The family {name!r} takes the name {taken[0]!r} of another one.")
    FAMILIES[name] = found
    PLACEMENTS.update(found.placements)


class Block(NamedTuple):
    """A numbered block of layers."""

    part: str  # "encoder"
    number: int
    path: str  # "encoder/layers_0"


def block(path: str) -> Block | None:
    """The block that a layer or parameter lies in; None in a scanned stack or outside of any."""
    for each in FAMILIES.values():
        if found := each.find(rf"{each.numbered}(\d+)/.*", path):
            number = int(found[2])
            return Block(found[1], number, f"{found[1]}/{each.numbered}{number}")
    return None


def part(path: str) -> str | None:
    """The part of the network that a layer lies in, such as "encoder"."""
    found = (each.find(".*", path) for each in FAMILIES.values())
    return next((match[1] for match in found if match), None)


def scanned_stack(path: str) -> str | None:
    """The scanned stack that a parameter belongs to, or None for a single layer's."""
    stacks = (stack for each in FAMILIES.values() for stack in each.stacks.values() if stack)
    return next((stack for stack in stacks if path.startswith(f"{stack}/")), None)


def reads_encoder(path: str) -> bool:
    """Whether a layer reads the encoder's tokens."""
    return any(re.fullmatch(each.encoder_tokens, path) for each in FAMILIES.values())

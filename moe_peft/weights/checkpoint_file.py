"""A checkpoint of any format whose headers have been read, and what loading it will do."""

from collections.abc import Mapping, Sequence
import dataclasses
import re
from typing import Any

from jaxtyping import PyTree

from moe_peft import errors
from moe_peft.models import t5
from moe_peft.weights import leaves, scan_layout, t5_sizes

_MAX_NAMED = 5


@dataclasses.dataclass(frozen=True)
class Report:
    """What a restore does with every leaf of a checkpoint and of the model that it is read for."""

    path: str  # of the checkpoint
    loaded: tuple[str, ...]  # paths that are read
    # Of those, path to (dtype in the file, dtype after loading).
    cast: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    missing: tuple[str, ...] = ()  # paths of the model that the checkpoint lacks
    unused: tuple[str, ...] = ()  # keys of the checkpoint that the model has no place for
    # Keys left out because they are copies or were never used, with the reason.
    known: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def check(self, allow_missing: Sequence[str] = (), allow_unused: Sequence[str] = ()) -> None:
        """Raises UserError for a missing or unused leaf that no regular expression names."""
        is_named = lambda name, patterns: any(re.fullmatch(p, name) for p in patterns)
        missing = [path for path in self.missing if not is_named(path, allow_missing)]
        unused = [key for key in self.unused if not is_named(key, allow_unused)]
        total = len(self.loaded) + len(self.missing)
        advice = "Name them in allow_{} if that is meant."
        check_leaves(self.path, missing, unused, total, advice)

    def lines(self) -> list[str]:
        """Returns the report as text: one line of counts, then one for each that was not loaded."""
        kinds = sorted({f"{old} to {new}" for old, new in self.cast.values()})
        cast = f" ({', '.join(kinds)})" if kinds else ""
        return [
            f"{self.path}: {len(self.loaded)} leaves loaded, {len(self.cast)} cast{cast}, "
            f"{len(self.missing)} missing, {len(self.unused)} unused",
            *(f"  missing: {path}" for path in self.missing),
            *(f"  unused: {key}" for key in self.unused),
            *(f"  left out: {key} ({why})" for key, why in sorted(self.known.items())),
        ]


@dataclasses.dataclass(frozen=True)
class CheckpointFile:
    """A checkpoint of which only headers have been read."""

    path: str  # as the user wrote it
    config: t5.T5Config  # of the network
    leaves: leaves.Leaves  # by path, in the layout that `config.scan_layers` says
    unused: tuple[str, ...] = ()  # keys that have no place in the network
    # Keys that are left out, with the reason.
    known: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # What else the checkpoint says of itself, such as config.json.
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # The config is told from shapes, which leave options open such as the kind of a gate.
    is_recognised: bool = False

    def report(self, dtype: str | None = None) -> Report:
        """Returns what loading as `dtype` does with every leaf; UserError for another shape."""
        expected = t5_sizes.shapes_of(self.config)
        loaded = {path: leaf for path, leaf in self.leaves.items() if path in expected}
        for path, leaf in loaded.items():
            if leaf.shape != expected[path]:
                shapes = f"the shape {leaf.shape}; the config says {expected[path]}."
                raise errors.UserError(f"{leaf.source} gives {path} {shapes}")
        extra = [leaf.source for path, leaf in self.leaves.items() if path not in expected]
        cast = [path for path, leaf in loaded.items() if leaves.is_cast(leaf, dtype)]
        return Report(
            path=self.path,
            loaded=tuple(loaded),
            cast={path: (loaded[path].dtype.name, dtype) for path in cast},
            missing=tuple(path for path in expected if path not in self.leaves),
            unused=(*self.unused, *extra),
            known=self.known,
        )

    def scanned(self, scan_layers: bool) -> "CheckpointFile":
        """Returns the checkpoint in that layout of leaves; nothing is read."""
        config = dataclasses.replace(self.config, scan_layers=scan_layers)
        in_layers = config.relpos_in_every_layer
        found = scan_layout.convert(self.leaves, scan_layers, in_layers)
        return dataclasses.replace(self, config=config, leaves=found)

    def read(
        self,
        dtype: str | None = None,
        *,
        scan_layers: bool = False,
        sharding: leaves.Sharding | leaves.ShardingOf | None = None,
        allow_missing: Sequence[str] = (),
        allow_unused: Sequence[str] = (),
    ) -> tuple[t5.T5Config, PyTree]:
        """Reads the weights; returns the config and the parameters.

        Args:
          dtype: "float32", "bfloat16", or None for that of the file.
          scan_layers: the layout of the tree; the file may have the other one.
          sharding: where leaves go, such as `leaves.spread(mesh)`; None gives NumPy arrays.
          allow_missing: regular expressions of paths that may be missing; they are left out.
          allow_unused: regular expressions of keys that may have no place.

        Raises UserError if another leaf is missing or left over, one has another shape, or a file
        is damaged.
        """
        found = self.scanned(scan_layers)
        report = found.report(dtype)
        report.check(allow_missing, allow_unused)
        loaded = {path: found.leaves[path] for path in report.loaded}
        return found.config, leaves.load(loaded, dtype, sharding)


def check_leaves(
    where: str, missing: Sequence[str], unused: Sequence[str], total: int, advice: str
) -> None:
    """Raises UserError if leaves are missing, of so many in the model, or some are left over.

    The message ends with the advice, in which "{}" stands for "missing" or "unused".
    """
    if not (missing or unused):
        return
    kind, names, near = "unused", unused, ""
    what = f"has {len(unused)} leaves that the model has no place for"
    if missing:
        kind, names, near = "missing", missing, errors.near(missing[0], unused)
        what = f"lacks {len(missing)} of the model's {total} leaves"
    first = ", ".join(names[:_MAX_NAMED])
    raise errors.UserError(f"{where} {what}, the first ones: {first}.{near} {advice.format(kind)}")

"""What a restore did with every leaf; what is missing or left over is an error unless named."""

from collections.abc import Mapping, Sequence
import dataclasses
import re

from moe_peft import errors

Cast = tuple[str, str]  # dtype in the file, dtype now

_MAX_NAMED = 5


@dataclasses.dataclass(frozen=True)
class Report:
    """Leaves of a checkpoint and of the model that it was read for.

    Attributes:
      path: of the checkpoint.
      loaded: paths that were read.
      cast: of those, path to (dtype in the file, dtype now).
      missing: paths of the model that the checkpoint lacks.
      unused: keys of the checkpoint that the model has no place for.
      known: keys left out because they are copies or were never used, with the reason.
    """

    path: str
    loaded: tuple[str, ...]
    cast: Mapping[str, Cast] = dataclasses.field(default_factory=dict)
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    known: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def check(self, allow_missing: Sequence[str] = (), allow_unused: Sequence[str] = ()) -> None:
        """Raises UserError for a missing or unused leaf that no regular expression names."""
        missing = _not_named(self.missing, allow_missing)
        unused = _not_named(self.unused, allow_unused)
        if missing:
            raise errors.UserError(
                f"{self.path} lacks {len(missing)} of the model's "
                f"{len(self.loaded) + len(self.missing)} leaves, the first ones: "
                f"{', '.join(missing[:_MAX_NAMED])}.{errors.near(missing[0], unused)} Name them in "
                "allow_missing if that is meant."
            )
        if unused:
            raise errors.UserError(
                f"{self.path} has {len(unused)} leaves that the model has no place for, the first "
                f"ones: {', '.join(unused[:_MAX_NAMED])}. Name them in allow_unused if that is "
                "meant."
            )

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


def _not_named(paths: Sequence[str], patterns: Sequence[str]) -> list[str]:
    return [path for path in paths if not any(re.fullmatch(p, path) for p in patterns)]

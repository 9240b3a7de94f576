"""A checkpoint whose headers have been read, whatever its format."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from jaxtyping import PyTree

from moe_peft import errors
from moe_peft.models import t5
from moe_peft.weights import leaves, scan_layout, t5_sizes
from moe_peft.weights import report as report_lib


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checkpoint of which only headers have been read.

    Attributes:
      path: as the user wrote it.
      config: of the network.
      leaves: by path, in the layout that `config.scan_layers` says.
      unused: keys that have no place in the network.
      known: keys that are left out with a reason.
      settings: what else the checkpoint says of itself, such as config.json.
    """

    path: str
    config: t5.T5Config
    leaves: leaves.Leaves
    unused: tuple[str, ...] = ()
    known: Mapping[str, str] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def report(self, dtype: str | None = None) -> report_lib.Report:
        """Returns what loading as `dtype` does with every leaf; checks shapes.

        Raises:
          UserError: a leaf has another shape than the network's.
        """
        expected = t5_sizes.of_config(self.config)
        for path, leaf in self.leaves.items():
            if path in expected and leaf.shape != expected[path]:
                raise errors.UserError(
                    f"{leaf.source} gives {path} the shape {leaf.shape}; the config says "
                    f"{expected[path]}."
                )
        extra = [leaf.source for path, leaf in self.leaves.items() if path not in expected]
        loaded = {path: leaf for path, leaf in self.leaves.items() if path in expected}
        return report_lib.Report(
            path=self.path,
            loaded=tuple(loaded),
            cast=leaves.casts(loaded, dtype),
            missing=tuple(path for path in expected if path not in self.leaves),
            unused=(*self.unused, *extra),
            known=self.known,
        )

    def scanned(self, scan_layers: bool) -> "Opened":
        """Returns the checkpoint in the other layout of leaves; nothing is read."""
        config = dataclasses.replace(self.config, scan_layers=scan_layers)
        found = scan_layout.convert(self.leaves, scan_layers)
        return dataclasses.replace(self, config=config, leaves=found)

    def load(
        self,
        dtype: str | None = None,
        sharding: leaves.Sharding | leaves.ShardingOf | None = None,
        allow_missing: Sequence[str] = (),
        allow_unused: Sequence[str] = (),
    ) -> tuple[PyTree, report_lib.Report]:
        """Reads the weights; see `read`."""
        leaves.check_dtype(dtype)
        report = self.report(dtype)
        report.check(allow_missing, allow_unused)
        loaded = {path: self.leaves[path] for path in report.loaded}
        return leaves.load(loaded, dtype, sharding), report

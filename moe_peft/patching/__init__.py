"""How adapters meet a model: rules over layers, an interceptor, and the proxy around the model."""

from moe_peft.patching import paths
from moe_peft.patching.granularity import Granularity
from moe_peft.patching.proxy import Patched, matches, num_rows
from moe_peft.patching.rules import Matches, Rule, Sibling
from moe_peft.patching.trees import ADAPTER, flatten, is_adapter, merge, split

__all__ = [
    "ADAPTER",
    "Granularity",
    "Matches",
    "Patched",
    "Rule",
    "Sibling",
    "flatten",
    "is_adapter",
    "matches",
    "merge",
    "num_rows",
    "paths",
    "split",
]

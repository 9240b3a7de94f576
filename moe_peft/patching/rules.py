"""Rules: which layers get which adapter; and what a model has to offer."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import re
from typing import Any, Literal

from flax import linen as nn

from moe_peft import errors
from moe_peft.patching import granularity as granularity_lib
from moe_peft.routing import task_routers

AdapterFactory = Callable[..., nn.Module]


@dataclasses.dataclass(frozen=True)
class Sibling:
    """Router input: something of another dense layer that the same parent called before."""

    name: str  # of that layer
    # "inputs": what it read. "activated": its output after the parent's activation; the i-th dense
    # layer that a parent calls has the i-th entry of the parent's `activations`, as in the
    # feed-forward blocks of T5X and of this library, so that `Sibling("wi_0", "activated")` is
    # gelu(wi_0 x) in T5 1.1.
    array: Literal["inputs", "activated"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Puts an adapter on every dense layer whose full path matches."""

    # regular expression, matched against the whole path of the frozen layer:
    # 'encoder/layers_0/attention/query', or 'encoder/encoder/attention/query' if scanned
    pattern: str
    # called as `adapter_factory(name="adapter")`; makes a linen module with `__call__(inputs,
    # outputs, site)`
    adapter_factory: AdapterFactory
    # "outputs": the adapter changes what the layer returns. "inputs": it changes what the layer
    # reads, and finds those inputs in the place of its outputs.
    side: Literal["outputs", "inputs"] = "outputs"
    # "inputs": what the frozen layer reads, feature axes joined. "outputs": what the adapter
    # changes; with two feature axes (heads, head width) one decision per head. Or something of a
    # sibling.
    router_input: Literal["inputs", "outputs"] | Sibling = "inputs"
    # matches only where the same parent called a dense layer of this name before
    beside: str | None = None
    # rules with one `site` name are alternatives, of which a model needs only one (gated and
    # ungated feed-forward blocks); the pattern by default: each rule stands alone
    site: str | None = None
    # which of the matched layers share a task router
    granularity: granularity_lib.Granularity = granularity_lib.Granularity()
    # that router, where several layers share one; the same for all rules
    shared_router: task_routers.TaskRouter | None = None

    def __post_init__(self) -> None:
        """Compiles the pattern and makes the adapter once, so that bad settings fail here."""
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise errors.UserError(
                f"The rule pattern {self.pattern!r} is not a regular expression: {error}."
            ) from error
        errors.check_one_of("Rule side", self.side, ("inputs", "outputs"))
        if not isinstance(self.router_input, Sibling):
            errors.check_one_of("Rule router_input", self.router_input, ("inputs", "outputs"))
        if self.site is None:
            object.__setattr__(self, "site", self.pattern)
        self.adapter_factory(parent=None)

    def matches(self, path: str, siblings: Sequence[str] = ()) -> bool:
        """Whether the rule applies to the layer at `path`, called after its `siblings`."""
        if self.beside is not None and self.beside not in siblings:
            return False
        return re.fullmatch(self.pattern, path) is not None


@dataclasses.dataclass(frozen=True)
class Matches:
    """Which layers of a model each rule applies to."""

    rules: tuple[Rule, ...]  # as given
    # the layers each rule matches, in the order in which the model calls them
    paths: tuple[tuple[str, ...], ...]
    layers: tuple[str, ...]  # every dense layer of the model, matched or not

    @property
    def unused(self) -> tuple[Rule, ...]:
        """Rules without a match, of a site that no other rule serves."""
        served = {rule.site for rule, paths in zip(self.rules, self.paths, strict=True) if paths}
        return tuple(rule for rule in self.rules if rule.site not in served)

    @property
    def matched(self) -> tuple[str, ...]:
        """All matched layers, in the order in which the model calls them."""
        found = {path for paths in self.paths for path in paths}
        return tuple(path for path in self.layers if path in found)

    def check(self) -> None:
        """Raises UserError if a rule matches nothing, or two rules match one layer."""
        for path in self.layers:
            matching = zip(self.rules, self.paths, strict=True)
            check_single(path, [rule for rule, paths in matching if path in paths])
        for rule in self.unused:
            raise errors.UserError(
                f"The rule {rule.pattern!r} matches no layer of the model."
                f"{errors.near(rule.pattern, self.layers)} The model has: {summary(self.layers)}."
            )


def check_single(path: str, rules: Sequence[Rule]) -> None:
    """Raises UserError if more than one rule matches `path`."""
    if len(rules) > 1:
        patterns = ", ".join(repr(rule.pattern) for rule in rules)
        raise errors.UserError(f"{len(rules)} rules match the layer {path}: {patterns}. Keep one.")


def summary(paths: Sequence[str]) -> str:
    """Returns the paths in one line, layers that differ in numbers only written once."""
    return ", ".join(dict.fromkeys(re.sub(r"\d+(?=/)", "*", path) for path in paths))


def match(rules: Sequence[Rule], calls: Mapping[str, Any]) -> Matches:
    """Returns the matches of `rules` among recorded dense calls {path: siblings called before}."""
    paths = tuple(
        tuple(path for path, siblings in calls.items() if rule.matches(path, siblings))
        for rule in rules
    )
    return Matches(tuple(rules), paths, tuple(calls))

"""A model card of an adapter: what it is, how it was trained, how good it is, how to load it."""

from collections.abc import Iterator, Mapping
import dataclasses
import json
import pathlib
import re
from typing import Any

import yaml

from moe_peft import patching
from moe_peft.convert import adapter_trees
from moe_peft.models import family
from moe_peft.training import start as start_lib
from moe_peft.weights import formats, records, saved_run

LIBRARY = "moe-peft"
_ON_THE_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # NAME/REPO


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a card says."""

    name: str  # of the folder
    step: int  # updates made
    description: Mapping[str, Any]  # of the run
    num_trainable: int  # parameters
    num_base: int | None  # parameters of the network without adapters; None if it is not known
    base_sizes: str  # of the network, for a person; "" if it is not known
    scores: tuple[Mapping[str, Any], ...]  # of `moe-peft eval`: the contents of results.json
    license: str | None
    is_peft: bool  # PEFT opens the folder, too

    @classmethod
    def of(
        cls,
        saved: saved_run.Saved,
        network: Any | None,
        name: str,
        license: str | None,
        run_folder: pathlib.Path | None,
        is_peft: bool,
    ) -> "Facts":
        """Collects them; without a network its sizes are left out."""
        count = patching.trees.num_parameters
        num_base, sizes = None, ""
        if network is not None:
            method = records.method(saved.description["method"], name)
            shapes = adapter_trees.BATCH_SHAPES
            num_base = count(start_lib.Start.of_network(network, method, shapes).base_shapes())
            sizes = family.of(network.config).describe(network.config)
        found = tuple(_scores(run_folder, saved)) if run_folder else ()
        facts = (saved.step, saved.description, count(saved.trainable), num_base, sizes)
        return cls(name, *facts, found, license, is_peft)

    @property
    def method(self) -> str:
        """The name of the method."""
        return self.description["method"]["name"]

    @property
    def spec(self) -> str:
        """The backbone as the run named it, "" if it did not."""
        return self.description.get("backbone_spec") or ""

    @property
    def base_path(self) -> str | None:
        """The folder of a backbone that transformers opens, as the run named it."""
        kind, _, path = self.spec.partition(":")
        return path if kind == formats.HUGGING_FACE else None

    @property
    def base_id(self) -> str | None:
        """What the Hub calls the backbone, if its folder is called so, such as "google/t5-base"."""
        return self.base_path if _ON_THE_HUB.fullmatch(self.base_path or "") else None

    @property
    def base_name(self) -> str:
        """The backbone in few words; its place on a disk is nobody's business."""
        return self.base_id or pathlib.PurePath(self.spec.partition(":")[2]).name or "a T5"


def text(facts: Facts) -> str:
    """Returns the whole card, in Markdown with YAML front matter."""
    parts = [
        _front_matter(facts),
        f"# {facts.name}\n\nAn adapter of the method `{facts.method}` for {facts.base_name}, "
        "trained with moe-peft.",
        "\n".join(["## What it is", "", *_what(facts)]),
        "\n".join(["## How it was trained", "", *_training(facts)]),
    ]
    if facts.scores:
        parts.append("\n".join(["## Scores", "", *_table(facts)]))
    parts.append("\n".join(["## How to load it", "", *_loading(facts)]))
    return "\n\n".join(parts) + "\n"


def _scores(run_folder: pathlib.Path, saved: saved_run.Saved) -> Iterator[Mapping[str, Any]]:
    """Yields the evaluations of this step of this method; others may lie in the same folder."""
    for path in sorted(run_folder.glob("eval/*/results.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        run = content["run"]
        if (run.get("method"), run.get("step")) == (saved.description["method"], saved.step):
            yield content


def _front_matter(facts: Facts) -> str:
    """What the Hub reads; what is not known is a comment, which it does not."""
    known = {
        "base_model": facts.base_id,
        "library_name": "peft" if facts.is_peft else LIBRARY,
        "license": facts.license,
        "tags": list(dict.fromkeys((LIBRARY, "adapter", facts.method))),
    }
    hints = {
        "base_model": "NAME/REPO of the base model, if the Hub has it",
        "license": "a short name, such as apache-2.0; see https://hf.co/docs/hub/model-cards",
    }
    given = {name: value for name, value in known.items() if value}
    lines = yaml.safe_dump(given, sort_keys=False, allow_unicode=True)
    missing = [f"# {name}: {hints[name]}\n" for name in hints if name not in given]
    return f"---\n{lines}{''.join(missing)}---"


def _what(facts: Facts) -> Iterator[str]:
    backbone, described = facts.description["backbone"], facts.description["method"]
    sizes = f": {facts.base_sizes}" if facts.base_sizes else ""
    yield f"- Base model: `{facts.base_name}`{sizes}"
    yield f"- Fingerprint of its weights: `{backbone['fingerprint']}`"
    share = ""
    if facts.num_base:
        percent = 100 * facts.num_trainable / facts.num_base
        share = f", {percent:.2g} % of the base model's {facts.num_base:,}"
    yield f"- Trained parameters: {facts.num_trainable:,}{share}"
    yield f"- Method: `{facts.method}`"
    for rule in described["rules"]:
        yield f"  - {rule['side']} of `{rule['pattern']}`: `{_call(rule['adapter'])}`"
    for name in ("load_balancing_weight", "z_weight"):
        if described.get(name):
            yield f"  - {name.replace('_', ' ')}: {described[name]}"
    if described.get("transfer"):
        transfer = described["transfer"]
        source = transfer["source"]["name"]
        yield f"  - started from a run of `{source}`, variant `{transfer['variant']}`"


def _training(facts: Facts) -> Iterator[str]:
    described = facts.description
    yield f"- Steps: {facts.step:,}"
    for name, value in (described.get("data") or {}).items():
        if value not in (None, False):
            yield f"- {name.replace('_', ' ').capitalize()}: {_shown(value)}"
    if optimizer := described.get("optimizer"):
        settings = {k: v for k, v in optimizer.items() if k not in ("name", "learning_rates")}
        yield f"- Optimiser: `{_call({'class': optimizer['name'], **settings})}`"
        for group, rates in (optimizer.get("learning_rates") or {}).items():
            of = f" of {group}" if group else ""
            kind = "" if len(set(rates)) == 1 else "a schedule, at a few steps at most "
            yield f"- Learning rate{of}: {kind}{max(rates):.6g}"
    for name in ("member", "task"):
        if described.get(name) is not None:
            yield f"- {name.capitalize()}: {_shown(described[name])}"


def _table(facts: Facts) -> Iterator[str]:
    yield "| data | split | metric | mean | median | tasks | examples |"
    yield "|---|---|---|---:|---:|---:|---:|"
    for content in facts.scores:
        overall, settings = content["results"]["overall"], content["settings"]
        numbers = (f"{100 * overall[name]:.1f}" for name in ("mean", "median"))
        counts = (f"{overall[name]:,}" for name in ("num_tasks", "num_examples"))
        metric = overall.get("metric") or settings["metric"]
        cells = (content["mixture"], settings["split"], metric, *numbers, *counts)
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield "Per cent: averages over tasks of the mean and of the median over a task's templates."


def _loading(facts: Facts) -> Iterator[str]:
    if facts.spec.startswith("embedded:"):
        base, where = facts.spec, "comes with moe-peft"
    else:
        base, where = f"hf:{facts.base_id or 'FOLDER'}", "is a folder that transformers saved"
    yield f"The base model {where}:"
    yield from ("", "```")
    yield f"moe-peft infer {facts.name} --inputs questions.jsonl --outputs answers.jsonl"
    yield from ("```", "", "```python", "import moe_peft", "")
    yield f'model = moe_peft.load("{facts.name}", backbone="{base}")'
    yield "```"
    if facts.is_peft:
        yield from ("", "With PEFT:", "", "```python", "import peft", "import transformers", "")
        base = facts.base_id or "FOLDER of the base model"
        yield f'base = transformers.T5ForConditionalGeneration.from_pretrained("{base}")'
        yield f'model = peft.PeftModel.from_pretrained(base, "{facts.name}")'
        yield "```"


def _call(described: Mapping[str, Any]) -> str:
    """Returns "LoRA(rank=4, alpha=8.0)"; settings that are off are left out."""
    given = {k: v for k, v in described.items() if k != "class" and v not in (None, False)}
    shown = lambda value: _call(value) if isinstance(value, Mapping) else repr(value)
    inner = ", ".join(f"{name}={shown(value)}" for name, value in given.items())
    return f"{described.get('class', 'dict')}({inner})"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(inner)}" for name, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

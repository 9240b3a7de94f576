"""Writes docs/models.md from docs/models.toml and the heads of the experiments' files.

    python docs/make_models.py

Parameters are counted from the shapes of the network that config.json describes; no weights are
read. tests/test_models.py holds that the page is of today.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import functools
import math
import pathlib
import tomllib
from typing import Any

from moe_peft import errors
from moe_peft.experiments import files
from moe_peft.models import special_ids, t5
from moe_peft.weights import hf_kinds, hugging_face, scan_layout, t5_sizes

HERE = pathlib.Path(__file__).parent
SIZES = ("d_model", "d_kv", "d_ff", "num_heads", "num_layers", "num_decoder_layers")


def table() -> Mapping[str, Any]:
    """docs/models.toml."""
    return tomllib.loads((HERE / "models.toml").read_text(encoding="utf-8"))


def settings(family: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model."""
    return {**family["config"], **dict(zip(SIZES, model["sizes"], strict=True))}


def config(family: Mapping[str, Any], model: Mapping[str, Any]) -> t5.T5Config:
    """The network that opens; a UserError where none does."""
    told = hf_kinds.with_kind(settings(family, model))
    hugging_face.check_settings(told, model["hf"])
    ids = hf_kinds.ids_of(told, {}, model["hf"])
    own = {f"{name}_id": number for name, number in vars(ids).items()}
    return dataclasses.replace(hugging_face.config_of(told, model["hf"]), **own)


@functools.cache
def parameters(network: t5.T5Config) -> int:
    """How many a network has, from shapes alone."""
    # Layers that are scanned trace as one, and hold biases each, of which a T5 shares one table.
    shapes = t5_sizes.shapes_of(dataclasses.replace(network, scan_layers=True))
    count = sum(map(math.prod, shapes.values()))
    if not network.relpos_in_every_layer:
        biases = [shape for path, shape in shapes.items() if path.endswith(scan_layout.BIAS)]
        count -= sum(math.prod(shape) // shape[1] * (shape[1] - 1) for shape in biases)
    return count


def number(text: str) -> float:
    """A published number.

    >>> number("2.85B"), number("60.5M"), number("12")
    (2850000000.0, 60500000.0, 12.0)
    """
    return float(text.rstrip("MB")) * {"M": 1e6, "B": 1e9}.get(text[-1], 1)


def special(network: t5.T5Config) -> list[str]:
    """What differs from T5 1.1."""
    tiny = dataclasses.replace(network, **dict.fromkeys(("pad_id", "start_id"), 0), eos_id=1)
    found = []
    if network.mlp_activations != ("gelu", "linear"):
        found.append(f"`mlp_activations` ({', '.join(network.mlp_activations)})")
    if network.logits_via_embedding:
        found.append("tied and scaled output layer")
    if network.relpos_buckets != 32:
        found.append(f"{network.relpos_buckets} buckets of distances")
    if network.relpos_in_every_layer:
        found.append("position biases in every layer")
    if tiny != network:
        found.append(f"ids: {special_ids.of_config(network)}")
    return found


def refusal(config_json: Mapping[str, Any]) -> str:
    """The line that a folder with this config.json gets."""
    try:
        hugging_face.check_settings(config_json, "config.json")
    except errors.UserError as error:
        return str(error)
    raise AssertionError(f"{config_json} opens")


def papers() -> dict[str, list[str]]:
    """Tables of the papers, such as "mhr/t0_xl", or rows, by the backbone that their heads name."""
    rows: dict[str, str] = {}
    for name in files.names():
        for binding in (each for line in files.load(name).commands for each in line.bindings):
            if binding.startswith("BACKBONE=hf:"):
                rows[name] = binding
    folder_of = lambda name: name.rpartition("/")[0]
    told_in: dict[str, set[str]] = {}
    for name, backbone in rows.items():
        told_in.setdefault(folder_of(name), set()).add(backbone)
    found: dict[str, list[str]] = {}
    for name, backbone in rows.items():
        place = folder_of(name) if len(told_in[folder_of(name)]) == 1 else name
        listed = found.setdefault(backbone.removeprefix("BACKBONE="), [])
        listed += [place] if place not in listed else []
    return found


def lines() -> Iterator[str]:
    """The page."""
    read = table()
    yield read["introduction"]
    yield "| family | `BACKBONE` | parameters | published | T5X's checkpoint |"
    yield "|---|---|---:|---:|---|"
    for family in read["family"]:
        for model in family["models"]:
            count = parameters(config(family, model))
            published = model.get("published", "")
            published = f"{int(published):,}" if published.isdigit() else published
            t5x = f"`t5x:{read['t5x_folder']}{model['t5x']}`" if "t5x" in model else ""
            yield f"| {family['name']} | `hf:{model['hf']}` | {count:,} | {published} | {t5x} |"
    yield ""
    yield "| family | differs from T5 1.1 in | tokenizer | compared by | where the sizes stand |"
    yield "|---|---|---|---|---|"
    for family in read["family"]:
        differs = "; ".join(special(config(family, family["models"][0])))
        tests = ", ".join(f"`{path}`" for path in family["compared"])
        cells = (family["name"], differs, family["tokenizer"], tests, family["source"])
        yield f"| {' | '.join(cells)} |"
    yield "\n" + read["tokenizers"]
    yield read["papers"]
    yield "| `BACKBONE` | rows of `gin/experiments/` |"
    yield "|---|---|"
    for backbone, rows in sorted(papers().items()):
        yield f"| `{backbone}` | {', '.join(f'`{row}`' for row in rows)} |"
    yield "\n## What does not open\n"
    yield "| what | the line that it gets |"
    yield "|---|---|"
    for each in read["refused"]:
        yield f"| {each['name']} | `{refusal(each['config'])}` |"


def page() -> str:
    """docs/models.md."""
    return "\n".join(lines()) + "\n"


if __name__ == "__main__":
    (HERE / "models.md").write_text(page(), encoding="utf-8")

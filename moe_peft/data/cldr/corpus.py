"""Pre-training text: CLDR facts as lines, and their denoising.

A line states facts of one or two items, `German month March = März` or `de month March = März; May
= Mai`, for any function and any locale, held-out ones included: the backbone may read the data,
never the instructions. Each line becomes one example, in one of two ways:

* span corruption (Raffel et al. 2020, section 3.1.4) of values, locales or functions: inputs hold a
  sentinel per span; targets list each sentinel and the text it hides.
* prefix (the LM adaptation of Lester et al. 2021, section 3.2, at this scale): the line is cut
  before its last value.
"""

from collections.abc import Iterator
import dataclasses
import re

import numpy as np

from moe_peft.data.cldr import functions, suite

# A sentinel is one character of a private-use area in a row, and one byte UTF-8 never uses once
# encoded.
SENTINELS = "\ue000\ue001\ue002\ue003"
SENTINEL_BYTE = 0xF8
MAX_INPUT_BYTES = 63  # with the end mark, 64 tokens
MAX_TARGET_BYTES = 39
PREFIX_RATE = 0.5
NUM_ITEMS_PROBABILITIES = (0.5, 0.3, 0.2)  # one, two or three items in a line
HIDE_NAME_RATE = 0.15  # of the locale or the function, besides the values

_FUNCTIONS = tuple(functions.FUNCTIONS.values())
_LOCALES = tuple(suite.LOCALES.items())
_CUMULATIVE = np.cumsum(NUM_ITEMS_PROBABILITIES)[:-1]


@dataclasses.dataclass(frozen=True)
class Row:
    """One denoising example; `kind` is "span" or "prefix"."""

    kind: str
    inputs: str
    targets: str


def line_fields(rng: np.random.Generator) -> list[tuple[str, str]]:
    """A line as (kind, text) pieces whose texts joined are the line."""
    function = _FUNCTIONS[rng.integers(len(_FUNCTIONS))]
    locale, language = _LOCALES[rng.integers(len(_LOCALES))]
    named = language if rng.random() < 0.5 else locale
    count = 1 + int(np.searchsorted(_CUMULATIVE, rng.random(), side="right"))
    items = dict.fromkeys(function.sample(rng) for _ in range(count))
    fields = [("locale", named), ("", " "), ("function", function.name)]
    if rng.random() < 0.5:
        fields.reverse()
    fields.append(("", " "))
    for index, item in enumerate(items):
        if index:
            fields.append(("", "; "))
        fields += [("item", item), ("", " = "), ("value", function.value(item, locale))]
    return fields


def denoise(fields: list[tuple[str, str]], rng: np.random.Generator) -> Row:
    """Corrupts a line."""
    values = [index for index, (kind, _) in enumerate(fields) if kind == "value"]
    if len(values) == 1 and rng.random() < PREFIX_RATE:
        cut = values[-1]
        return Row("prefix", "".join(text for _, text in fields[:cut]), fields[cut][1])
    hidden = set(values)
    if rng.random() < HIDE_NAME_RATE:
        names = [index for index, (kind, _) in enumerate(fields) if kind in ("locale", "function")]
        hidden.add(names[rng.integers(len(names))])
        # With its name hidden, a value must stay for the name to be told from.
        hidden.discard(values[0])
    inputs, targets, sentinels = [], [], iter(SENTINELS)
    for index, (_, text) in enumerate(fields):
        inputs.append(next(sentinels) if index in hidden else text)
        if index in hidden:
            targets.append(inputs[-1] + text)
    return Row("span", "".join(inputs), "".join(targets))


def restore(row: Row) -> str:
    """The line a row was made from."""
    if row.kind == "prefix":
        return row.inputs + row.targets
    parts = re.findall(f"[{SENTINELS}][^{SENTINELS}]*", row.targets)
    hidden = {text[0]: text[1:] for text in parts}
    return "".join(hidden.get(character, character) for character in row.inputs)


def rows(seed: int, count: int) -> Iterator[Row]:
    """`count` rows, a pure function of `seed`."""
    rng = np.random.default_rng(seed)
    while count:
        row = denoise(line_fields(rng), rng)
        num_inputs, num_targets = len(encode(row.inputs)), len(encode(row.targets))
        if num_inputs <= MAX_INPUT_BYTES and num_targets <= MAX_TARGET_BYTES:
            yield row
            count -= 1


def encode(text: str) -> bytes:
    """UTF-8, with sentinels as single bytes from `SENTINEL_BYTE` up."""
    encoded = text.encode()
    for index, sentinel in enumerate(SENTINELS):
        encoded = encoded.replace(sentinel.encode(), bytes([SENTINEL_BYTE + index]))
    return encoded

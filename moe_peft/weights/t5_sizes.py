"""Which network a set of weights is, told from the shapes of its leaves."""

import ast
from collections.abc import Mapping
import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp

from moe_peft import errors, patching
from moe_peft.config import packaged
from moe_peft.models import family

Shapes = family.Shapes
recognise = family.recognise


@functools.lru_cache(maxsize=16)
def shapes_of(config: family.Config) -> Shapes:
    """Returns the shape of every parameter by its path."""
    module = family.of(config).network(config)
    tokens = jnp.ones((1, 2), jnp.int32)
    init = lambda rng: module.init(rng, tokens, tokens, tokens, enable_dropout=False)["params"]
    shapes = jax.eval_shape(init, jax.random.key(0))
    flat = {path: leaf.shape for path, leaf in patching.flatten(shapes).items()}
    return types.MappingProxyType(flat)


def name_of(config: family.Config) -> str | None:
    """Returns the size file of gin/models/ that describes the network, such as "t5_1_1_xl"."""
    own = family.of(config)
    sizes = {field: getattr(config, field) for field in own.sizes}
    return next((name for name, found in _sizes(own.name).items() if found == sizes), None)


def config_named(name: str) -> family.Config:
    """Returns the network of gin/models/NAME.gin."""
    known = {file: own for own in family.FAMILIES for file in _sizes(own)}
    errors.check_one_of("The size of a network", name, sorted(known))
    return family.FAMILIES[known[name]].config(**_sizes(known[name])[name])


def describe(config: family.Config) -> str:
    """Returns the network's name and sizes for a message."""
    return f"{name_of(config) or 'no size with a name'}: {family.of(config).describe(config)}"


def differences(ours: family.Config, theirs: family.Config) -> list[str]:
    """Returns the names of the sizes in which two networks of a family differ."""
    return [
        field for field in family.of(ours).sizes if getattr(ours, field) != getattr(theirs, field)
    ]


@functools.cache
def _sizes(name: str) -> dict[str, Mapping[str, Any]]:
    """Returns the sizes in the files of gin/models/ that are of a family."""
    own, found = family.FAMILIES[name], {}
    fields = {field.name: field.default for field in dataclasses.fields(own.config)}
    defaults = {size: fields[size] for size in own.sizes}
    needed = {size for size, default in defaults.items() if default is dataclasses.MISSING}
    prefix = f"{own.config.__name__}."
    for path in packaged.files("models"):
        values = {
            name.removeprefix(prefix): value
            for name, value in packaged.bindings(path).items()
            if name.startswith(prefix)
        }
        if needed <= values.keys():
            given = {size: ast.literal_eval(values[size]) for size in own.sizes if size in values}
            found[path.stem] = {**defaults, **given}
    return found

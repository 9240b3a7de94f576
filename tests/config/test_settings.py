"""A command whose settings are a dataclass."""

import dataclasses
import inspect

import gin
import pytest

from moe_peft.config import settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Of the command below."""

    # How many, at least
    # one.
    count: int
    name: str | None = None  # whose
    factor: float = 2.0


@settings.entry_point(Settings, "tests_settings", module="tests")
def command(found: Settings) -> str:
    """Says what it was given."""
    return f"{found.name} {found.count * found.factor}"


def test_gin_and_python_call_it_with_the_fields():
    assert command(count=3) == "None 6.0"
    gin.clear_config()
    gin.parse_config("tests_settings.count = 4\ntests_settings.name = 'n'")
    assert gin.get_configurable("tests_settings")() == "n 8.0"
    gin.clear_config()


def test_signature_types_and_docstring_come_from_the_fields():
    assert list(inspect.signature(command).parameters) == ["count", "name", "factor"]
    assert inspect.signature(command).parameters["factor"].default == 2.0
    assert command.__annotations__["name"] == str | None
    assert settings.comments(Settings) == {
        "count": "How many, at least one.",
        "name": "whose",
        "factor": "",
    }
    assert command.__doc__ == (
        "Says what it was given.\n\nArgs:\n  count: How many, at least one.\n"
        "  name: whose\n  factor: "
    )


def test_what_is_not_a_field_is_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'counts'"):
        command(counts=1)


def test_inherited_fields_keep_their_comments():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class More(Settings):
        factor: float = 3.0
        more: bool = False  # than the others

    assert settings.comments(More) == settings.comments(Settings) | {"more": "than the others"}

"""Instructions: four wordings per function; their order gives template ids and never changes.

Fields: `item`, `language` (the locale's English name), `code` (its CLDR code). Two wordings name
the locale one way and two the other, and each function's wordings put item and locale in both
orders. None of them occurs in the pre-training text.
"""

NUM_TEMPLATES = 4

_NAME = (
    "Name the {function} {item} in {language}.",
    "{code}: {function} name for {item}?",
    "What is {item}, the {function}, in {language}?",
    "Write the {function} {item} for {code}.",
)
_FORMAT = (
    "Format the {function} {item} in {language}.",
    "{code}: how is the {function} {item} written?",
    "In {language}, print the {function} {item}.",
    "Write the {function} {item} for {code}.",
)
_KINDS = {
    _NAME: ("month", "weekday", "country", "language"),
    _FORMAT: ("number", "percent", "currency", "date"),
    (_NAME[0], _FORMAT[1], *_NAME[2:]): ("day", "unit", "relative"),
    ("Join the {function} {item} in {language}.", *_FORMAT[1:]): ("list",),
}

TEMPLATES: dict[str, tuple[str, ...]] = {
    function: tuple(wording.replace("{function}", function) for wording in wordings)
    for wordings, functions in _KINDS.items()
    for function in functions
}


def render(function: str, template_id: int, *, item: str, language: str, code: str) -> str:
    """The instruction a model reads."""
    template = TEMPLATES[function][template_id]
    return template.format(item=item, language=language, code=code)

"""Instructions: four wordings per function. The position in the tuple is the template id, and never
changes.

Fields: `item`, `language` (the locale's English name), `code` (its CLDR code). Two wordings name
the locale one way and two the other, and each function's wordings put item and locale in both
orders. None of them occurs in the pre-training text.
"""

NUM_TEMPLATES = 4

TEMPLATES: dict[str, tuple[str, ...]] = {
    "month": (
        "Name the month {item} in {language}.",
        "{code}: month name for {item}?",
        "What is {item}, the month, in {language}?",
        "Write the month {item} for {code}.",
    ),
    "weekday": (
        "Name the weekday {item} in {language}.",
        "{code}: weekday name for {item}?",
        "What is {item}, the weekday, in {language}?",
        "Write the weekday {item} for {code}.",
    ),
    "country": (
        "Name the country {item} in {language}.",
        "{code}: country name for {item}?",
        "What is {item}, the country, in {language}?",
        "Write the country {item} for {code}.",
    ),
    "language": (
        "Name the language {item} in {language}.",
        "{code}: language name for {item}?",
        "What is {item}, the language, in {language}?",
        "Write the language {item} for {code}.",
    ),
    "number": (
        "Format the number {item} in {language}.",
        "{code}: how is the number {item} written?",
        "In {language}, print the number {item}.",
        "Write the number {item} for {code}.",
    ),
    "percent": (
        "Format the percent {item} in {language}.",
        "{code}: how is the percent {item} written?",
        "In {language}, print the percent {item}.",
        "Write the percent {item} for {code}.",
    ),
    "currency": (
        "Format the currency {item} in {language}.",
        "{code}: how is the currency {item} written?",
        "In {language}, print the currency {item}.",
        "Write the currency {item} for {code}.",
    ),
    "date": (
        "Format the date {item} in {language}.",
        "{code}: how is the date {item} written?",
        "In {language}, print the date {item}.",
        "Write the date {item} for {code}.",
    ),
    "day": (
        "Name the day {item} in {language}.",
        "{code}: how is the day {item} written?",
        "What is {item}, the day, in {language}?",
        "Write the day {item} for {code}.",
    ),
    "unit": (
        "Name the unit {item} in {language}.",
        "{code}: how is the unit {item} written?",
        "What is {item}, the unit, in {language}?",
        "Write the unit {item} for {code}.",
    ),
    "relative": (
        "Name the relative {item} in {language}.",
        "{code}: how is the relative {item} written?",
        "What is {item}, the relative, in {language}?",
        "Write the relative {item} for {code}.",
    ),
    "list": (
        "Join the list {item} in {language}.",
        "{code}: how is the list {item} written?",
        "In {language}, print the list {item}.",
        "Write the list {item} for {code}.",
    ),
}


def render(function: str, template_id: int, *, item: str, language: str, code: str) -> str:
    """The instruction a model reads."""
    template = TEMPLATES[function][template_id]
    return template.format(item=item, language=language, code=code)

"""What each function of the suite asks, item by item, and what CLDR answers.

An item is a short English or language-neutral string ("March", "1234.5", "in 3 days"); its value is
the text CLDR gives for it in a locale. Closed functions (names) have a short fixed list of items;
open functions (formats) draw theirs. Spaces of any width become a plain space, and nothing else is
changed, so values are CLDR's.
"""

from collections.abc import Callable, Iterable
import dataclasses
import datetime
import decimal
import functools

import babel
from babel import dates, lists, localedata, numbers, units
import numpy as np

POOL_SIZE = 60  # items of an open function that become examples
POOL_SEED = 20240305

MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July"),
    *("August", "September", "October", "November", "December"),
)
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
TERRITORIES = (
    *("DE", "FR", "IT", "ES", "PT", "SE", "NO", "DK"),
    *("FI", "PL", "HU", "GR", "TR", "JP", "CN", "IN"),
)
LANGUAGES = (
    *("de", "fr", "it", "es", "pt", "sv", "da", "fi"),
    *("pl", "hu", "el", "tr", "ja", "zh", "hi", "ar"),
)
CURRENCIES = ("EUR", "USD", "JPY")
UNITS = (
    *("mass-kilogram", "mass-gram", "length-kilometer", "length-meter", "length-centimeter"),
    *("volume-liter", "duration-minute"),
)
# In seconds, as babel has them.
PERIODS = {"day": 86_400, "week": 604_800, "month": 2_592_000, "year": 31_536_000}
NAMES = ("Ana", "Ben", "Eva", "Max", "Leo", "Mia", "Tom", "Ida", "Lea", "Jan", "Kim", "Zoe")
MAX_AMOUNT = 20  # of units and periods; enough for every plural form


@dataclasses.dataclass(frozen=True)
class Function:
    """One function: its items and its answer."""

    name: str  # short, a part of task names
    value: Callable[[str, str], str]  # (item, locale code) to CLDR's text
    items: tuple[str, ...] = ()  # all of a closed function; empty for an open one
    draw: Callable[[np.random.Generator], str] | None = None  # an item of an open function

    def pool(self) -> tuple[str, ...]:
        """The items that become task examples: the same in every locale and on every machine."""
        rng = np.random.default_rng([POOL_SEED, *self.name.encode()])
        found = dict.fromkeys(self.items)
        while self.draw and len(found) < POOL_SIZE:
            found[self.draw(rng)] = None
        return tuple(found)

    def sample(self, rng: np.random.Generator) -> str:
        """One item, closed or open, for pre-training text."""
        return self.draw(rng) if self.draw else self.items[rng.integers(len(self.items))]


@functools.cache
def _names(kind: str, locale: str) -> dict[int, str]:
    """Nominative month or weekday names."""
    # Read from tables that babel has not used yet: it resolves the stand-alone alias inside a table
    # that locales share, so names would depend on which locale was formatted first.
    in_memory = dict(localedata._cache)
    localedata._cache.clear()
    try:
        tables = localedata.load(locale)[kind]
    finally:
        localedata._cache.clear()
        localedata._cache.update(in_memory)
    alone = tables["stand-alone"]["wide"]
    own = alone[1] if isinstance(alone, tuple) else alone if isinstance(alone, dict) else {}
    return {**tables["format"]["wide"], **own}


@functools.cache
def _english(kind: str) -> dict[str, str]:
    """English display name to code, for territories or languages."""
    names = getattr(babel.Locale.parse("en"), kind)
    codes = TERRITORIES if kind == "territories" else LANGUAGES
    return {names[code]: code for code in codes}


@functools.cache
def _display(kind: str, locale: str) -> dict[str, str]:
    return dict(getattr(babel.Locale.parse(locale), kind))


def _display_name(kind: str) -> tuple[Callable[[str, str], str], Iterable[str]]:
    return lambda item, locale: _display(kind, locale)[_english(kind)[item]], _english(kind)


def _draw_number(rng: np.random.Generator) -> str:
    digits = int(rng.integers(3, 7))
    whole = rng.integers(10 ** (digits - 1), 10**digits)
    return f"{whole}.{rng.integers(1, 10)}" if rng.random() < 0.5 else str(whole)


def _draw_currency(rng: np.random.Generator) -> str:
    code = CURRENCIES[rng.integers(len(CURRENCIES))]
    return f"{code} {rng.integers(1, 10 ** int(rng.integers(1, 5)))}"


def _currency(item: str, locale: str) -> str:
    code, amount = item.split()
    return numbers.format_currency(decimal.Decimal(amount), code, locale=locale)


def _draw_date(rng: np.random.Generator) -> str:
    first = datetime.date(1990, 1, 1)
    return str(first + datetime.timedelta(days=int(rng.integers(0, 365 * 40))))


def _day(item: str, locale: str) -> str:
    month, day = item.split()
    date = datetime.date(2024, MONTHS.index(month) + 1, int(day))
    return dates.format_skeleton("MMMMd", date, locale=locale)


@functools.cache
def _english_units() -> dict[str, str]:
    named = lambda amount, unit: units.format_unit(amount, unit, locale="en").split()[1]
    return {named(amount, unit): unit for amount in (2, 1) for unit in UNITS}


def _draw_unit(rng: np.random.Generator) -> str:
    unit = UNITS[rng.integers(len(UNITS))]
    return units.format_unit(int(rng.integers(1, MAX_AMOUNT + 1)), unit, locale="en")


def _unit(item: str, locale: str) -> str:
    amount, unit = item.split()
    return units.format_unit(int(amount), _english_units()[unit], locale=locale)


def _draw_relative(rng: np.random.Generator) -> str:
    period = tuple(PERIODS)[rng.integers(len(PERIODS))]
    return _span(int(rng.integers(1, MAX_AMOUNT + 1)) * int(rng.choice((-1, 1))), period, "en")


def _span(amount: int, period: str, locale: str) -> str:
    """`amount` periods from now (negative: ago) in words."""
    delta = datetime.timedelta(seconds=amount * PERIODS[period])
    # A threshold above every amount makes babel stop at the granularity asked for.
    return dates.format_timedelta(
        delta, granularity=period, threshold=1e9, add_direction=True, locale=locale
    )


def _relative(item: str, locale: str) -> str:
    words = item.split()
    amount, period = (words[1], words[2]) if words[0] == "in" else (f"-{words[0]}", words[1])
    return _span(int(amount), period.removesuffix("s"), locale)


def _draw_list(rng: np.random.Generator) -> str:
    return " + ".join(rng.choice(NAMES, size=int(rng.integers(2, 4)), replace=False))


def _make(name, value, items=(), draw=None) -> Function:
    """A function whose values have only plain spaces and no direction marks."""
    plain = lambda text: " ".join(text.translate({0x200E: None, 0x200F: None}).split())
    return Function(name, lambda item, locale: plain(value(item, locale)), tuple(items), draw)


_decimal, _day_of = decimal.Decimal, datetime.date.fromisoformat
_ALL = (
    _make("month", lambda item, of: _names("months", of)[MONTHS.index(item) + 1], MONTHS),
    _make("weekday", lambda item, of: _names("days", of)[WEEKDAYS.index(item)], WEEKDAYS),
    _make("country", *_display_name("territories")),
    _make("language", *_display_name("languages")),
    _make(
        "number",
        lambda item, of: numbers.format_decimal(_decimal(item), locale=of),
        draw=_draw_number,
    ),
    _make(
        "percent",
        lambda item, of: numbers.format_percent(_decimal(item[:-1]) / 100, locale=of),
        draw=lambda rng: f"{rng.integers(1, 10 ** int(rng.integers(1, 4)))}%",
    ),
    _make("currency", _currency, draw=_draw_currency),
    _make(
        "date",
        lambda item, of: dates.format_date(_day_of(item), "short", locale=of),
        draw=_draw_date,
    ),
    _make("day", _day, draw=lambda rng: f"{MONTHS[rng.integers(12)]} {rng.integers(1, 29)}"),
    _make("unit", _unit, draw=_draw_unit),
    _make("relative", _relative, draw=_draw_relative),
    _make(
        "list", lambda item, of: lists.format_list(item.split(" + "), locale=of), draw=_draw_list
    ),
)
FUNCTIONS = {function.name: function for function in _ALL}

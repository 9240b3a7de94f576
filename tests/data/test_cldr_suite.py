import hashlib
import unicodedata

from babel import localedata
import numpy as np
import pytest

from moe_peft.data.cldr import corpus, functions, suite, templates


def test_groups_are_disjoint_and_complete():
    groups = {name: set(suite.tasks(name)) for name in ("train", "heldout", "fewshot", "new")}
    assert {name: len(tasks) for name, tasks in groups.items()} == {
        "train": 249,
        "heldout": 63,
        "fewshot": 48,
        "new": 35,
    }
    assert len(set.union(*groups.values())) == 395
    assert not {t.locale for t in groups["fewshot"]} & {t.locale for t in groups["train"]}


def test_held_out_combinations_have_trained_parts():
    train, heldout = suite.tasks("train"), suite.tasks("heldout")
    assert len(heldout) == 63
    for task in heldout:
        assert any(other.function == task.function for other in train)
        assert sum(other.locale == task.locale for other in train) >= 9


def test_splits_of_a_task_are_disjoint_and_cover_the_pool():
    looked_at = (*suite.tasks("train")[::17], *suite.tasks("fewshot")[::7])
    assert len(looked_at) == 22
    for task in looked_at:
        splits = suite.split_items(task)
        pool = functions.FUNCTIONS[task.function].pool()
        assert not set(splits["train"]) & set(splits["validation"])
        assert set(splits["train"]) | set(splits["validation"]) == set(pool)
        assert len(splits["validation"]) == max(2, round(len(pool) / 5))
    assert [list(suite.split_items(task)) for task in suite.tasks("heldout")] == [
        ["validation"]
    ] * 63


def test_splits_differ_between_locales():
    german, french = (
        set(suite.split_items(suite.Task("date", locale))["validation"]) for locale in ("de", "fr")
    )
    assert german != french


def test_the_suite_is_locked():
    """Changes when an item, a value, a wording or a split does: then numbers are not comparable."""
    digest = hashlib.sha256()
    for group in ("train", "heldout", "fewshot"):
        for task in suite.tasks(group):
            for split in ("train", "validation"):
                for example in suite.examples(task, split):
                    line = "|".join(
                        (task.name, split, example.item, example.inputs, example.targets)
                    )
                    digest.update(line.encode())
    assert digest.hexdigest()[:16] == "98b75a40f71a79c4"


def test_new_locales_are_neither_trained_nor_read():
    tasks = suite.tasks("new")
    assert not {task.locale for task in tasks} & set(suite.LOCALES)
    assert dict(corpus._LOCALES) == suite.LOCALES
    digest = hashlib.sha256()
    for task in tasks:
        items = suite.split_items(task)
        assert (len(items["train"]), len(items["validation"])) == (48, 12)
        for split in items:
            for example in suite.examples(task, split):
                assert len(example.inputs.encode()) <= 55
                assert len(example.targets.encode()) <= 27
                line = "|".join((task.name, split, example.item, example.inputs, example.targets))
                digest.update(line.encode())
    assert digest.hexdigest()[:16] == "218fec8961900289"


def test_values_are_those_of_cldr():
    expected = {
        ("month", "März"): ("March", "de"),
        ("month", "březen"): ("March", "cs"),
        ("month", "marec"): ("March", "sl"),
        ("weekday", "Cuma"): ("Friday", "tr"),
        ("weekday", "sobota"): ("Saturday", "pl"),
        ("country", "Deutschland"): ("Germany", "de"),
        ("language", "svenska"): ("Swedish", "sv"),
        ("number", "1.234,5"): ("1234.5", "it"),
        ("percent", "%45"): ("45%", "tr"),
        ("currency", "1 234,00 €"): ("EUR 1234", "fr"),
        ("date", "31.12.99"): ("1999-12-31", "de"),
        ("day", "5. března"): ("March 5", "cs"),
        ("unit", "2 kilogramy"): ("2 kilograms", "pl"),
        ("unit", "5 kilogramów"): ("5 kilograms", "pl"),
        ("unit", "1 minuut"): ("1 minute", "nl"),
        ("relative", "in 3 Tagen"): ("in 3 days", "de"),
        ("relative", "hace 1 semana"): ("1 week ago", "es"),
        ("list", "Ana, Ben und Eva"): ("Ana + Ben + Eva", "de"),
    }
    for (function, value), (item, locale) in expected.items():
        assert functions.FUNCTIONS[function].value(item, locale) == value
    assert len({function for function, _ in expected}) == len(functions.FUNCTIONS)


def test_names_do_not_leak_between_locales():
    """babel resolves some names inside a table shared by all locales."""
    months = functions.FUNCTIONS["month"]
    assert months.value("July", "tr") == "Temmuz"
    assert months.value("July", "hr") == "srpanj"
    assert months.value("July", "tr") == "Temmuz"


def test_texts_are_short_and_plain():
    seen = 0
    for task in suite.tasks("train")[::5]:
        for example in suite.examples(task, "validation"):
            seen += 1
            assert len(example.inputs.encode()) <= 55
            assert len(example.targets.encode()) <= 27
            assert not any(
                unicodedata.category(character) in ("Zs", "Cf") and character != " "
                for character in example.inputs + example.targets
            )
    assert seen == 1752


def test_there_are_twelve_functions():
    assert len(functions.FUNCTIONS) == 12


@pytest.mark.parametrize("function", functions.FUNCTIONS)
def test_templates_name_item_and_locale_and_differ(function):
    texts = [
        templates.render(function, index, item="ITEM", language="LANGUAGE", code="CODE")
        for index in range(templates.NUM_TEMPLATES)
    ]
    assert len(set(texts)) == templates.NUM_TEMPLATES == len(templates.TEMPLATES[function])
    for text in texts:
        assert "ITEM" in text
        assert ("LANGUAGE" in text) != ("CODE" in text)


def test_answer_choices_hold_the_answer():
    task = suite.Task("weekday", "fi")
    choices = suite.answer_choices(task)
    assert len(choices) == 7
    examples = suite.examples(task, "train")
    assert len(examples) == 5 * templates.NUM_TEMPLATES
    assert all(example.targets in choices for example in examples)
    assert suite.answer_choices(suite.Task("number", "fi")) == ()


def test_pools_are_the_same_every_time():
    assert functions.FUNCTIONS["date"].pool() == functions.FUNCTIONS["date"].pool()
    assert len(set(functions.FUNCTIONS["list"].pool())) == functions.POOL_SIZE


def test_denoising_can_be_undone():
    rng = np.random.default_rng(3)
    kinds = set()
    for _ in range(300):
        fields = corpus.line_fields(rng)
        row = corpus.denoise(fields, rng)
        kinds.add(row.kind)
        assert corpus.restore(row) == "".join(text for _, text in fields)
        assert row.targets
    assert kinds == {"span", "prefix"}


def test_denoising_rows_follow_the_seed():
    first, again, other = (list(corpus.rows(seed, 20)) for seed in (4, 4, 5))
    assert first == again
    assert first != other


def test_pre_training_text_holds_facts_but_no_instruction():
    rows = list(corpus.rows(0, 4000))
    lines = [corpus.restore(row) for row in rows]
    heldout = {(task.function, task.locale) for task in suite.tasks("heldout")}
    seen = {
        (function, locale)
        for line in lines
        for function, locale in heldout
        if set(line.split()[:2]) == {function, locale}
    }
    assert len(seen) > 40
    # Wordings begin or end in words that no line has.
    assert len(templates.TEMPLATES) == 12
    for function, wordings in templates.TEMPLATES.items():
        assert len(wordings) == templates.NUM_TEMPLATES
        for wording in wordings:
            filled = wording.format(item="\n", language="\n", code="\n")
            pieces = [piece for piece in filled.split("\n") if len(piece) > 4]
            assert pieces, function
            assert not any(all(piece in line for piece in pieces) for line in lines)


def test_sentinels_are_bytes_that_text_never_has():
    assert corpus.encode("é" + corpus.SENTINELS[1]) == "é".encode() + bytes([0xF9])


def test_values_do_not_depend_on_the_order_of_locales():
    """babel keeps what it resolves in tables that locales share."""

    def values(locales):
        localedata._cache.clear()
        functions._names.cache_clear()
        functions._display.cache_clear()
        return {
            (name, locale, item): function.value(item, locale)
            for locale in locales
            for name, function in functions.FUNCTIONS.items()
            for item in function.pool()[:12]
        }

    forwards = values(list(suite.LOCALES))
    assert values(list(suite.LOCALES)[::-1]) == forwards
    for locale in ("pl", "hr", "az", "sq"):
        assert values([locale]).items() <= forwards.items()

"""What is known of P3 and of T0's mixtures, number by number.

From T0's table of data sets, promptsource 0.1.0 and P3's published sizes.
"""

import collections
import json
import re

import pytest

from moe_peft.data import fewshot
from moe_peft.data.p3 import names

TABLE = names.official()
T0 = TABLE.mixture("t0")
HELD_OUT = {found.name: found for found in TABLE.held_out}


def subsets(condition):
    return {(d.name, d.subset) for d in TABLE.training if condition(d)}


def test_sizes_of_the_mixtures():
    sizes = {name: TABLE.mixture(name) for name in names.MIXTURES}
    assert [len(found) for found in sizes.values()] == [38, 48, 54]
    assert [sum(len(d.templates) for d in found) for found in sizes.values()] == [313, 392, 464]
    added = [sum(len(d.templates) for d in TABLE.training if d.mixture == m) for m in sizes]
    assert added == [313, 79, 72]
    assert sizes["t0++"][:38] == T0  # so ids of data sets do not depend on the mixture
    assert subsets(lambda d: d.mixture == "t0++") == {
        ("super_glue", name) for name in ("wsc.fixed", "record", "boolq", "copa", "multirc", "wic")
    }
    assert ("hellaswag", None) in subsets(lambda d: d.mixture == "t0+")
    assert len({d.name for d in T0}) == 34  # some have several subsets


def test_kinds_of_templates():
    letters = collections.Counter("".join(d.published.choices for d in T0))
    assert letters["f"] + letters["p"] == 164
    assert sum(letters.values()) == 313
    assert sum(sum(d.original) for d in T0) == 222
    none = {(d.name, d.subset) for d in T0 if not any(d.original)}
    assert none == {("quarel", None), ("kilt_tasks", "hotpotqa"), ("app_reviews", None)}
    assert len(T0) - len(none) == 35  # T0's mixture with one prompt
    for d in TABLE.training:
        assert len(d.published.choices) == len(d.original) == len(d.templates)
        assert list(d.templates) == sorted(d.templates)
        assert set(d.published.choices) <= set("fp-")


def test_rates_of_t0_and_mov():
    assert names.MAX_EXAMPLES == 500_000
    capped = {(d.name, d.subset): d.cap("t0") for d in T0 if d.train_size > names.MAX_EXAMPLES}
    assert capped == {
        ("amazon_polarity", None): 55_555,
        ("gigaword", None): 55_555,
        ("yelp_review_full", None): 71_428,
        ("wiki_bio", None): 100_000,
        ("dbpedia_14", None): 125_000,
    }
    assert all(d.cap("t0") == d.train_size for d in T0 if (d.name, d.subset) not in capped)
    assert sum(d.cap("t0") * len(d.templates) for d in T0) == 17_277_798


def test_caps_of_t_few_and_mhr():
    further = {
        (d.name, d.subset): d.cap("t_few")
        for d in T0
        if d.cap("t_few") < d.train_size and d.cap("t0") == d.train_size
    }
    assert further == {
        ("glue", "qqp"): 83_333,
        ("paws", "labeled_final"): 41_666,
        ("duorc", "SelfRC"): 55_555,
        ("duorc", "ParaphraseRC"): 55_555,
        ("app_reviews", None): 125_000,
        ("common_gen", None): 55_555,
        ("cnn_dailymail", "3.0.0"): 55_555,
        ("xsum", None): 50_000,
        ("ag_news", None): 71_428,
    }
    assert all(d.cap("t_few") == d.cap("t0") for d in T0 if d.train_size > names.MAX_EXAMPLES)
    assert sum(d.cap("t_few") * len(d.templates) for d in T0) == 10_606_443


def dataset(name, subset=None):
    (found,) = [d for d in TABLE.training if (d.name, d.subset) == (name, subset)]
    return found


def test_templates_that_apply_to_few_rows():
    rows = lambda d, template, split="train": d.published.rows_of(template, split)
    trec = dataset("trec")
    fewer = [rows(trec, template) for template in trec.templates if rows(trec, template) != 5452]
    assert sorted(fewer)[:3] == [86, 86, 835]
    assert sorted(fewer)[2:] == [835, 835, 896, 896, 1162, 1162, 1223, 1223, 1250]
    assert {rows(trec, t) for t in trec.templates if "ABBR" in t} == {86}
    wiki_qa = dataset("wiki_qa")
    assert [rows(wiki_qa, t) for t in wiki_qa.templates].count(1040) == 6
    mrpc = dataset("glue", "mrpc")
    assert {rows(mrpc, t) for t in mrpc.templates if t.startswith("generate_")} == {2474}
    assert rows(dataset("paws", "labeled_final"), "paraphrase-task") == 21_829
    for subset, size in (("SelfRC", 60_721), ("ParaphraseRC", 69_524)):
        duorc = dataset("duorc", subset)
        assert sum(rows(duorc, t) < size for t in duorc.templates) == 2
    wiki_bio = dataset("wiki_bio")
    assert (wiki_bio.train_size, wiki_bio.published.rows["train"]) == (582_659, 582_639)
    # Everywhere else the table's size is that of P3's records.
    differing = {
        (d.name, d.subset) for d in TABLE.training if d.published.rows["train"] != d.train_size
    }
    assert differing == {("wiki_bio", None)}
    copa = dataset("super_glue", "copa")
    ellipsis = [t for t in copa.templates if t.startswith("…")]
    assert [rows(copa, t) for t in ellipsis] == [202, 202, 198, 198]


def test_splits():
    splits = {(d.name, d.subset): set(d.published.rows) for d in TABLE.training}
    assert splits["wiki_bio", None] == {"train", "val", "test"}
    assert splits["imdb", None] == {"train", "test", "unsupervised"}
    assert splits["quail", None] == {"train", "validation", "challenge"}
    assert splits["app_reviews", None] == {"train"}
    for name in ("amazon_polarity", "yelp_review_full", "imdb", "ag_news", "dbpedia_14", "trec"):
        assert "validation" not in splits[name, None]
    assert all("train" in found for found in splits.values())
    # Splits that are published empty: adversarial_qa's test split, but for one template each.
    for subset in ("dbert", "dbidaf", "droberta"):
        found = dataset("adversarial_qa", subset)
        sizes = {t: found.published.rows_of(t, "test") for t in found.templates}
        assert [t for t, size in sizes.items() if size] == ["generate_question"]


def test_names_are_composed_and_cleaned():
    compose = lambda name, subset, template: re.sub(
        r"[^\w\d._]+", "_", f"{name}_{subset}_{template}" if subset else f"{name}_{template}"
    )
    found = [
        (task, compose(d.name, d.subset, template))
        for d in TABLE.training
        for task, template in zip(d.tasks, d.templates)
    ]
    assert all(task == composed for task, composed in found)
    assert len(dict(found)) == 464
    anli = HELD_OUT["anli_r3"]
    assert anli.tasks[anli.templates.index("can we infer")] == "anli_can_we_infer_r3_score_eval"
    assert all(task.endswith("_score_eval") for h in TABLE.held_out for task in h.tasks)


def test_no_excluded_name_is_a_task():
    starts = ("hotpot_qa_", "tab_fact_", "wiki_hop_masked_", "narrativeqa_", "ecthr_cases_")
    assert not [task for task in TABLE.prompts if task.startswith(starts)]


@pytest.mark.parametrize(
    ("name", "templates", "choices", "validation", "test"),
    [
        ("anli_r1", 15, 3, 1000, 1000),
        ("anli_r2", 15, 3, 1000, 1000),
        ("anli_r3", 15, 3, 1200, 1200),
        ("cb", 15, 3, 56, 250),
        ("rte", 10, 2, 277, 3000),
        ("wsc", 10, 2, 104, 146),
        ("wic", 10, 2, 638, 1400),
        ("copa", 12, 2, 100, 500),
        ("winogrande", 5, 2, 1267, 1767),
        ("hellaswag", 4, 4, 10_042, 10_003),
        ("storycloze", 5, 2, 1871, 1871),
    ],
)
def test_held_out_set(name, templates, choices, validation, test):
    found = HELD_OUT[name]
    assert len(found.templates) == len(found.tasks) == len(found.published.choices) == templates
    assert found.published.num_choices == choices
    assert (found.published.rows["validation"], found.published.rows["test"]) == (validation, test)
    assert list(found.templates) == sorted(found.templates)
    is_public = name.startswith("anli") or name == "storycloze"
    assert found.published.hidden == (() if is_public else ("test",))
    fixed = {
        "copa": "p" * 12,
        "winogrande": "p" * 5,
        "storycloze": "p" * 5,
        "hellaswag": "pppf",  # one lists the endings by number
    }
    assert found.published.choices == fixed.get(name, "f" * templates)


def test_held_out_sets_together():
    published = [h for h in TABLE.held_out if h.name not in names.NOT_PUBLISHED]
    assert len(TABLE.held_out) == 11
    assert sum(len(h.tasks) for h in TABLE.held_out) == 116
    assert sum(len(h.tasks) for h in published) == 111
    # P3 has 660 folders: ordinary ones of the training templates and of five held-out sets, and of
    # Winogrande's second version, which nobody reports; and as many ranked ones of it.
    counts = {h.name: len(h.tasks) for h in published}
    ordinary = 464 + counts["winogrande"] + counts["cb"] + counts["rte"] + 3 * 15 + 5
    assert (ordinary, ordinary + 111 + 5) == (544, 660)
    # Pools that few-shot examples are drawn from.
    pools = {h.name: h.published.rows.get("train") for h in published}
    assert pools == {
        "anli_r1": 16_946,
        "anli_r2": 45_460,
        "anli_r3": 100_459,
        "cb": 250,
        "rte": 2490,
        "wsc": 554,
        "wic": 5428,
        "copa": 400,
        "winogrande": 40_398,
        "hellaswag": 39_905,
    }


def test_templates_that_are_left_out():
    assert "True or False" not in HELD_OUT["winogrande"].templates
    assert "Generate Ending" not in HELD_OUT["storycloze"].templates
    trained = dataset("hellaswag")
    original = {t for t, is_own in zip(trained.templates, trained.original) if is_own}
    assert set(HELD_OUT["hellaswag"].templates) == original
    assert len(trained.templates) - len(original) == 7
    for name, subset in (("wsc", "wsc.fixed"), ("wic", "wic"), ("copa", "copa")):
        assert HELD_OUT[name].templates == dataset("super_glue", subset).templates


def test_copas_templates_for_causes_or_effects_come_last():
    copa = HELD_OUT["copa"]
    sizes = [copa.published.rows_of(template, "validation") for template in copa.templates]
    assert sizes == [100] * 8 + [48, 48, 52, 52]


def test_what_the_mixtures_train_on_is_not_held_out_from_them():
    held_out = {h.source[:2] for h in TABLE.held_out}
    of = lambda mixture: {(d.name, d.subset) for d in TABLE.mixture(mixture)} & held_out
    assert of("t0") == set()
    assert of("t0+") == {("hellaswag", None)}
    assert of("t0++") == {("hellaswag", None)} | {
        ("super_glue", name) for name in ("wsc.fixed", "copa", "wic")
    }


def test_prompts():
    assert len(TABLE.prompts) == 464 + 116
    prompt = TABLE.prompts["anli_can_we_infer_r2_score_eval"]
    assert prompt.of.source == ("anli", None, "r2")
    assert (prompt.template, prompt.choices, prompt.is_ranked) == ("can we infer", "f", True)
    assert prompt.rows("validation") == 1000
    prompt = TABLE.prompts["trec_fine_grained_ABBR"]
    assert (prompt.choices, prompt.is_ranked, prompt.rows("train")) == ("f", False, 86)
    assert all(task == prompt.task for task, prompt in TABLE.prompts.items())


@pytest.mark.parametrize(
    ("task", "splits"),
    [
        ("super_glue_rte_can_we_infer_score_eval", {"train", "validation"}),
        ("anli_can_we_infer_r1_score_eval", {"train", "validation", "test"}),
        ("story_cloze_2016_Choose_Story_Ending_score_eval", {"validation", "test"}),
        ("wiki_bio_who", {"train", "val", "test"}),
        ("adversarial_qa_dbert_based_on", {"train", "validation"}),
        ("adversarial_qa_dbert_generate_question", {"train", "validation", "test"}),
        ("kilt_tasks_hotpotqa_final_exam", {"train", "validation"}),
    ],
)
def test_splits_with_answers(task, splits):
    prompt = TABLE.prompts[task]
    every = ("train", "validation", "val", "test", "challenge", "unsupervised")
    assert {split for split in every if prompt.has_answers(split)} == splits


def test_a_table_without_numbers(tmp_path):
    line = {"name": "x", "subset": None, "templates": ["a"]}
    table = {"training": [line | {"mixture": "t0", "train_size": 3}], "held_out": []}
    (tmp_path / names.TABLE_FILE).write_text(json.dumps(table))
    (prompt,) = names.of_folder(tmp_path).prompts.values()
    assert (prompt.choices, prompt.rows("train")) == ("", None)
    assert prompt.has_answers("train")


@pytest.mark.parametrize(
    ("name", "shots", "rows", "first", "last"),
    [
        ("anli_r1", 50, 16_946, (5333, 2661, 2185), (7048, 7127, 2525)),
        ("anli_r2", 50, 45_460, (9571, 27489, 8942), (24324, 9446, 15649)),
        ("anli_r3", 50, 100_459, (52226, 94747, 62387), (2997, 87773, 3858)),
        ("hellaswag", 20, 39_905, (21485, 18801, 15235), (10508, 25026, 24392)),
        ("winogrande", 50, 40_398, (13299, 8457, 39915), (37173, 26441, 17917)),
        ("storycloze", 70, 1871, (1702, 356, 1579), (1290, 1597, 1688)),
        ("rte", 32, 2490, (1057, 907, 2325), (1616, 2425, 2326)),
        ("cb", 32, 250, (142, 202, 225), (33, 222, 76)),
        ("copa", 32, 400, (209, 114, 132), (193, 11, 303)),
        ("wic", 32, 5428, (79, 4909, 2708), (3787, 3628, 1516)),
        ("wsc", 32, 554, (83, 159, 85), (512, 258, 247)),
    ],
)
def test_shots_of_t_few(name, shots, rows, first, last):
    """Row numbers in T-Few's files of few-shot examples: the first and the last of each seed."""
    known = HELD_OUT[name].published.rows
    assert known["validation" if name == "storycloze" else "train"] == rows
    found = [fewshot.draw(name, rows, fewshot.Sizes(shots), seed).shots for seed in (42, 1024, 0)]
    assert all(len(chosen) == shots for chosen in found)
    assert tuple(chosen[0, 0] for chosen in found) == first
    assert tuple(chosen[-1, 0] for chosen in found) == last

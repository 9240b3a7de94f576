"""The mixtures as they are called from outside, with the official table of data sets."""

import json

import gin
import numpy as np
import pytest
import seqio

from moe_peft.data import row_store, rows, vocabularies
from moe_peft.tasks import p3


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """P3's folder without any file: the official table holds."""
    (tmp_path / "data" / "p3").mkdir(parents=True)
    monkeypatch.setenv("MOE_PEFT_CACHE", str(tmp_path / "cache"))
    gin.clear_config()
    gin.bind_parameter("places.configured.folder", str(tmp_path / "data"))
    gin.bind_parameter("vocabularies.configured.vocabulary", "bytes")
    yield tmp_path / "data" / "p3"
    gin.clear_config()


def sizes(name):
    return len(seqio.MixtureRegistry.get(name).tasks)


def test_official_mixtures():
    assert [sizes(name) for name in ("p3_t0", "p3_t0p", "p3_t0pp")] == [313, 392, 464]
    assert (sizes("p3_heldout"), sizes("p3_heldout_published")) == (11, 10)
    mixture = seqio.MixtureRegistry.get("p3_t0")
    assert mixture.total_rate == 17_277_798
    # What a sampler uses are ratios; they know nothing of how many rows a template applies to.
    rate = lambda task: mixture.get_rate(seqio.TaskRegistry.get(f"p3_{task}"))
    assert rate("trec_fine_grained_ABBR") == rate("trec_trec1") == 5452
    assert rate("gigaword_TLDR") / rate("wiki_bio_who") == 0.55555


def test_official_mixture_by_the_rule_of_t_few(monkeypatch):
    gin.bind_parameter("p3.configured.cap_rule", "t_few")
    gin.bind_parameter("p3.configured.validation_examples", 0)

    def stored(task, split, limit):
        count = min(limit, p3._table().prompts[task].rows(split))
        empty = rows.Ragged(np.zeros(0, np.int32), np.broadcast_to(np.int64(0), count))
        return row_store.Stored(empty, empty, ())

    monkeypatch.setattr(p3, "_stored", stored)
    fewer = sum(
        max(d.cap("t_few") - d.published.rows_of(template, "train"), 0)
        for d in p3.names.official().mixture("t0")
        for template in d.templates
    )
    assert seqio.MixtureRegistry.get("p3_t0").total_rate == 10_606_443 - fewer
    assert fewer == 188_463


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        ("p3_anli_r2", ("train", "validation", "test", "t_few")),
        ("p3_hellaswag", ("validation", "t_few")),
    ],
)
def test_splits_of_official_sets_from_raw_rows(folder, name, splits):
    source = p3._held_out(name.removeprefix("p3_"))[0].source
    place = folder / "raw" / source[0]
    place.mkdir(parents=True)
    for split in ("train_r2", "dev_r2", "test_r2") if source[2] else ("validation",):
        (place / f"{split}.jsonl").write_text('{"text": "' + split + '", "label": 1}\n')
    path = folder / "templates" / source[0] / "templates.yaml"
    path.parent.mkdir(parents=True)
    choices = " ||| ".join("abcd"[: 3 if source[2] else 4])
    wordings = p3._held_out(name.removeprefix("p3_"))[0].templates
    path.write_text(
        "templates:\n"
        + "".join(
            f"  {i}: !Template\n    name: {json.dumps(wording)}\n    answer_choices: {choices}\n"
            f"    jinja: '{{{{text}}}} {i} ||| {{{{answer_choices[label]}}}}'\n"
            for i, wording in enumerate(wordings)
        )
    )
    task = seqio.TaskRegistry.get(name)
    assert set(task.splits) == set(splits)
    found = task.source.rows("t_few")
    vocabulary = vocabularies.get()
    texts = [vocabulary.decode(found.inputs[i].tolist()) for i in range(len(found))]
    split = "test_r2" if source[2] else "validation"
    assert texts == [f"{split} {i}" for i in range(len(wordings))]
    assert set(found.answer_choices) == {tuple(choices.split(" ||| "))}

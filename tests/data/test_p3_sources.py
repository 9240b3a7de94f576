"""Raw data sets in every form, and what templates make of them beside the published records."""

import csv
import json
import shutil

import numpy as np
import pytest
import raw_samples

from moe_peft import errors
from moe_peft.data import bad_rows, samples
from moe_peft.data.p3 import names, raw, sources, storycloze, templates


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    place = tmp_path_factory.mktemp("p3") / "p3"
    samples.write(place.parent)
    return place


@pytest.fixture
def folder(whole, tmp_path):
    """P3's samples without the records, to be damaged."""
    for name in ("raw", "templates", names.TABLE_FILE):
        copy = shutil.copytree if (whole / name).is_dir() else shutil.copy
        copy(whole / name, tmp_path / name)
    return tmp_path


def prompt_of(folder, start):
    prompts = names.of_folder(folder).prompts
    return next(prompt for task, prompt in prompts.items() if task.startswith(start))


def texts(found):
    return [(record.inputs, record.targets, record.answer_choices) for record in found]


def test_rendered_rows_are_the_published_ones(whole):
    compared = 0
    for prompt in names.of_folder(whole).prompts.values():
        if prompt.of.name == "storycloze":
            continue
        published = sources.find(whole, prompt, "published")
        rendered = sources.find(whole, prompt, "raw")
        assert set(published.splits()) == set(rendered.splits()) == {"train", "validation"}
        for split in published.splits():
            found = texts(published.read(split))
            assert texts(rendered.read(split)) == found
            assert found
            assert not prompt.is_ranked or len(found[0][2]) == samples.CHOICES
            compared += len(found)
    assert compared == 536


def test_which_source(whole, folder):
    prompt, story = prompt_of(whole, "cldr_month"), prompt_of(whole, "story_cloze")
    kinds = lambda place, prompt, *wanted: type(sources.find(place, prompt, *wanted))
    assert kinds(whole, prompt, "either") is sources.Published
    assert kinds(whole, prompt, "raw") is sources.Rendered
    assert kinds(whole, story, "either") is sources.Rendered
    assert kinds(folder, prompt, "either") is sources.Rendered
    with pytest.raises(errors.UserError, match="has no folder in"):
        sources.find(whole, story, "published")
    elsewhere = (folder / "raw", folder / "templates")
    assert type(sources.find(whole / "data", prompt, "either", *elsewhere)) is sources.Rendered
    with pytest.raises(errors.UserError, match=r"There is no folder .*p3.configured.templates"):
        sources.find(folder, prompt, "raw", template_root=folder / "no")
    with pytest.raises(errors.UserError, match=r"There is no folder .*p3.configured.raw"):
        sources.find(folder, prompt, "raw", raw_root=folder / "no")
    shutil.rmtree(folder / "raw")
    with pytest.raises(errors.UserError, match="no folder in .*, and cannot be worded: There is"):
        sources.find(folder, prompt, "either")
    shutil.rmtree(folder / "templates")
    with pytest.raises(
        errors.UserError, match="no folder in .*, and .*There is no folder .*/typo;"
    ):
        sources.find(folder, prompt, "either", template_root=folder / "typo")
    with pytest.raises(errors.UserError, match="has no folder in"):
        sources.find(folder, prompt, "either")


def test_splits_without_answers_are_none(whole):
    content = json.loads((whole / names.TABLE_FILE).read_text())
    for line in (content["training"][0], content["held_out"][0], content["held_out"][-1]):
        line |= {"rows": {"train": 5, "validation": 4, "test": 3}, "hidden": ["validation"]}
    table = names._table(content)
    for prompt in table.prompts.values():
        if prompt.of not in (table.training[0], table.held_out[0], table.held_out[-1]):
            continue
        for wanted in ("either", "raw"):
            source = sources.find(whole, prompt, wanted)
            story = prompt.of.name == "storycloze"
            assert source.splits() == (("test",) if story else ("train",))
            assert source.files("validation") == []
            assert source.files(source.splits()[0])


def test_a_changed_template_is_another_source(folder):
    prompt = prompt_of(folder, "cldr_month")
    before = sources.find(folder, prompt, "raw").key
    path = templates.path_of(folder / "templates", *prompt.of.source[:2])
    path.write_text(path.read_text().replace("Name the", "Say the"))
    assert sources.find(folder, prompt, "raw").key != before


def edit(folder, prompt, old, new):
    path = templates.path_of(folder / "templates", *prompt.of.source[:2])
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "answer_choices: '",
            "comment: '",
            "'plain story' has no 'answer_choices', which story_cl",
        ),
        (
            "name: plain story",
            "name: plane story",
            "no .*'plain story'.*Did you mean 'plane story'",
        ),
        ("{{ input_sentence_1 }}", "{{ input_sentence_1 }", "template 'plain story' is not Jinja"),
        ("name: plain story", "name: story with a question", "two .* 'story with a question'"),
    ],
)
def test_bad_templates(folder, old, new, message):
    prompt = prompt_of(folder, "story")
    edit(folder, prompt, old, new)
    with pytest.raises(errors.UserError, match=message) as found:
        sources.find(folder, prompt, "raw")
    assert templates.FILE in str(found.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "{{ input_sentence_1 }}",
            "{{ one }}",
            "cannot be rendered .*'one' is undefined.*story_id",
        ),
        (
            "ending - 1]",
            "ending + 1]",
            "gives a target that is not one of its choices: '<NO LABEL>'",
        ),
        ("}} ||| {{", "}} ||| no ||| {{", "gives other than 2 choices"),
        ("{{ input_sentence_1 }}", "||| {{ input_sentence_1 }}", "applies to no row of .*'test'"),
    ],
)
def test_rows_that_cannot_be_worded(folder, old, new, message):
    prompt = prompt_of(folder, "story")
    edit(folder, prompt, old, new)
    source = sources.find(folder, prompt, "raw")
    with pytest.raises(errors.UserError, match=f"'plain story' {message}") as found:
        list(source.read("test"))
    assert "applies" in message or "test__spring2016.csv, row 0: " in str(found.value)
    assert "\n" not in str(found.value)


def test_bad_rows_are_skipped_if_asked(folder):
    prompt = prompt_of(folder, "cldr_month")
    (path,) = sources.find(folder, prompt, "raw").files("train")
    lines = path.read_text().splitlines()
    lines[1], lines[3] = "{", json.dumps({"item": "1"})
    path.write_text("\n".join(lines) + "\n\n")
    source = sources.find(folder, prompt, "raw")
    with pytest.raises(errors.UserError, match=r"train.jsonl, row 1: not JSON"):
        list(source.read("train"))
    with bad_rows.skipping(), bad_rows.counting() as skipped:
        assert len(list(source.read("train"))) == len(lines) - 2
    assert sorted(skipped.values()) == [1, 1]


ROWS = [
    {
        "text": f"zwölf {i}",
        "label": i % 2,
        "answers": {"text": ["a", "b"][: i % 3], "n": [1.5, i]},
        "spans": [[i], [i, 3]],
    }
    for i in range(5)
]


def write_jsonl(place):
    for shard, rows in enumerate((ROWS[:3], ROWS[3:])):
        path = place / f"train-{shard:05d}-of-00002.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(place):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), place / "train-00000-of-00001.parquet")


def write_parquet_of_hub(place):
    write_parquet(place)
    (place / "train").mkdir()
    (place / "train-00000-of-00001.parquet").rename(place / "train" / "0000.parquet")


def write_tfds(place):
    import tensorflow_datasets as tfds

    answers = {
        "text": tfds.features.Sequence(tfds.features.Text()),
        "n": tfds.features.Sequence(np.float32),
    }
    label = tfds.features.ClassLabel(names=["no", "yes"])
    features = tfds.features.FeaturesDict(
        {
            "text": tfds.features.Text(),
            "label": label,
            "answers": answers,
            "spans": tfds.features.Sequence(tfds.features.Sequence(np.int32)),
        }
    )
    path = place / "1.0.0"
    path.mkdir()
    info = tfds.core.DatasetInfo(
        builder=tfds.core.dataset_info.DatasetIdentity(
            "x", tfds.core.Version("1.0.0"), str(path), "x"
        ),
        features=features,
    )
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=3)
    writer.initialize_splits(["train"])
    writer.add_examples({"train": ROWS})
    writer.close_all()
    info.write_to_directory(path)


WRITERS = (write_jsonl, write_parquet, write_parquet_of_hub, write_tfds)


@pytest.mark.parametrize("write", WRITERS)
def test_raw_rows(tmp_path, write):
    place = tmp_path / "x" / "y"
    place.mkdir(parents=True)
    write(place)
    found = raw.folder(tmp_path, "x", "y", None)
    assert dict(found.names) == {"train": "train"}
    assert found.files("train")
    assert found.files("test") == []
    assert [row for _, (_, row) in found.read("train")] == ROWS
    place.rename(tmp_path / "z")
    assert list(raw.folder(tmp_path, "z", None, None).read("train"))


def test_rounds_of_anli(tmp_path):
    for split in ("train_r2", "dev_r2", "test_r2", "dev_r1"):
        (tmp_path / "anli").mkdir(exist_ok=True)
        (tmp_path / "anli" / f"{split}.jsonl").write_text(json.dumps({"split": split}) + "\n")
    found = raw.folder(tmp_path, "anli", None, "r2")
    splits = {split: [row["split"] for _, (_, row) in found.read(split)] for split in found.names}
    assert splits == {"train": ["train_r2"], "validation": ["dev_r2"], "test": ["test_r2"]}
    assert list(raw.folder(tmp_path, "anli", None, "r1").names) == ["validation"]
    (tmp_path / "anli" / "r3").mkdir()
    (tmp_path / "anli" / "r3" / "validation.jsonl").write_text("{}\n")
    assert dict(raw.folder(tmp_path, "anli", None, "r3").names) == {"validation": "validation"}


def test_missing_and_damaged_raw_data(tmp_path):
    write = lambda name, text: (tmp_path / "x" / name).write_text(text)
    (tmp_path / "x").mkdir()
    with pytest.raises(errors.UserError, match="There is no raw data set .*xx.*Did you mean 'x'"):
        raw.folder(tmp_path, "xx", None, None)
    with pytest.raises(errors.UserError, match="x has no rows: expected <split>.jsonl"):
        raw.folder(tmp_path, "x", None, None)
    write("train-00000-of-00002.jsonl", "{}\n")
    with pytest.raises(errors.UserError, match="1 of the 2 files of 'train'"):
        raw.folder(tmp_path, "x", None, None).files("train")
    write("test.jsonl", "{}\n[1]\n")
    with pytest.raises(errors.UserError, match=r"test.jsonl, row 1: not a JSON object: \[1\]"):
        list(raw.folder(tmp_path, "x", None, None).read("test"))
    write("features.json", "{}")
    with pytest.raises(errors.UserError, match="dataset_info.json cannot be used .FileNotFound"):
        raw.folder(tmp_path, "x", None, None)
    write("dataset_info.json", '{"splits": [{"name": "train"}]}')
    with pytest.raises(errors.UserError, match="'train', after 0 rows"):
        list(raw.folder(tmp_path, "x", None, None).read("train"))


def test_storycloze(whole):
    found = raw.folder(whole / "raw", "story_cloze", "2016", None)
    assert dict(found.names) == {"test": "test", "validation": "validation"}
    (path,) = found.files("validation")
    assert path.name == "cloze_test_val__spring2016.csv"
    rows = [row for _, (_, row) in found.read("validation")]
    assert len(rows) == 8
    assert list(rows[0]) == list(storycloze.COLUMNS.values())
    assert rows[0]["input_sentence_1"] == "Ana was wet."
    assert [row["answer_right_ending"] for row in rows] == [1, 2] * 4
    story = prompt_of(whole, "story_cloze_2016_story_with")
    (first, second, *_) = sources.find(whole, story, "either").read("validation")
    assert first.inputs == "Ana was wet. Ana was cold. Ana saw a door. Ana knocked. And?"
    assert (first.targets, first.answer_choices[0]) == ("Ana went in.", "Ana went in.")
    assert (second.targets, second.answer_choices[1]) == ("Ana ate.", "Ana ate.")
    assert raw_samples.STORY_SET["name"] == names.official().held_out[-1].source[0]


@pytest.mark.parametrize(
    ("line", "change", "message"),
    [
        (2, lambda row: row.pop(), "row 1: no 'AnswerRightEnding'"),
        (2, lambda row: row.append("x"), "row 1: more than 8 columns"),
        (
            3,
            lambda row: row.__setitem__(7, "3"),
            "row 2: 'AnswerRightEnding' is neither 1 nor 2: 3",
        ),
        (
            0,
            lambda row: row.__setitem__(1, "first"),
            "no column 'InputSentence1'; expected StoryCl",
        ),
        (4, lambda row: row.__setitem__(1, ""), "row 3: no 'InputSentence1'"),
    ],
)
def test_damaged_storycloze(folder, line, change, message):
    (path,) = storycloze.files(folder / "raw" / "story_cloze" / "2016", "validation")
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    change(rows[line])
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    with pytest.raises(errors.UserError, match=f"{path.name}.*{message}"):
        list(storycloze.read(path))
    shutil.copy(path, path.with_name("cloze_test_val__winter2018.csv"))
    with pytest.raises(errors.UserError, match="2 files cloze_test_val__.*one year's only"):
        storycloze.files(path.parent, "validation")

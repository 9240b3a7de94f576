import json

import pytest

from moe_peft import errors
from moe_peft.data import row_store, samples
from moe_peft.data.superni import files, prompts, sampling

TASK = files.TaskFile(
    "task900_toy",
    "Say it back.",
    (
        files.Demonstration("one", "eins", "it is"),
        files.Demonstration("two!", "zwei", ""),
        files.Demonstration("three", "drei", "x"),
    ),
    (files.Demonstration("four", "fünf", "no, vier."),),
    tuple(files.Instance(f"question {i}", (f"a{i}", f"b{i}")) for i in range(30)),
)
QUESTION = files.Instance(" five ", ("fünf",))


@pytest.fixture
def folder(tmp_path):
    samples.write(tmp_path)
    return tmp_path / "superni"


def write(name, max_inputs=10_000):
    return prompts.write_prompt(name, TASK, QUESTION, lambda text: len(text.split()), max_inputs)


def damage(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_table_has_the_official_counts():
    table = files.table()
    count = lambda name: sum(name in listed.sets for listed in table.values())
    assert [count(name) for name in ("train", "test", "mhr", "poly_s")] == [756, 119, 20, 16]
    tests = [listed for listed in table.values() if "test" in listed.sets]
    assert {"mhr", "poly_s"} <= set().union(*(listed.sets for listed in tests))
    assert all("test" in t.sets for t in table.values() if t.sets & {"mhr", "poly_s"})
    categories = {}
    for listed in tests:
        categories[listed.category] = categories.get(listed.category, 0) + 1
    assert sorted(categories.values()) == [1, 2, 5, 7, 7, 8, 9, 11, 13, 14, 18, 24]
    training = {listed.category for listed in table.values() if "train" in listed.sets}
    assert len(training) == 60
    assert not training & set(categories)
    assert sum(min(100, listed.num_instances) for listed in tests) == 11_810
    assert sum(min(100, t.num_instances) for t in table.values() if "train" in t.sets) == 75_317


def test_prompts_byte_for_byte():
    question = "Now complete the following example -\nInput: five.\n"
    assert write("definition") == (
        "Definition: Say it back.\n\n" + question + "Output: ",
        "",
    )
    assert write("poly_s")[0] == "task900_toy. " + write("definition")[0]
    assert write("mhr") == (
        "Task definition: Say it back.\n" + question + "Output:",
        "\nOutput:",
    )
    shown = (
        " Positive Example 1 -\nInput: one.\n Output: eins.\n\n"
        " Positive Example 2 -\nInput: two!\n Output: zwei.\n\n"
    )
    assert write("pos2")[0] == shown + question + "Output: "
    negative = " Negative Example 1 -\nInput: four.\n Output: fünf.\n\n"
    assert write("definition_pos2_neg2")[0] == (
        "Definition: Say it back.\n\n" + shown + negative + question + "Output: "
    )
    assert " Output: eins.\n Explanation: it is.\n\n" in write("definition_pos2_explanation")[0]


def test_demonstrations_end_at_the_first_that_does_not_fit():
    needed = len(write("definition_pos2")[0].split())
    assert "Example 2" in write("definition_pos2", needed + 1)[0]
    assert "Example 1" in write("definition_pos2", needed)[0]
    assert "Example 2" not in write("definition_pos2", needed)[0]


def test_unknown_prompt():
    with pytest.raises(errors.UserError, match="SuperNI prompt is 'definition_pos'.*Did you mean"):
        write("definition_pos")


def test_splits_of_a_test_task():
    amounts = sampling.Amounts(train=8, validation=6, test=10)
    assert sampling.split(TASK, True, amounts, 13) == {
        "test": TASK.instances[:10],
        "train": TASK.instances[10:],
    }


def test_splits_of_a_training_task():
    amounts = sampling.Amounts(train=8, validation=6)
    found = sampling.split(TASK, False, amounts, 13)
    assert [len(found[name]) for name in ("train", "validation")] == [8, 6]
    assert len({*found["train"], *found["validation"]}) == 14
    assert sampling.split(TASK, False, amounts, 13) == found
    assert sampling.split(TASK, False, amounts, 42)["train"] != found["train"]


def test_splits_of_a_training_task_that_is_short():
    found = sampling.split(TASK, False, sampling.Amounts(), 42)
    assert {name: len(chosen) for name, chosen in found.items()} == {"train": 30}


def test_one_reference_of_each_instance():
    draw = lambda found: row_store.draw_answer(found.outputs, f"t\n{found.input}", 42)
    drawn = [draw(instance) for instance in TASK.instances]
    assert drawn == [draw(instance) for instance in TASK.instances]
    assert {text[0] for text in drawn} == {"a", "b"}


def test_old_form_of_a_file(folder):
    (path, *_) = sorted((folder / "tasks").glob("*.json"))
    new = files.read(folder, path.stem)

    def change(content):
        content["Definition"] = content["Definition"][0]
        for instance in content["Instances"]:
            del instance["id"]

    damage(path, change)
    assert files.read(folder, path.stem) == new
    assert len(new.positive) == 2
    assert len(new.instances) > 20


def remove(name):
    return lambda content: content.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            remove("Definition"),
            r"the whole file: 'Definition' is missing; expected text",
        ),
        (remove("Instances"), r"'Instances' is missing; expected a list"),
        (lambda c: c.update(Definition=[]), r"Definition: 0 is missing; expected text"),
        (lambda c: c.update(Instances={}), r"'Instances' is a dict; expected a list"),
        (lambda c: c["Instances"][1].pop("input"), r"Instances\[1\]: 'input' is missing"),
        (lambda c: c["Instances"][2].update(output=[]), r"Instances\[2\].*at least one text"),
        (lambda c: c["Instances"][0].update(output=[3]), r"Instances\[0\].*at least one text"),
        (lambda c: c["Instances"].insert(0, "x"), r"Instances\[0\]: is a str, expected an object"),
    ],
)
def test_a_damaged_field_is_named(folder, change, message):
    (path, *_) = sorted((folder / "tasks").glob("*.json"))
    damage(path, change)
    with pytest.raises(errors.UserError, match=message) as problem:
        files.read(folder, path.stem)
    assert path.name in str(problem.value)


def test_a_cut_file_and_a_missing_file(folder):
    (path, *_) = sorted((folder / "tasks").glob("*.json"))
    path.write_text(path.read_text()[:500])
    with pytest.raises(errors.UserError, match=r"not JSON \(cut off\?\)"):
        files.read(folder, path.stem)
    with pytest.raises(errors.UserError, match=f"no task file .*Did you mean '{path.stem}'"):
        files.read(folder, path.stem + "x")


def test_bad_split_lists(folder):
    path = folder / "splits" / "default" / "train_tasks.txt"
    path.write_text("a\nb\na\n")
    with pytest.raises(errors.UserError, match=r"train_tasks.txt names 'a' twice"):
        files.split_list(folder, "train")
    path.write_text("\n")
    with pytest.raises(errors.UserError, match="names no task"):
        files.split_list(folder, "train")
    path.unlink()
    with pytest.raises(errors.UserError, match="cannot be read"):
        files.split_list(folder, "train")

import pathlib
import random

import pytest

from moe_peft import errors
from moe_peft.data import bad_rows
from moe_peft.data.p3 import templates

HERE = pathlib.Path("rows.jsonl")


def template(jinja, answer_choices=None):
    return templates.Template(pathlib.Path("x.yaml"), "t", jinja, answer_choices)


def rendered(jinja, row, answer_choices=None, seed="0"):
    return template(jinja, answer_choices).render(row, HERE, 7, seed)


def test_input_target_and_choices():
    row = {"premise": "  It rains. ", "label": 1}
    found = rendered(
        "{{premise}} Wet?\n|||\n{{ answer_choices[label] }} ", row, "Dry ||| Wet|||Who knows"
    )
    assert found == templates.Rendered("It rains.  Wet?", "Wet", ("Dry", "Wet", "Who knows"))
    found = rendered(
        "{{q}} ||| {{answer_choices[0]}}", {"q": "1?", "o": ["a", "b"]}, '{{o|join("|||")}}'
    )
    assert found == templates.Rendered("1?", "a", ("a", "b"))
    assert rendered("{{q}}|||{{ answer_choices }}", {"q": "1?"}).targets == "None"


def test_rows_that_a_template_does_not_apply_to():
    jinja = "{% if label == 1 %}{{text}} ||| yes{% endif %}"
    assert rendered(jinja, {"text": "a", "label": 0}) is None
    assert rendered(jinja, {"text": "a", "label": 1}).targets == "yes"
    assert rendered("{{text}} ||| yes", {"text": " "}) is None
    assert rendered("{{text}} ||| a ||| b", {"text": "x"}) is None
    assert rendered("{{text}} |||", {"text": "x"}).targets == templates.NO_TARGET


def test_separators_of_a_row_are_text():
    found = rendered("{{q}} ||| {{a}}", {"q": "a ||| b", "a": "||||"}, "{{q}} ||| no")
    assert found == templates.Rendered("a ||| b", "||||", ("a ||| b", "no"))
    jinja = "{{ q.split('3ed2dface8203c4c9dfb1a5dc58e41e0') | join(' + ') }} ||| x"
    assert rendered(jinja, {"q": "a ||| b"}).inputs == "a  +  b"  # as templates of multi_news do
    # In lists, promptsource leaves them, and the row drops out.
    assert rendered("{{q[0]}} ||| x", {"q": ["a ||| b"]}) is None


def test_long_values_are_cut_between_words():
    long = "word " * 1000
    found = rendered("{{q}}{{q[:3]}} ||| {{q}}", {"q": long}, "{{q}} ||| no")
    cut = "word " * 408 + "word..."
    assert (found.inputs, found.targets) == (cut + "wor", cut)
    assert found.choices[0] == long.strip()  # answer choices are not cut
    # The cut stands last in the expression: it meets what `else` gives.
    assert (
        len(rendered("{{ q if yes else q }}||| a", {"q": "x" * 3000, "yes": True}).inputs) == 3000
    )
    assert (
        len(rendered("{{ q if yes else q }}||| a", {"q": "x" * 3000, "yes": False}).inputs) == 2048
    )


def test_helpers():
    row = {"a": ["x", "y", "x", "z", "z"], "b": [1, 2, 3], "none": []}
    show = lambda expression: rendered("{{ " + expression + " }} ||| a", row).inputs
    assert show("a | most_frequent") == "['x', 'z']"
    assert show("none | most_frequent") == "None"
    assert show("zip(a, b) | list") == "[('x', 1), ('y', 2), ('x', 3)]"
    assert show("enumerate(b) | list") == "[(0, 1), (1, 2), (2, 3)]"
    assert show("range(b | length) | list") == "[0, 1, 2]"
    assert show("a[0] | highlight") == "<span style='color: #F08080'>x</span>"
    assert show("namespace(n=a[1]).n") == "y"
    jinja = "{% set found = [] %}{% for i in b %}{% set _ = found.append(i) %}{% endfor %}"
    assert rendered(jinja + "{{ found }} ||| a", row).inputs == "[1, 2, 3]"


def test_random_choices_depend_on_the_seed_alone():
    jinja = "{{ a | choice }}{{ a | random }}{{ a | shuffle }} ||| {{ answer_choices[0] }}"
    row = {"a": list("abcdefgh")}
    draw = lambda seed: rendered(jinja, row, "{{ a | choice }} ||| x", seed)
    random.seed(1)
    first = draw("task 3")
    random.seed(2)
    assert draw("task 3") == first
    assert len({draw(f"task {i}") for i in range(20)}) == 20
    assert first.targets == first.choices[0]


def test_what_is_missing():
    with pytest.raises(bad_rows.BadRow) as found:
        rendered("{{premise}} ||| a", {"text": "x", "a-b": 1})
    assert str(found.value) == (
        "rows.jsonl, row 7: x.yaml, template 't' cannot be rendered (UndefinedError: 'premise' is "
        "undefined): the row has text, a_b."
    )
    with pytest.raises(bad_rows.BadRow, match="'q' is undefined"):
        rendered("{% if q %}x{% endif %} ||| a", {})
    assert rendered("x{% if q is defined %}{{q}}{% endif %} ||| {{ q | default('d') }}", {})
    # Items that are not there are empty, and so is what only one way through the template sets.
    assert rendered("x{{ a.text[0] }}{{ a.b }} ||| {{ a.c }}", {"a": {"text": []}}).inputs == "x"
    jinja = "{% if label %}{% set word = 'w' %}{% endif %}x{{ word }} ||| a"
    assert rendered(jinja, {"label": 0}).inputs == "x"
    assert rendered(jinja, {"label": 1}).inputs == "xw"
    assert rendered("{{a_b}} ||| a", {"a-b": 3}).inputs == "3"


@pytest.mark.parametrize(
    ("jinja", "choices", "message"),
    [
        ("{{ q ||| a", None, "template 't' is not Jinja"),
        ("{{ q | lengths }} ||| a", None, "template 't' is not Jinja: No filter named 'lengths'"),
        ("{{ q }}", None, r"template 't': expected 'jinja' with '\|\|\|' in it"),
        (None, None, "template 't': expected 'jinja'"),
        ("q ||| a", "{% if", "template 't' is not Jinja"),
        ("q ||| a", ["x", "y"], "template 't': 'answer_choices' is not a text"),
    ],
)
def test_bad_templates(jinja, choices, message):
    with pytest.raises(errors.UserError, match=f"^x.yaml, {message}") as found:
        template(jinja, choices).check()
    assert "\n" not in str(found.value)


def test_templates_cannot_leave_the_sandbox():
    for jinja in ("{{ ''.__class__.__mro__ }} ||| a", "{% for i in range(9**9) %}{% endfor %}|||a"):
        with pytest.raises(bad_rows.BadRow, match="SecurityError|OverflowError"):
            rendered(jinja, {})


def write(folder, text, name="x/y"):
    path = folder / name / templates.FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


GOOD = """\
dataset: x
subset: y
templates:
  0a: !Template
    answer_choices: Ja ||| Nein
    id: 0a
    jinja: "{{q}} |||\\n{{answer_choices[0]}}"
    metadata: !TemplateMetadata
      choices_in_prompt: false
      metrics:
      - Accuracy
      original_task: true
    name: erste …
    reference: ''
  0b: !Template
    answer_choices: null
    jinja: '{{q}} ||| b'
    name: zweite
"""


def test_reading_a_file(tmp_path):
    path = write(tmp_path, GOOD)
    assert templates.path_of(tmp_path, "x", "y") == path
    found = templates.read(path)
    assert list(found) == ["erste …", "zweite"]
    assert found["erste …"].answer_choices == "Ja ||| Nein"
    assert [t.kind for t in found.values()] == ["f", "-"]
    assert found["zweite"].render({"q": "?"}, HERE, 0, "").inputs == "?"
    assert templates.read(path) is found
    path.write_text(GOOD.replace("zweite", "dritte"), encoding="utf-8")
    assert list(templates.read(path)) == ["erste …", "dritte"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("zweite", "erste …", "has two templates called 'erste …'"),
        ("0b:", "0a:", "'0a' is there twice, line 4"),
        ("    name: zweite\n", "", "the template '0b' has no 'name'"),
        ("templates:", "prompts:", "no mapping 'templates'"),
        ("!Template\n    answer_choices: null", "!!python/object/apply:os.getcwd []\n", "as YAML"),
        ("dataset: x", "dataset: [x", "cannot be read as YAML"),
    ],
)
def test_damaged_files(tmp_path, old, new, message):
    path = write(tmp_path, GOOD.replace(old, new))
    with pytest.raises(errors.UserError, match=message) as found:
        templates.read(path)
    assert str(path) in str(found.value)
    assert "\n" not in str(found.value)


def test_missing_files(tmp_path):
    write(tmp_path, GOOD, "x/y")
    write(tmp_path, GOOD, "z")
    assert templates.path_of(tmp_path, "z", None) == tmp_path / "z" / templates.FILE
    with pytest.raises(errors.UserError, match="There are no templates .*those of 2 .*'x/y'"):
        templates.path_of(tmp_path, "x", "yy")
    with pytest.raises(errors.UserError, match="There is no folder .*expected promptsource's"):
        templates.path_of(tmp_path / "no", "x", "y")

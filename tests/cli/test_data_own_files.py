"""`data show` and `data check` of a user's own files."""

import json
import subprocess
import sys

import gin
import pytest

from moe_peft.cli import main


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working folder, with a file to train on and one to evaluate on."""
    monkeypatch.setenv("MOE_PEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    rows = [{"q": f"question {n}", "targets": ["a", "b"], "task": "xy"[n % 2]} for n in range(6)]
    write(tmp_path / "train.jsonl", *rows)
    write(tmp_path / "dev.jsonl", {"q": "Question 1", "targets": "a", "task": "y"})
    yield tmp_path
    gin.clear_config()


def write(path, *rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def run(capsys, *arguments):
    code = main.main(["data", *arguments])
    return code, capsys.readouterr()


SHOW = ("show", "train.jsonl", "--inputs_column", "q")
CHECK = ("check", "train.jsonl", "--inputs_column", "q")


@pytest.mark.parametrize("how", [("--vocabulary", "bytes"), ("--backbone", "embedded:cldr_tiny")])
def test_show(capsys, how):
    code, printed = run(capsys, *SHOW, *how, "--count", "3", "--json")
    assert code == 0, printed.err
    found = json.loads(printed.out)
    assert len(found) == 3
    assert {each["task_id"] for each in found} <= {0, 1}
    for each in found:
        text = each["inputs"]["text"]
        assert each["inputs"]["ids"] == [*(ord(letter) + 3 for letter in text), 1]
        assert each["references"] == ["a", "b"]
        assert each["task"] == "xy"[int(text.split()[1]) % 2]


def test_show_in_the_file_s_own_order_or_packed(capsys, folder):
    write(folder / "rows" / "train.jsonl", *({"inputs": f"{n}", "targets": "a"} for n in range(4)))
    arguments = ("show", "rows", "--vocabulary", "bytes", "--gin.EVAL_FRACTION=0.0")
    code, printed = run(capsys, *arguments, "--start", "1", "--json")
    assert code == 0, printed.err
    assert [each["inputs"]["text"] for each in json.loads(printed.out)] == ["1", "2", "3"]
    lengths = """--gin.FEATURE_LENGTHS={"inputs": 8, "targets": 8}"""
    _, printed = run(capsys, *arguments, lengths, "--packed", "--json")
    assert len(json.loads(printed.out)["segments"]) == 4


def test_show_says_what_is_missing(capsys):
    code, printed = run(capsys, *SHOW)
    assert (code, printed.out) == (2, "")
    assert "give --backbone or --vocabulary" in printed.err
    code, printed = run(capsys, "show", "trian.jsonl", "--vocabulary", "bytes")
    assert code == 2
    assert "Did you mean 'train.jsonl'" in printed.err
    code, printed = run(capsys, *SHOW, "--backbone", "t5x:checkpoint")
    assert "t5x:checkpoint does not tell its vocabulary; give --vocabulary" in printed.err


def test_check(capsys):
    assert run(capsys, *CHECK)[0] == 0
    code, printed = run(capsys, *CHECK, "--eval_data", "dev.jsonl", "--json")
    found = json.loads(printed.out)
    assert (code, found["failures"]) == (1, 1)
    (leak,) = found["benchmarks"]["dev"]["findings"]
    said = "trained with another answer: line 1 (as train.jsonl line 2)"
    assert (leak["rule"], leak["message"]) == ("leak", said)
    code, printed = run(capsys, *CHECK, "--eval_data", "dev.jsonl", "--ignore", "leak")
    assert code == 0
    assert "(for information)" in printed.out
    assert said in " ".join(printed.out.split())
    assert "nothing to fix" in printed.out


def test_check_of_a_folder_and_of_lengths(capsys, folder):
    write(folder / "rows" / "train.jsonl", {"inputs": "12345", "targets": "b"})
    write(folder / "rows" / "test.jsonl", {"inputs": "12345", "targets": ""})
    lengths = ("--vocabulary", "bytes", "--max_inputs", "5")
    code, printed = run(capsys, "check", "rows", *lengths, "--json")
    found = json.loads(printed.out)
    (own,) = found["benchmarks"].values()
    assert (code, [group["examples"] for group in own["groups"]]) == (1, [1, 0])
    assert [finding["rule"] for finding in own["findings"]] == ["damaged", "long"]
    code, printed = run(capsys, "check", "rows", *lengths)
    assert "1 findings to fix" in printed.out


MISTAKES = {
    "limit": ((*CHECK, "--max_inputs", "9"), "--max_inputs needs --backbone or --vocabulary."),
    "low": ((*CHECK, "--vocabulary", "bytes", "--max_targets", "1"), "--max_targets is 1; expec"),
    "rule": ((*CHECK, "--ignore", "leek"), "Did you mean 'leak'?"),
    "column": (("check", "train.jsonl"), "Name the column with --inputs_column."),
    "missing": (("check", "tran.jsonl"), "Did you mean 'train.jsonl'"),
    "benchmark": ((*CHECK, "--benchmark", "p3"), "--benchmark is for a folder of benchmarks"),
    "flag": (("check", "embedded:samples", "--eval_data", "a"), "--eval_data is for rows of your"),
}


@pytest.mark.parametrize(("arguments", "said"), MISTAKES.values(), ids=MISTAKES)
def test_check_says_what_is_wrong(capsys, arguments, said):
    code, printed = run(capsys, *arguments)
    assert (code, printed.out) == (2, "")
    assert said in printed.err
    assert printed.err.count("\n") == 1


def test_check_needs_no_tensorflow():
    program = (
        "import sys; from moe_peft.cli import main\n"
        "main.main(['data', *sys.argv[1:], '--vocabulary', 'bytes'])\n"
        "print([name for name in ('tensorflow', 'seqio') if name in sys.modules])"
    )
    run = [sys.executable, "-c", program, *CHECK]
    found = subprocess.run(run, capture_output=True, text=True, check=True, env=None)
    assert found.stdout.endswith("\n[]\n")

"""Metrics against independent computation, on the awkward cases."""

import collections
import re
import string
import warnings

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics

from moe_peft import errors
from moe_peft.evaluation import metrics


@pytest.mark.parametrize(
    ("prediction", "references", "strict", "normalized", "label"),
    [
        ("A cat.", ["a  cat"], 0, 1, 0),
        ("the cat", ["cat"], 0, 0, 0),
        (" Yes\n", ["yes"], 0, 1, 1),
        ("yes ", ["no", "yes"], 1, 1, 1),
        ("", [""], 1, 1, 1),
        ("", ["x"], 0, 0, 0),
        ("...", [""], 0, 1, 0),
        ("12:30", ["1230"], 0, 1, 0),
        ("Ärger", ["ärger"], 0, 1, 1),
        ("3 €", ["3 €"], 1, 1, 1),
        ("3\u202f€", ["3 €"], 0, 1, 0),  # a narrow no-break space inside is another character
        ("«да»", ["да"], 0, 0, 0),  # only ASCII punctuation is dropped
        ("٣", ["3"], 0, 0, 0),
        ("x", [], 0, 0, 0),
    ],
)
def test_equalities(prediction, references, strict, normalized, label):
    assert metrics.exact_match(prediction, references) == strict
    assert metrics.exact_match_normalized(prediction, references) == normalized
    assert metrics.accuracy(prediction, references) == label


def lcs_f1(prediction, reference):
    """Rouge-L's F-measure for words that stemming leaves alone."""
    a, b = prediction.lower().split(), reference.lower().split()
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1, j + 1] = (
                table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
            )
    lcs = table[-1, -1]
    return 2 * lcs / (len(a) + len(b)) if lcs else 0.0


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        ("the cat sat on a mat", "the cat lay on the mat"),
        ("a b c d e", "e d c b a"),
        ("a a a b", "b a a"),
        ("red", "red"),
        ("red", "blue"),
    ],
)
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(prediction, reference):
    want = lcs_f1(prediction, reference)
    np.testing.assert_allclose(metrics.rouge_l(prediction, [reference]), want, rtol=1e-12)


def test_rouge_l_edges():
    assert metrics.rouge_l("", ["a b"]) == 0
    assert metrics.rouge_l("", [""]) == 0
    assert metrics.rouge_l("a", []) == 0
    assert metrics.rouge_l("running dogs!", ["Runs, dog"]) == 1  # stems; case and marks ignored
    best = metrics.rouge_l("a b c", ["x", "a b", "a"])
    np.testing.assert_allclose(best, lcs_f1("a b c", "a b"))
    assert metrics.rouge_l("привет мир", ["привет мир"]) == 0  # its words are a-z and 0-9 only


def test_unknown_metric_names_the_near_one():
    assert metrics.get("rouge_l").of_example is metrics.rouge_l
    with pytest.raises(errors.UserError, match="Did you mean 'exact_match'"):
        metrics.get("exact_mach")


def test_each_task_has_its_own_metric_or_all_have_one():
    own = {"a": "macro_f1", "b": "qa_f1"}
    assert {t: m.name for t, m in metrics.of_tasks(metrics.OF_TASK, own).items()} == own
    assert metrics.of_tasks("rouge_l", {"a": None}) == {"a": metrics.get("rouge_l")}
    with pytest.raises(errors.UserError, match="'c' has no metric of its own; name one of exact"):
        metrics.of_tasks(metrics.OF_TASK, {**own, "c": None})


def squad_words(text):
    """SQuAD's normalisation, character by character."""
    text = "".join(mark for mark in text.lower() if mark not in string.punctuation)
    return [word for word in re.split(r"\s+", text) if word and word not in ("a", "an", "the")]


@pytest.mark.parametrize(
    ("prediction", "references"),
    [
        ("The cat", ["a cat."]),
        ("", [""]),
        ("the", ["a", "an apple"]),
        ("cat cat dog", ["cat dog dog", "dog"]),
        ("Ärger über 日本", ["ärger 日本"]),
        ("a.b", ["ab"]),
        ("x", []),
        ("theory", ["the ory"]),
    ],
)
def test_answers_to_questions(prediction, references):
    def f1(words, right):
        shared = sum((collections.Counter(words) & collections.Counter(right)).values())
        if not shared:
            return 0.0
        precision, recall = shared / len(words), shared / len(right)
        return 2 * precision * recall / (precision + recall)

    words, right = squad_words(prediction), [squad_words(text) for text in references]
    assert metrics.exact_match_squad(prediction, references) == float(words in right)
    best = max((f1(words, each) for each in right), default=0.0)
    np.testing.assert_allclose(metrics.qa_f1(prediction, references), best, rtol=1e-12)


@pytest.mark.parametrize(
    ("prediction", "references", "want"),
    [  # computed with release 1.0.0 of the package `rouge`
        ("the cat sat", ["the cat sat"], 0.9999999950),
        ("the cat sat on a mat", ["the cat lay on the mat"], 0.7272727223),
        ("a b. c d", ["c d. a b"], 0.9999999950),  # sentences in any order
        ("a a a b", ["b a"], 0.4999999950),  # different words count, not how often
        ("a a c", ["a c a"], 0.4999999950),  # of two longest subsequences, "a a"
        ("Cat", ["cat", "dog"], 0.0),  # letter case counts
        ("x y z", ["z", "y z"], 0.7999999952),
        ("日本 é!", ["é! 日本"], 0.4999999950),  # two words in another order share one
        ("3.14 is pi.", ["pi is 3.14"], 0.7499999950),
        (" . x", ["x . "], 0.9999999950),  # a sentence of white space is one empty word
        ("!?.", ["!?."], 0.0),
        ("", [""], 0.0),
    ],
)
def test_rouge_l_of_crossfit(prediction, references, want):
    found = metrics.rouge_l_crossfit(prediction, references)
    np.testing.assert_allclose(found, want, atol=1e-9)


LABELS = ["yes", "no", "", "Yes", "日本"]


@pytest.mark.parametrize("seed", range(20))
def test_metrics_of_all_examples_are_those_of_scikit_learn_and_scipy(seed):
    """Few examples, so that classes are absent on either side and ties abound."""
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 12))
    draw = lambda texts: [str(text) for text in rng.choice(texts, size)]
    of = lambda name, predictions, right: metrics.of_predictions(
        metrics.get(name), predictions, [[text, "never looked at"] for text in right]
    )
    right, predictions = draw(LABELS[: rng.integers(1, 5)]), draw(LABELS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one class only
        want = sklearn_metrics.f1_score(right, predictions, average="macro", zero_division=0)
        np.testing.assert_allclose(of("macro_f1", predictions, right), want, atol=1e-12)
        right, predictions = (draw(["acceptable", "unacceptable", ""]) for _ in range(2))
        truths = [[text == "acceptable" for text in texts] for texts in (right, predictions)]
        want = sklearn_metrics.matthews_corrcoef(*truths)
        np.testing.assert_allclose(of("matthews", predictions, right), want, atol=1e-12)
    right, predictions = (rng.integers(0, 4, size) for _ in range(2))
    if size > 1 and np.ptp(right) and np.ptp(predictions):
        want = stats.pearsonr(right, predictions).statistic
    else:
        want = 0.0  # undefined
    found = of("pearson", [f" {x} stars" for x in predictions], [f"{x}.0" for x in right])
    np.testing.assert_allclose(found, want, atol=1e-12)


def test_metrics_of_all_examples_edges():
    f1 = lambda *pairs: metrics.of_predictions(
        metrics.get("macro_f1"), [p for p, _ in pairs], [[r] for _, r in pairs]
    )
    assert f1(("a", "a"), ("junk", "a")) == pytest.approx((2 / 3 + 0) / 2)  # junk is a class
    assert f1((" a\n", "a")) == 1  # white space around a label aside
    assert f1(("A", "a")) == 0
    numbers = metrics.get("pearson").pairs(["2.5 stars", "", "inf", "1e3"], ["1", "2", "3", "4"])
    np.testing.assert_array_equal(numbers[:, 0], [2.5, 0, 0, 1000])
    assert metrics.correlation(np.array([[0.1, 1], [0.1, 2], [0.1, 3]])) == 0


def test_scores_of_one_example():
    assert metrics.score_example(metrics.get("macro_f1"), "a", ["a"]) is None
    assert metrics.score_example(metrics.get("accuracy"), "A", ["b", "a"]) == 1
    assert metrics.of_predictions(metrics.get("accuracy"), ["a", "b"], [["a"], ["c", "d"]]) == 0.5
    assert metrics.references_of({"targets": "x", "references": ["y", "z"]}) == ["y", "z"]
    assert metrics.references_of({"targets": "x"}) == ["x"]

"""Metrics against independent computation, on the awkward cases."""

import numpy as np
import pytest

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

"""How good one prediction is: exact match, accuracy, Rouge-L.

Every metric maps (prediction, references) to a number in [0, 1]; several references count by the
best of them. Averages are taken elsewhere (`aggregation`), tables multiply by 100.

    name                     two texts are equal when ...
    exact_match              they are the same characters, white space around them aside
    exact_match_normalized   they are the same after `normalize` (SuperNI)
    accuracy                 they are the same label: stripped, letter case aside (CrossFit's ACC)
"""

from collections.abc import Callable, Sequence
import functools
import string

from rouge_score import rouge_scorer

from moe_peft import errors

Metric = Callable[[str, Sequence[str]], float]

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Lower case, no ASCII punctuation, single spaces; articles stay.

    Wang et al. 2022, "Super-NaturalInstructions", as its evaluation code does it.

    >>> normalize("A  cat.")
    'a cat'
    """
    return " ".join(text.lower().translate(_WITHOUT_PUNCTUATION).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction is one of the references to the letter, white space around aside."""
    return _any_equal(str.strip, prediction, references)


def exact_match_normalized(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction equals one of the references after `normalize`."""
    return _any_equal(normalize, prediction, references)


def accuracy(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction is the right label, letter case and white space around aside."""
    return _any_equal(lambda text: text.strip().lower(), prediction, references)


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """F-measure of the longest common subsequence of words, stemmed (Porter); the best reference's.

    Google's `rouge_score` as SuperNI uses it. Its words are runs of a-z and 0-9: a text without any
    (empty, or written in another script) scores 0, even against itself.
    """
    scores = [_rouge().score(reference, prediction)["rougeL"].fmeasure for reference in references]
    return float(max(scores, default=0.0))


METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "exact_match_normalized": exact_match_normalized,
    "accuracy": accuracy,
    "rouge_l": rouge_l,
}


def get(name: str) -> Metric:
    """The metric of that name."""
    if name not in METRICS:
        raise errors.UserError(
            f"There is no metric {name!r}; there are {', '.join(METRICS)}."
            + errors.near(str(name), METRICS)
        )
    return METRICS[name]


def _any_equal(form: Callable[[str], str], prediction: str, references: Sequence[str]) -> float:
    return float(form(prediction) in {form(reference) for reference in references})


@functools.cache
def _rouge() -> rouge_scorer.RougeScorer:
    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)

"""How good predictions are: of one example by itself, or of all examples together.

A metric of examples maps (prediction, references) to a number in [0, 1], the best over references;
the score of several examples is its mean. F1, Matthews' and Pearson's correlation have no value for
one example: they compare each prediction with the first reference and are computed over all
examples. Averages over templates and tasks are taken elsewhere (`aggregation`); tables multiply
by 100.

    name                     what it is
    exact_match              same characters, white space around them aside
    exact_match_normalized   same after `normalize` (SuperNI)
    exact_match_squad        same after `normalize` without articles (CrossFit's EM)
    accuracy                 same label: stripped, letter case aside (CrossFit's ACC)
    qa_f1                    F1 of the words they share (CrossFit's QA-F1)
    rouge_l                  Rouge-L of stemmed words, `rouge_score` (SuperNI)
    rouge_l_crossfit         Rouge-L of sets of words, as CrossFit has it
    macro_f1                 F1 of each label, averaged over labels (CrossFit's Classification-F1)
    matthews                 correlation of "acceptable" or not (CrossFit's glue-cola)
    pearson                  correlation of numbers (CrossFit)

CrossFit: Ye et al. 2021, section 3.3. SuperNI: Wang et al. 2022, section 4.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import re
import statistics
import string
from typing import Any

from jaxtyping import Float
import numpy as np

from moe_peft import errors

# Stands for the metric that each task's own benchmark reports it by.
OF_TASK = "task"
# In rows: the right one of some answer choices was the most likely.
BY_RANK = "rank_accuracy"

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")

Pairs = Float[np.ndarray, "n 2"]


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric of examples (`of_example`), or of all of them together (the other two)."""

    name: str  # in settings and reports
    of_example: Callable[[str, Sequence[str]], float] | None = None  # (prediction, references)
    # (Predictions, first references) -> numbers that stand for them.
    pairs: Callable[[Sequence[str], Sequence[str]], Pairs] | None = None
    of_pairs: Callable[[Pairs], float] | None = None  # score of such numbers, or some of their rows


def normalize(text: str) -> str:
    """Lower case, no ASCII punctuation, single spaces; articles stay.

    Wang et al. 2022, "Super-NaturalInstructions", as its evaluation code does it.

    >>> normalize("A  cat.")
    'a cat'
    """
    return " ".join(text.lower().translate(_WITHOUT_PUNCTUATION).split())


def normalize_squad(text: str) -> str:
    """As `normalize`, and without the articles a, an, the.

    >>> normalize_squad("A  cat.")
    'cat'
    """
    return " ".join(_ARTICLES.sub(" ", normalize(text)).split())


def _equality(form: Callable[[str], str]) -> Callable[[str, Sequence[str]], float]:
    """1 if the prediction equals one of the references, both in this form."""

    def is_equal(prediction: str, references: Sequence[str]) -> float:
        return float(form(prediction) in set(map(form, references)))

    return is_equal


exact_match = _equality(str.strip)
exact_match_normalized = _equality(normalize)
exact_match_squad = _equality(normalize_squad)
accuracy = _equality(lambda text: text.strip().lower())


def qa_f1(prediction: str, references: Sequence[str]) -> float:
    """F1 of the words that prediction and reference share, each as often as in both.

    After `normalize_squad`. Without a shared word it is 0, even for two empty texts.
    """

    def f1(reference: str) -> float:
        words = [collections.Counter(normalize_squad(t).split()) for t in (prediction, reference)]
        shared = (words[0] & words[1]).total()
        return 2 * shared / (words[0].total() + words[1].total()) if shared else 0.0

    return max(map(f1, references), default=0.0)


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """F-measure of the longest common subsequence of words, stemmed (Porter); the best reference's.

    Google's `rouge_score` as SuperNI uses it. Its words are runs of a-z and 0-9: a text without any
    (empty, or written in another script) scores 0, even against itself.
    """
    scores = [_rouge().score(reference, prediction)["rougeL"].fmeasure for reference in references]
    return float(max(scores, default=0.0))


def rouge_l_crossfit(prediction: str, references: Sequence[str]) -> float:
    """Rouge-L as release 1.0.0 of the package `rouge` defines it, which CrossFit uses.

    Texts are split into sentences at full stops. The overlap is the set of words in any longest
    common subsequence of a sentence of the reference and one of the prediction; precision and
    recall divide it by the number of different words. Letter case and other marks count. Nothing
    but punctuation scores 0.
    """
    if not prediction.translate(_WITHOUT_PUNCTUATION):
        return 0.0
    candidates = _sentences(prediction)

    def f_measure(reference: str) -> float:
        sentences = _sentences(reference)
        if not sentences or not candidates:
            return 0.0
        common = {
            word for one in sentences for other in candidates for word in _common_words(one, other)
        }
        precision, recall = (len(common) / len(set().union(*s)) for s in (candidates, sentences))
        return 2 * precision * recall / (precision + recall + 1e-8)

    return max(map(f_measure, references), default=0.0)


def macro_f1(labels: Pairs) -> float:
    """F1 of each label that is predicted or right anywhere, averaged over these labels.

    Rows are numbers of (predicted, right) labels. A label that is never right, such as a text
    nobody asked for, counts with F1 0.
    """
    predicted, right = labels.astype(int).T
    size = int(labels.max()) + 1
    counts = [np.bincount(x, minlength=size) for x in (predicted, right, right[predicted == right])]
    is_there = counts[0] + counts[1] > 0
    return float(np.mean(2 * counts[2][is_there] / (counts[0] + counts[1])[is_there]))


def correlation(values: Pairs) -> float:
    """Pearson's correlation of two columns, in [-1, 1]; 0 where one of them is constant.

    Of zeros and ones it is Matthews' correlation.
    """
    x, y = (values - values.mean(axis=0)).T
    # The mean of equal numbers may miss them by a rounding error.
    if np.any(np.ptp(values, axis=0) == 0):
        return 0.0
    x, y = x / np.abs(x).max(), y / np.abs(y).max()
    return float(np.clip(np.sum(x * y) / np.sqrt(np.sum(x * x) * np.sum(y * y)), -1.0, 1.0))


def _labels(predictions: Sequence[str], references: Sequence[str]) -> Pairs:
    """Numbers of labels: equal texts, white space around aside, have equal ones."""
    texts = [text.strip() for text in (*predictions, *references)]
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    return np.array([numbers[text] for text in texts], float).reshape(2, -1).T


def _acceptable(predictions: Sequence[str], references: Sequence[str]) -> Pairs:
    """1 for "acceptable", 0 for anything else."""
    column = lambda texts: [text.strip() == "acceptable" for text in texts]
    return np.array([column(predictions), column(references)], float).T


def _numbers(predictions: Sequence[str], references: Sequence[str]) -> Pairs:
    """The first word of each as a number; 0 where it is none."""

    def number(text: str) -> float:
        try:
            value = float(text.split()[0])
        except (ValueError, IndexError):
            return 0.0
        return value if np.isfinite(value) else 0.0

    return np.array([[*map(number, predictions)], [*map(number, references)]]).T


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("exact_match", exact_match),
        Metric("exact_match_normalized", exact_match_normalized),
        Metric("exact_match_squad", exact_match_squad),
        Metric("accuracy", accuracy),
        Metric("qa_f1", qa_f1),
        Metric("rouge_l", rouge_l),
        Metric("rouge_l_crossfit", rouge_l_crossfit),
        Metric("macro_f1", pairs=_labels, of_pairs=macro_f1),
        Metric("matthews", pairs=_acceptable, of_pairs=correlation),
        Metric("pearson", pairs=_numbers, of_pairs=correlation),
    )
}


def get(name: str) -> Metric:
    """The metric of that name."""
    if name not in METRICS:
        raise errors.UserError(
            f"There is no metric {name!r}; there are {', '.join(METRICS)}, and {OF_TASK} for each "
            "task's own." + errors.near(str(name), METRICS)
        )
    return METRICS[name]


def of_tasks(name: str, own: Mapping[str, str | None]) -> dict[str, Metric]:
    """The metric of each task: the one of that name, or for "task" its benchmark's `own`."""
    if name != OF_TASK:
        return dict.fromkeys(own, get(name))
    unknown = [task for task, metric in own.items() if metric is None]
    if unknown:
        raise errors.UserError(
            f"metric={OF_TASK!r}: {unknown[0]!r} has no metric of its own; name one of "
            f"{', '.join(METRICS)}."
        )
    return {task: get(metric) for task, metric in own.items()}


def score_example(metric: Metric, prediction: str, references: Sequence[str]) -> float | None:
    """What one example contributes to a mean; None where the metric has none."""
    return None if metric.of_example is None else metric.of_example(prediction, references)


def of_predictions(
    metric: Metric, predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> float:
    """The score of several examples."""
    if metric.of_example is not None:
        return statistics.fmean(map(metric.of_example, predictions, references))
    return metric.of_pairs(metric.pairs(predictions, [texts[0] for texts in references]))


def references_of(row: Mapping[str, Any]) -> Sequence[str]:
    """The accepted answers of a row of predictions."""
    return row.get("references") or [row["targets"]]


@functools.cache
def _rouge() -> Any:
    from rouge_score import rouge_scorer  # nltk and scipy take two seconds.

    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)


def _sentences(text: str) -> list[list[str]]:
    """Words of each sentence; one of white space alone has one word, which is empty."""
    return [sentence.split() or [""] for sentence in text.split(".") if sentence]


def _common_words(one: Sequence[str], other: Sequence[str]) -> list[str]:
    """Words of a longest common subsequence; of several, the one that leaves `other` last."""
    table = np.zeros((len(one) + 1, len(other) + 1), int)
    for i, word in enumerate(one):
        for j, same in enumerate(other):
            table[i + 1, j + 1] = (
                table[i, j] + 1 if word == same else max(table[i, j + 1], table[i + 1, j])
            )
    found, i, j = [], len(one), len(other)
    while i and j:
        if one[i - 1] == other[j - 1]:
            i, j = i - 1, j - 1
            found.append(one[i])
        elif table[i - 1, j] > table[i, j - 1]:
            i -= 1
        else:
            j -= 1
    return found

"""Metrics that SeqIO's own evaluator reports for these tasks, as under `t5x.eval`.

They score generated text against each example's one target. The benchmarks' own protocols (rank
classification over answer choices, several references, medians over templates) are those of
`moe-peft eval`.
"""

from collections.abc import Sequence

import numpy as np

from moe_peft.evaluation import metrics


def exact_match(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Share of predictions that are the target, in per cent."""
    return {"exact_match": _mean(metrics.exact_match, targets, predictions)}


def rouge_l(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Mean Rouge-L, in per cent."""
    return {"rouge_l": _mean(metrics.rouge_l, targets, predictions)}


def _mean(score, targets, predictions) -> float:
    pairs = zip(predictions, targets, strict=True)
    return 100.0 * float(np.mean([score(prediction, [target]) for prediction, target in pairs]))


METRIC_FNS = (exact_match, rouge_l)

"""The linear probe: logistic regression on the features, a yardstick without seeds."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from training import Problem

STRENGTHS = tuple(10.0**power for power in range(-4, 3))  # of C, the inverse of the penalty


@threadpool_limits.wrap(limits=1)  # two threads that wait for each other were seen to take ten times as long
def linear_probe(problem: Problem, holdouts: Sequence[str], strengths: Sequence[float] = STRENGTHS) -> pd.DataFrame:
    """Held-out accuracy of logistic regression, trained on the `in` split of the source domains.

    C is the one with the best unweighted mean accuracy on the sources' `out` splits (the smallest of equals). The
    fit is deterministic.

    Args:
        problem: features, labels and the split.
        holdouts: domains to leave out, each in turn.
        strengths: values of C to choose from.

    Returns:
        Row per holdout: C, validation (mean `out` accuracy of the sources), and full, in, out (accuracy on those
        parts of the held-out domain); fractions.
    """
    features, labels = problem.features.double().cpu().numpy(), problem.labels.cpu().numpy()

    def score(model: LogisticRegression, domains: Sequence[str], part: str) -> float:
        rows = problem.rows(domains, part).cpu().numpy()
        return float((model.predict(features[rows]) == labels[rows]).mean())

    table = []
    for holdout in holdouts:
        sources = problem.sources(holdout)
        rows = problem.rows(sources, "in").cpu().numpy()
        best, model = -1.0, None
        for strength in sorted(strengths):
            fitted = LogisticRegression(C=strength, max_iter=10_000).fit(features[rows], labels[rows])
            validation = float(np.mean([score(fitted, [source], "out") for source in sources]))
            if validation > best:
                best, model, chosen = validation, fitted, strength
        parts = [score(model, [holdout], {"full": "all"}.get(part, part)) for part in ("full", "in", "out")]
        table.append((holdout, chosen, best, *parts))
    return pd.DataFrame(table, columns=["holdout", "C", "validation", "full", "in", "out"]).set_index("holdout")

"""The linear probe: logistic regression on the features, a yardstick without random starts."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from engine import SplitFeatures

STRENGTHS = tuple(10.0**power for power in range(-4, 3))  # of C, the inverse of the penalty


@threadpool_limits.wrap(limits=1)  # on a busy machine two threads that wait for each other took ten times as long
def linear_probe(
    data: SplitFeatures, holdouts: Sequence[str], seed: int = 0, strengths: Sequence[float] = STRENGTHS
) -> pd.DataFrame:
    """Held-out accuracy of logistic regression, trained on the `in` split of the source domains.

    C is the one with the best unweighted mean accuracy on the sources' `out` splits, the smallest in case of a tie.
    The fit is deterministic.

    Args:
        data: features, labels and splits.
        holdouts: domains to leave out, each in turn.
        seed: whose split; of no effect where all seeds share one.
        strengths: values of C to choose from.

    Returns:
        A row per holdout: C, validation (mean `out` accuracy of the sources), and full, in, out (accuracy on those
        parts of the held-out domain); fractions.
    """
    features, labels = data.features.double().cpu().numpy(), data.labels.cpu().numpy()

    def rows_of(domains: Sequence[str], part: str) -> np.ndarray:
        return data.rows(domains, part, [seed])[0].cpu().numpy()

    def accuracy(model: LogisticRegression, domain: str, part: str) -> float:
        rows = rows_of([domain], part)
        return float((model.predict(features[rows]) == labels[rows]).mean())

    table = []
    for holdout in holdouts:
        sources = data.sources(holdout)
        rows = rows_of(sources, "in")
        best, model = -1.0, None
        for strength in sorted(strengths):
            fitted = LogisticRegression(C=strength, max_iter=10_000).fit(features[rows], labels[rows])
            validation = float(np.mean([accuracy(fitted, source, "out") for source in sources]))
            if validation > best:
                best, model, chosen = validation, fitted, strength
        table.append((holdout, chosen, best, *(accuracy(model, holdout, part) for part in ("all", "in", "out"))))
    return pd.DataFrame(table, columns=["holdout", "C", "validation", "full", "in", "out"]).set_index("holdout")

"""Common tables of the transfer study, from numbers that were made up."""

import numpy as np
import pandas as pd

MEANS = {  # amount -> accuracy by number of frozen layers; the best moves from 2 to 1 to 0
    0.01: (0.60, 0.70, 0.80, 0.70),
    0.1: (0.80, 0.90, 0.82, 0.75),
    1.0: (0.96, 0.93, 0.90, 0.80),
}
OTHERS = {  # arm -> what it has beyond the frozen cut, and at which cuts, as far as there are layers
    "truncated": (-0.002, (1, 2, 3)),
    "moved": (0.02, (2,)),
    "random_layer": (-0.02, (2,)),
}


def common_table(repeats=12, means=MEANS, others=OTHERS, task="toy", updates=(50, 2000), sd=0.004, protocol="updates"):
    """Runs of scratch, finetune (of three layers), frozen and others; after fewer updates frozen cuts lead by more."""
    noise, rows = np.random.default_rng(0), []

    def put(arm, cut, amount, repeat, share):
        for step in updates:
            value = float(np.clip(share + noise.normal(0, sd) - 0.1 * (step < max(updates)) * (cut == 0), 0, 1))
            at = (arm, cut, amount, round(1000 * amount), repeat, step, value, value)
            rows.append((task, protocol, *at, None))

    for amount, curve in means.items():
        for repeat in range(repeats if isinstance(repeats, int) else repeats[amount]):
            put("scratch", 0, amount, repeat, curve[0])
            put("finetune", len(curve) - 1, amount, repeat, max(curve) + 0.01)
            for cut, share in enumerate(curve[1:], 1):
                put("frozen", cut, amount, repeat, share)
            for arm, (more, cuts) in others.items():
                for cut in (cut for cut in cuts if cut < len(curve)):
                    put(arm, cut, amount, repeat, curve[cut] + more)
    names = "task protocol arm cut amount n repeat updates accuracy balanced_accuracy failed"
    return pd.DataFrame(rows, columns=names.split())


def probe_table(repeats=12, task="toy", layers=4, **measures):
    """Measure -> value of layer c, the same in every repeat but for a little noise; of the pretrained networks."""
    noise = np.random.default_rng(1)
    rows = [
        (task, network, repeat, layer, measure, value(layer) + noise.normal(0, 1e-3))
        for measure, value in measures.items()
        for network in ("pretrained", "untrained")
        for repeat in range(repeats)
        for layer in range(layers)
    ]
    return pd.DataFrame(rows, columns=["task", "network", "repeat", "layer", "measure", "value"])

"""What the tables of a transfer study allow to be said: a sentence per claim, its verdict computed.

The claims of the original are "the best cut moves to fewer kept layers as data grow", "truncating is a viable
alternative to reinitializing" and "ARI points at the layers that transfer"; ours is whether the weights that moved
carry what transfers, or the layer. Differences are in points, with 95 % intervals.
"""

from collections import Counter
from collections.abc import Iterator, Mapping

import pandas as pd

from evidence import interval, with_interval
from storage import ranges
from transfer.arms import ZERO_SHOT
from transfer.inference import NONINFERIORITY_MARGIN
from transfer.statistics import FROZEN, GROUP, MEASURES, MOVED, ORIGINAL, SCRATCH, TRUNCATED, WEIGHT_BASELINES, share

LEARNED = 0.1  # of the way from the share of the largest class to 1: below, a network has hardly learned
BEYOND = f"by more than {100 * NONINFERIORITY_MARGIN:g} point"
DIRECTIONS = {"helps": "above 0", "hurts": "below 0"}  # how verdicts of a difference begin -> words
NO_VERDICT = ("no pairs", "cannot reject", "too few repeats")  # how verdicts begin that are none

Tables = Mapping[str, pd.DataFrame]


def studies(tables: Tables) -> Iterator[tuple[str, dict[str, pd.DataFrame]]]:
    """Title and tables of each task and protocol: "mnist", "mnist, original protocol"."""
    for task, protocol in tables["accuracy"][GROUP].drop_duplicates().itertuples(index=False):
        own = {name: table[(table["task"] == task) & (table["protocol"] == protocol)] for name, table in tables.items()}
        title = f"{task}, original protocol" if protocol == ORIGINAL else task
        yield title, {name: table for name, table in own.items() if len(table)}


def claims(tables: Tables) -> list[str]:
    """What can be said of every task and protocol, confirmatory first.

    Args:
        tables: see `statistics.tables`, in memory or read from their files.

    Returns:
        Sentences; a claim of which a task has no runs is not stated.
    """
    makers = {
        "contrasts": freezing_sentence,
        "best": best_sentence,
        "trend": trend_sentence,
        "truncation": truncation_sentence,
        "weights": weights_sentence,
        "correlations": probe_sentence,
        "differences": budget_sentence,
        "zero_shot": zero_shot_sentence,
    }
    return [
        f"{title}: {sentence}"
        for title, own in studies(tables)
        for name, maker in makers.items()
        if name in own and (sentence := maker(own[name]))
    ]


def places(rows: pd.DataFrame) -> str:
    """Which cuts, by amount: "cuts 1-3 at 0.1 %, cut 4 at 1 %"."""
    found = rows.groupby("amount")["cut"].apply(lambda cuts: sorted({*cuts}))
    return ", ".join(f"cut{'s' * (len(cuts) > 1)} {ranges(cuts)} at {share(amount)}" for amount, cuts in found.items())


def counted(rows: pd.DataFrame, words: Mapping[str, str], column: str = "verdict") -> str:
    """How often each verdict was reached, and where: "above it in 2 (cut 1 at 1 %, cut 4 at 10 %), below it in 0".

    Args:
        rows: of one family.
        words: how a verdict begins -> its words; those are named even if there are none. Other verdicts follow.
    """
    parts = []
    for start, said in words.items():
        chosen = rows[rows[column].str.startswith(start)]
        parts.append(f"{said} in {len(chosen)}" + f" ({places(chosen)})" * bool(len(chosen)))
    rest = rows.loc[~rows[column].str.startswith(tuple(words)), column]
    kinds = Counter("undecided" if verdict.startswith("undecided") else verdict for verdict in rest)
    return ", ".join(parts + [f"{verdict} in {count}" for verdict, count in kinds.items()])


def updates_words(updates: int) -> str:
    """A checkpoint in words: "after 2,000 updates"."""
    return f"after {updates:,} updates" if updates else "at the end of each run"


def freezing_sentence(table: pd.DataFrame) -> str:
    """Where keeping layers frozen beats training all of them anew (of `statistics.confirmatory`)."""
    return (
        f"the first c layers kept and frozen against all layers trained anew ({FROZEN}@c − {SCRATCH}, {len(table)} "
        f"contrasts fixed in advance, Holm): {counted(table, DIRECTIONS)}."
    )


def best_sentence(table: pd.DataFrame) -> str:
    """Which cut has the highest mean at each amount, and how sure that is (of `statistics.best`)."""
    last = table[table["updates"] == table["updates"].max()]
    parts = []
    for amount, rows in last.groupby("amount"):
        known = rows.dropna(subset=["share"])
        if len(known):
            row = known.loc[known["share"].idxmax()]
            parts.append(f"{share(amount)}: cut {row['cut']:.0f} ({100 * row['share']:.0f} %)")
    at = updates_words(last["updates"].iloc[0])
    return f"best cut {at} (share of bootstrap resamples in which it is best): {', '.join(parts)}." if parts else ""


def trend_sentence(table: pd.DataFrame) -> str:
    """Whether the best cut falls as data grow (of `statistics.trends`), and how it was at the first checkpoint."""
    *earlier, last = table.sort_values("updates").itertuples()
    text = f'"the best cut moves to fewer kept layers as data grow": {last.verdict}; {_tau(last)}'
    if last.left_out:
        text += f", {last.left_out} repeats without every amount left out"
    if last.repeats:
        text += (
            f"; mean best cut {last.first_cut:.1f} at {share(last.first_amount)} and {last.last_cut:.1f} at "
            f"{share(last.last_amount)}"
        )
    if earlier:
        text += f". EXPLORATORY, {updates_words(earlier[0].updates)}: {_tau(earlier[0])}"
    return text + "."


def _tau(row) -> str:
    """τ of a row of `statistics.trends`, with its test."""
    if not row.repeats:
        return "no repeat has every amount"
    tau = with_interval(row.tau, row.low, row.high)
    return f"mean Kendall's τ of cut and amount {tau}, one-sided p = {row.p:.2g}, {row.repeats} repeats"


def truncation_sentence(table: pd.DataFrame) -> str:
    """Whether truncating costs no more than the margin (of `statistics.truncation`)."""
    verdicts, size = table["noninferior"], len(table)
    claim = (
        f'"truncating is a viable alternative to reinitializing" (no worse than {FROZEN} {BEYOND}, fixed in advance)'
    )
    if (verdicts == "no pairs").all():
        return f"{claim}: cannot be judged, for no two runs of {TRUNCATED} and {FROZEN} can be paired."
    fine, worse = (verdicts == f"{word} {BEYOND}" for word in ("no worse", "worse"))
    if fine.all():
        verdict = "supported"
    elif worse.any():
        verdict = "not supported in general"
    else:
        verdict = "no verdict" if verdicts.str.startswith(NO_VERDICT).all() else "undecided"
    words = {"no worse": f"no worse {BEYOND}", "worse": f"worse {BEYOND}"}
    return (
        f"{claim}: {verdict}; of {size} contrasts below the full depth it is {counted(table, words, 'noninferior')}. "
        f"As plain differences: {counted(table, DIRECTIONS)}."
    )


def weights_sentence(table: pd.DataFrame) -> str:
    """Do the weights that moved carry what transfers, or does the layer? (of `statistics.weights`)."""
    parts = []
    for baseline in WEIGHT_BASELINES:
        rows = table[table["baseline"] == baseline]
        if len(rows):
            parts.append(f"{MOVED}@c − {baseline}@c, {len(rows)} contrasts, {counted(rows, DIRECTIONS)}")
    return f"the weights that moved most against as many others (Holm over {len(table)}): {'; '.join(parts)}."


def probe_sentence(table: pd.DataFrame) -> str:
    """Whether ARI points at the layers that transfer (of `statistics.probe_correlations`)."""
    tested = table[table["p_holm"].notna() | table["verdict"].notna()]
    if tested.empty:
        return ""
    parts = []
    for row in tested.itertuples():
        rho = with_interval(row.mean, row.low, row.high)
        parts.append(f"{row.measure} {row.verdict}, mean Spearman's ρ {rho}, {row.repeats} repeats")
    agreed = (tested["verdict"] == "supported").sum()
    return (
        f'"ARI points at the layers that transfer": supported by {agreed} of {len(tested)} measures, across the layers '
        f"of a network and with the accuracy of the frozen cut ({'; '.join(parts)})."
    )


def budget_sentence(table: pd.DataFrame) -> str:
    """How the lead of freezing depends on the number of updates (of `statistics.differences`); exploratory."""
    frozen = table[(table["arm"] == FROZEN) & (table["cut"] > 0) & table["mean"].notna()]
    first, last = frozen["updates"].min(), frozen["updates"].max()
    if frozen.empty or first == last:
        return ""
    parts = []
    for amount, rows in frozen.groupby("amount"):
        leads = []
        for updates in (first, last):
            at = rows[rows["updates"] == updates]
            best = at.loc[at["mean"].idxmax()] if len(at) else None
            leads.append("–" if best is None else f"{100 * best['mean']:+.1f} (cut {best['cut']})".replace("-", "−"))
        parts.append(f"{share(amount)}: {leads[0]} and {leads[1]}")
    return (
        f"EXPLORATORY, updates against data: the largest mean lead of a frozen cut over {SCRATCH} after {first:,} and "
        f"after {last:,} updates is, in points, {', '.join(parts)}."
    )


def zero_shot_sentence(table: pd.DataFrame) -> str:
    """What images of the new domain are worth (of `statistics.above_zero_shot`); exploratory."""
    known = table[table["mean"].notna()]
    if known.empty:
        return ""
    parts = []
    for arm, rows in known.groupby("arm", sort=False):
        cells = [f"{interval(row)} at {share(row.amount)}" for row in rows.itertuples()]
        parts.append(f"{arm} {', '.join(cells)}")
    return (
        f"EXPLORATORY, the pretrained network as it is ({ZERO_SHOT}) has {100 * known['baseline_mean'].iloc[0]:.1f} %; "
        f"minus it, in points: {'; '.join(parts)}."
    )


def cautions(tables: Tables, chance: Mapping[str, float]) -> list[str]:
    """What a reader must know before believing the claims: failures, unequal repeats, and what was not learned.

    Args:
        tables: see `statistics.tables`.
        chance: task -> share of the largest class among the test images.
    """
    found = []
    for title, own in studies(tables):
        accuracy = own["accuracy"]
        last = accuracy[accuracy["updates"] == accuracy["updates"].max()]
        tuned = last[last["arm"] != ZERO_SHOT]
        sentences = [
            *_measured(last), *_failures(last), *_unequal(last), *_unlearned(tuned, chance.get(last["task"].iloc[0])),
        ]  # fmt: skip
        found += [f"{title}: {sentence}" for sentence in sentences]
    return found


def _measured(last: pd.DataFrame) -> list[str]:
    """What accuracy is measured on where it is not the test split, and arms that were never measured on it."""
    measure = last["measure"].iloc[0]
    sentences = [] if measure == "accuracy" else [f"accuracy is measured on {MEASURES[measure]}."]
    runs = last.groupby("arm")[["repeats", "failed"]].sum()
    if len(absent := runs.index[(runs["repeats"] == 0) & (runs["failed"] == 0)]):
        words = f"{', '.join(absent)} was never measured on {MEASURES[measure]} and is compared with nothing."
        sentences.append(words)
    return sentences


def _failures(last: pd.DataFrame) -> list[str]:
    """How many runs failed, by arm."""
    failed = last.groupby("arm")["failed"].sum()
    if not failed.sum():
        return []
    parts = ", ".join(f"{arm} {count}" for arm, count in failed.items() if count)
    return [f"{failed.sum()} runs failed and are left out of every comparison ({parts})."]


def _unequal(last: pd.DataFrame) -> list[str]:
    """Which amounts have fewer repeats than others."""
    counts = last[last["repeats"] > 0].groupby("amount")["repeats"].agg(["min", "max"])
    if counts.empty or counts["min"].min() == counts["max"].max():
        return []
    words = {True: "{:.0f}", False: "{:.0f} to {:.0f}"}
    parts = [f"{words[low == high].format(low, high)} at {share(amount)}" for amount, low, high in counts.itertuples()]
    return [f"numbers of repeats differ: {', '.join(parts)}; every contrast pairs the repeats that both arms have."]


def _unlearned(last: pd.DataFrame, chance: float | None) -> list[str]:
    """Amounts of data at which no arm has learned much, so that its contrasts say nothing about transfer."""
    if chance is None:
        return ["what chance gives is not known, so whether the networks learned anything was not checked."]
    means = last.groupby("amount")["mean"].max()
    low = means[means - chance < LEARNED * (1 - chance)]
    if low.empty:
        return []
    parts = ", ".join(f"{share(amount)} ({100 * mean:.1f} %)" for amount, mean in low.items())
    return [
        f"Warning: hardly anything was learned by any arm at {parts}, where {100 * chance:.1f} % are of the largest "
        "class; what is compared there means little."
    ]

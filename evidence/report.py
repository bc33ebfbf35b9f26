"""What the protocol's tables say: sentences computed from them, and the report."""

import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence

import pandas as pd

from evidence.contrasts import FAMILY, OTHERS
from evidence.diagnostics import chance_overlap
from evidence.linear_probe import probe_words
from evidence.statistics import LEVEL
from storage import Results
from study import (
    AVERAGE,
    ERM,
    FEWEST_SEEDS,
    IMPORTANCE,
    MARGIN,
    Arm,
    Study,
    bottleneck,
    covered,
    levels,
    t_interval,
    wide_table,
)

VERDICTS = {  # how `Verdict.text` begins -> the words of a sentence
    "helps": "helps",
    "hurts": "hurts",
    "no difference": f"makes no difference larger than {100 * MARGIN:g} points",
    "undecided": "is undecided",
    "too few seeds": "has too few seeds",
}
PLUS_MINUS = 'After "±" stands the standard error over seeds.'
EXPLANATION = f"""\
{PLUS_MINUS} Intervals (95 %; of the family percentile bootstrap over seeds,
of the other tables Student's t) cover
{{covered}}.
The words "helps" and "hurts" need an interval on one side of 0, p < {LEVEL} after Holm's correction over
the family of six, and {FEWEST_SEEDS} seeds; "no difference" is not corrected. With a fresh start the units mean
nothing that a mask could know: a difference there can only come from the structure of the mask."""
LENGTH_ARMS = (ERM, IMPORTANCE, Arm("erm", "phase1"), Arm("importance", "phase1"))  # shown at both lengths


def verdict_words(verdict: str) -> str:
    """A verdict in the words of a sentence: "hurts", "is undecided"."""
    return next(words for start, words in VERDICTS.items() if verdict.startswith(start))


def verdict_counts(table: pd.DataFrame) -> dict[str, int]:
    """How often each verdict was reached (of a `statistics.family`): words -> contrasts."""
    return {words: int(table["verdict"].str.startswith(start).sum()) for start, words in VERDICTS.items()}


def family_sentence(table: pd.DataFrame, epochs: int) -> str:
    """How often each verdict was reached (of a `statistics.family`), and what stands after Holm's correction."""
    counts = verdict_counts(table)
    *most, last = (f"{words} in {n}" for words, n in counts.items() if n or not words.startswith("has"))
    chosen = table[(table["p_holm"] < LEVEL) & table["verdict"].isin(["helps", "hurts"])]
    stand = ", ".join(f"{row.contrast} ({'above' if row.mean > 0 else 'below'} 0)" for row in chosen.itertuples())
    return (
        f"At {epochs} epochs importance masking {', '.join(most)} and {last} of {len(table)} contrasts; "
        f"after Holm's correction (p < {LEVEL}) stand: {stand or 'none'}."
    )


def controls_sentence(table: pd.DataFrame, epochs: int) -> str:
    """Which controls outside the family (of a `contrasts.others_table`) importance masking is above and below."""
    baselines = {contrast.name: contrast.baseline.name for contrast in OTHERS}

    def named(rows: pd.DataFrame) -> str:
        return ", ".join(f"{baselines[row.contrast]} ({interval(row)})" for row in rows.itertuples()) or "none"

    above, below = table[table["low"] > 0], table[table["high"] < 0]
    return (
        f"EXPLORATORY, {epochs} epochs, the other controls, each from its own start: importance masking is above "
        f"{named(above)} and below {named(below)}; the other intervals include 0."
    )


def length_sentence(held_out: pd.DataFrame, sources: pd.DataFrame, epochs: tuple[int, int]) -> str:
    """What more training changes, on the held-out domains and on the `out` part of the sources.

    Tables hold accuracy at the greater minus that at the smaller of the two lengths: seeds × arms, fractions.
    """
    parts = []
    for arm in held_out:
        here, there = (in_points(*t_interval(table[arm].dropna())) for table in (held_out, sources))
        parts.append(f"{arm} {here} on the held-out domains, {there} on the sources' `out` part")
    return f"EXPLORATORY, from {epochs[0]} to {epochs[1]} epochs accuracy changes (points): {'; '.join(parts)}."


def probe_sentence(probe: pd.DataFrame, accuracies: Mapping[int, pd.DataFrame]) -> str:
    """Where logistic regression stands beside the best arm of any length (epochs -> `lodo_table`)."""
    means = {
        f"{row.algorithm}, {epochs} epochs": row.mean
        for epochs, table in accuracies.items()
        for row in table[table["holdout"] == AVERAGE].itertuples()
    }
    best, value = max(means, key=means.get), probe["full"].mean()
    place = "above the mean of every arm" if value > means[best] else "not above the mean of the best arm"
    return (
        f"Logistic regression on the same features reaches {100 * value:.1f} %, {place}; "
        f"the best arm ({best}) has {100 * means[best]:.1f} %."
    )


def overlap_sentence(stability: pd.DataFrame) -> str:
    """Whether a domain's mask survives a new start (of `diagnostics.seed_stability`)."""

    def spread(name: str) -> str:
        low, high = stability[name].min(), stability[name].max()
        return f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"

    return (
        f"A domain's masks from two starts overlap (IoU) by {spread('by_position')} by position and by "
        f"{spread('matched')} after matching units; {spread('renamed')} where the matched units are renamed at random, "
        f"{spread('chance')} by chance."
    )


def contrast_sentences(contrasts: pd.DataFrame) -> list[str]:
    """A sentence for each contrast of a `statistics.family`."""
    return [f"{row.contrast}: {interval(row)} points, {row.verdict}." for row in contrasts.itertuples()]


def edge_sentences(chosen: pd.DataFrame, what: str) -> list[str]:
    """That some of what arms chose for themselves lies at an edge of the grid, if any does.

    Args:
        chosen: has a column "edge".
        what: was chosen, in the plural.
    """
    if not (edges := int(chosen["edge"].sum())):
        return []
    return [
        f"{edges} of {len(chosen)} chosen {what} lie at an edge of the grid, so that one beyond it might be better."
    ]


def interval(row) -> str:
    """Mean and interval of a row of `itertuples` in points: "+0.97 [+0.65, +1.29]"."""
    return in_points(row.mean, row.low, row.high)


def in_points(mean: float, low: float, high: float) -> str:
    """A mean and its interval, given as fractions, in points: "+0.97 [+0.65, +1.29]"."""
    return with_interval(100 * mean, 100 * low, 100 * high)


def with_interval(value: float, low: float, high: float) -> str:
    """A signed number with its interval, if there is one: "+0.97 [+0.65, +1.29]"; "–" where it is not known."""
    if pd.isna(value):
        return "–"
    between = "" if pd.isna(low) else f" [{low:+.2f}, {high:+.2f}]"
    return f"{value:+.2f}{between}".replace("-", "−")


def by_density(table: pd.DataFrame, baseline: str, what: str) -> pd.DataFrame:
    """Accuracy by density for reading: per cent, and minus a baseline in points.

    Args:
        table: criterion, density, n, mean, low, high, and above, above_low, above_high, which are minus the baseline.
        baseline: the criterion that the others are compared with.
        what: the densities are of, such as "columns kept".
    """
    rows = [
        (
            row.criterion,
            f"{row.density:.3g}",
            row.n,
            f"{100 * row.mean:.1f} [{100 * row.low:.1f}, {100 * row.high:.1f}]",
            "" if row.criterion == baseline else in_points(row.above, row.above_low, row.above_high),
        )
        for row in table.itertuples()
    ]
    columns = ["criterion", f"{what} (%)", "seeds", "accuracy (%)", f"minus {baseline} (points)"]
    return pd.DataFrame(rows, columns=columns).set_index("criterion")


def summary(tables: Mapping[str, pd.DataFrame], epochs: tuple[int, int]) -> list[str]:
    """The finding in plain sentences: what was fixed in advance first, then what was not.

    Args:
        tables: see `protocol.Protocol.tables`; "seeds" and "sources", and their longer ones, have a row per seed.
        epochs: of Phase 2 in the short and the long study.
    """
    held_out, sources = tables["seeds_longer"] - tables["seeds"], tables["sources_longer"] - tables["sources"]
    arms = [arm.name for arm in LENGTH_ARMS]
    return [
        family_sentence(tables["contrasts"], epochs[0]),
        family_sentence(tables["contrasts_longer"], epochs[1]),
        controls_sentence(tables["controls"], epochs[0]),
        length_sentence(held_out[arms], sources[arms], epochs),
        probe_sentence(tables["linear_probe"], {epochs[0]: tables["accuracy"], epochs[1]: tables["accuracy_longer"]}),
        overlap_sentence(tables["seed_stability"]),
    ]


def cautions(tables: Mapping[str, pd.DataFrame], short: Study) -> list[str]:
    """Sentences on networks that did not learn, and on a classifier that is far below a linear one."""
    lengths = (tables[name] for name in ("accuracy", "accuracy_longer"))
    best = max(table.loc[table["holdout"] == AVERAGE, "mean"].max() for table in lengths)
    return short.warnings() + bottleneck(best, tables["linear_probe"]["full"].mean(), short.run.settings)


def report(tables: Mapping[str, pd.DataFrame], short: Study, long: Study, others: Sequence[Study]) -> str:
    """The finding in plain sentences, then the tables (see `Protocol.tables`) of the protocol's studies, trained."""
    run, probe = short.run, tables["linear_probe"]
    epochs = run.settings.ph2_num_epochs, long.run.settings.ph2_num_epochs
    accuracy = probe.groupby(level=0)[["full", "in", "out"]].mean()
    sweep_title = (
        f"EXPLORATORY: one setting at a time, {tables['sweep']['n'].max()} seeds, accuracy averaged over the holdouts; "
        "the best point is not a result"
    )
    lines = [
        "Does importance masking help?",
        "",
        f"{run.features.describe()}; {len(run.seeds)} seeds, {len(run.holdouts)} held-out domains.",
        "Headline: last epoch, all images of the held-out domain, mean over the holdouts, paired by seed.",
        "",
        *(line for text in summary(tables, epochs) + cautions(tables, short) for line in textwrap.wrap(text, 118)),
        "",
        *EXPLANATION.format(covered=covered(run.settings.split_seed)).splitlines(),
        *section(f"Confirmatory family, {epochs[0]} epochs", family_shown(tables["contrasts"])),
        *section(f"Confirmatory family, {epochs[1]} epochs", family_shown(tables["contrasts_longer"])),
        *section(f"Accuracy (%), {epochs[0]} epochs", wide_table(tables["accuracy"])),
        *section(f"Accuracy (%), {epochs[1]} epochs", wide_table(tables["accuracy_longer"])),
        *section(f"Linear probe ({probe_words(probe, run.data)}; %)", (100 * accuracy.astype(float)).round(2)),
        f"Chance is {100 * levels(run.facts['counts'])[0]:.1f} %.",
        *section(f"EXPLORATORY: the other controls, {epochs[0]} epochs (points)", _points(tables["controls"])),
        *section("EXPLORATORY: the family's contrasts per domain (points)", _by_domain(tables["per_domain"])),
        *section(f"EXPLORATORY: one split for all seeds, {FAMILY[0].name} (points)", splits_shown(tables["splits"])),
        *section(f"{sweep_title}; %", _per_cent(tables["sweep"])),
        *section("Overlap (IoU) of the domains' masks, same start", tables["domain_overlap"].round(3)),
        f"Chance: {chance_overlap(run):.3f}",
        *section("Overlap of a domain's masks between different starts", tables["seed_stability"].round(3)),
        *section("Weights that never moved", tables["zero_importance"].round(3)),
        *section("Density of the masks", tables["mask_density"].round(3)),
    ]
    lines += failures_shown((short, long, *others))
    return "\n".join(lines) + "\n"


def _per_cent(sweep: pd.DataFrame) -> pd.DataFrame:
    """The sweep's accuracies for reading."""
    columns = ["mean", "low", "high"]
    return sweep.assign(**{name: (100 * sweep[name]).round(2) for name in columns})


def write_report(
    results: Results, tables: Mapping[str, pd.DataFrame], text: str, optional: Collection[str] = ()
) -> None:
    """Write tables (CSV, by name) and ``report.txt`` into a directory; of the `optional` ones the others go."""
    with results:
        for name in {*optional} - tables.keys():
            (results.directory / f"{name}.csv").unlink(missing_ok=True)
        for name, table in tables.items():
            csv = table.to_csv(float_format="%.6g", index=table.index.name is not None)
            results.write_text(f"{name}.csv", csv)
        results.write_text("report.txt", text)


def family_shown(table: pd.DataFrame) -> pd.DataFrame:
    """A `statistics.family` for reading: a row per contrast with its difference in points, corrected p and verdict."""
    shown = table.set_index("contrast").assign(difference=[interval(row) for row in table.itertuples()])
    shown = shown.assign(p=shown["p_holm"].map("{:.2g}".format))
    return shown[["difference", "p", "n", "verdict"]].rename(
        columns={"difference": "difference (points)", "p": "corrected p", "n": "seeds"}
    )


def _points(table: pd.DataFrame) -> pd.DataFrame:
    """Differences in points, for reading."""
    return table.set_index("contrast").assign(difference=[interval(row) for row in table.itertuples()])[
        ["n", "difference"]
    ]


def splits_shown(table: pd.DataFrame) -> pd.DataFrame:
    """`contrasts.splits_table` for reading: accuracy in per cent, the difference in points with its interval."""
    shown = table.set_index("split").assign(difference=[interval(row) for row in table.itertuples()])
    return shown.assign(erm=(100 * shown["erm"]).round(1))[["n", "erm", "difference"]].rename(columns={"n": "seeds"})


def _by_domain(table: pd.DataFrame) -> pd.DataFrame:
    """A row per contrast and length, a column per domain."""
    shown = table.assign(text=[interval(row) for row in table.itertuples()])
    order: Sequence[str] = list(dict.fromkeys(table["holdout"]))
    wide = shown.pivot(index=["epochs", "contrast"], columns="holdout", values="text")[order]
    return wide.loc[list(dict.fromkeys(zip(table["epochs"], table["contrast"], strict=True)))]


def failures_shown(studies: Iterable[Study]) -> list[str]:
    """A line on the networks that failed, if any did."""
    failures = [text for study in studies for text in study.failures()]
    return [f"{len(failures)} networks failed and are left out, first: {failures[0]}."] if failures else []


def section(title: str, table: pd.DataFrame) -> list[str]:
    """The lines of a table under its title."""
    return ["", title, "-" * min(len(title), 100), table.to_string()]

"""What the protocol's tables say: sentences computed from them, and the report."""

import textwrap
from collections.abc import Mapping, Sequence

import pandas as pd

from evidence.contrasts import OTHERS
from evidence.diagnostics import chance_overlap
from evidence.statistics import MARGIN
from study import AVERAGE, ERM, IMPORTANCE, Arm, Study, levels, t_interval, wide_table

SIGNIFICANT = 0.05  # of the Holm-corrected p
EXPLANATION = """\
Intervals (95 %; of the family percentile bootstrap over seeds, of the other tables Student's t) cover
starts and batch orders, and are conditional on these images, this split and this backbone. The words
follow the interval of each contrast alone; a claim about the family rests on the Holm-corrected p. With
a fresh start the units mean nothing that a mask could know: a difference there can only come from the
structure of the mask."""
LENGTH_ARMS = (ERM, IMPORTANCE, Arm("erm", "phase1"), Arm("importance", "phase1"))  # shown at both lengths


def sentences(table: pd.DataFrame, epochs: int) -> list[str]:
    """One computed sentence per contrast."""
    return [
        f"{epochs} epochs, {row.contrast}: {row.verdict}; {100 * row.mean:+.2f} points "
        f"[{100 * row.low:+.2f}, {100 * row.high:+.2f}], Holm-corrected p = {row.p_holm:.3g}, {row.n} seeds."
        for row in table.itertuples()
    ]


def family_sentence(table: pd.DataFrame, epochs: int) -> str:
    """How often each verdict was reached, and which contrasts stand after Holm's correction.

    Args:
        table: see `statistics.family`.
        epochs: of Phase 2.
    """
    small = f"makes no difference larger than {100 * MARGIN:g} points"
    kinds = {"helps": "helps", "hurts": "hurts", small: "no difference"}
    parts = [f"{words} in {table['verdict'].str.startswith(start).sum()}" for words, start in kinds.items()]
    parts.append(f"is undecided in {table['verdict'].str.startswith('undecided').sum()}")
    text = f"At {epochs} epochs importance masking {', '.join(parts[:-1])} and {parts[-1]} of {len(table)} contrasts"
    chosen = table[table["p_holm"] < SIGNIFICANT]
    stand = ", ".join(f"{row.contrast} ({'above' if row.mean > 0 else 'below'} 0)" for row in chosen.itertuples())
    return f"{text}; after Holm's correction (p < {SIGNIFICANT}) stand: {stand or 'none'}."


def controls_sentence(table: pd.DataFrame, epochs: int) -> str:
    """Which controls outside the family importance masking is above and below.

    Args:
        table: see `contrasts.others_table`.
        epochs: of Phase 2.
    """
    baselines = {contrast.name: contrast.baseline.name for contrast in OTHERS}

    def named(rows: pd.DataFrame) -> str:
        return ", ".join(f"{baselines[row.contrast]} ({interval(row)})" for row in rows.itertuples()) or "none"

    above, below = table[table["low"] > 0], table[table["high"] < 0]
    return (
        f"EXPLORATORY, {epochs} epochs, the other controls, each from its own start: importance masking is above "
        f"{named(above)} and below {named(below)}; the other intervals include 0."
    )


def length_sentence(held_out: pd.DataFrame, sources: pd.DataFrame, epochs: tuple[int, int]) -> str:
    """What more training changes, on the held-out domains and on the sources.

    Args:
        held_out: accuracy at the greater minus that at the smaller length, seeds × arms, fractions.
        sources: the same on the `out` part of the source domains.
        epochs: the two lengths.
    """
    parts = []
    for arm in held_out:
        here, there = (in_points(*t_interval(table[arm].dropna())) for table in (held_out, sources))
        parts.append(f"{arm} {here} on the held-out domains, {there} on the sources' `out` part")
    return f"EXPLORATORY, from {epochs[0]} to {epochs[1]} epochs accuracy changes (points): {'; '.join(parts)}."


def probe_sentence(probe: pd.DataFrame, accuracies: Mapping[int, pd.DataFrame]) -> str:
    """Where logistic regression stands beside the best network of any length (epochs -> `lodo_table`)."""
    means = {
        f"{row.algorithm}, {epochs} epochs": row.mean
        for epochs, table in accuracies.items()
        for row in table[table["holdout"] == AVERAGE].itertuples()
    }
    best, value = max(means, key=means.get), probe["full"].mean()
    place = "above every network" if value > means[best] else "not above the best network"
    return (
        f"Logistic regression on the same features reaches {100 * value:.1f} %, {place}; "
        f"the best network ({best}) has {100 * means[best]:.1f} %."
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


def interval(row) -> str:
    """Mean and interval of a row of `itertuples` in points: "+0.97 [+0.65, +1.29]"."""
    return in_points(row.mean, row.low, row.high)


def in_points(mean: float, low: float, high: float) -> str:
    """A mean and its interval, given as fractions, in points: "+0.97 [+0.65, +1.29]"."""
    return f"{100 * mean:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]".replace("-", "−")


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


def report(tables: Mapping[str, pd.DataFrame], short: Study, long: Study, sweep: Study) -> str:
    """The finding in plain sentences, then the tables.

    Args:
        tables: see `protocol.Protocol.tables`.
        short, long, sweep: the protocol's studies, trained.
    """
    run = short.run
    epochs = run.settings.ph2_num_epochs, long.run.settings.ph2_num_epochs
    lines = [
        "Does importance masking help?",
        "",
        f"{run.features.describe()}; {len(run.seeds)} seeds, {len(run.holdouts)} held-out domains.",
        "Headline: last epoch, all images of the held-out domain, mean over the holdouts, paired by seed.",
        "",
        *(line for text in summary(tables, epochs) for line in textwrap.wrap(text, 118)),
        "",
        *sentences(tables["contrasts"], epochs[0]),
        *sentences(tables["contrasts_longer"], epochs[1]),
        "",
        *EXPLANATION.splitlines(),
        *_confirmatory(tables, epochs),
        f"Chance is {100 * levels(run.facts['counts'])[0]:.1f} %.",
        *_exploratory(tables, epochs),
        *_section("Overlap (IoU) of the domains' masks, same start", tables["domain_overlap"].round(3)),
        f"Chance: {chance_overlap(run):.3f}",
        *_section("Overlap of a domain's masks between different starts", tables["seed_stability"].round(3)),
        *_section("Weights that never moved", tables["zero_importance"].round(3)),
        *_section("Density of the masks", tables["mask_density"].round(3)),
    ]
    if failures := [text for study in (short, long, sweep) for text in study.failures()]:
        lines += [f"{len(failures)} networks failed and are left out, first: {failures[0]}."]
    return "\n".join(lines) + "\n"


def _confirmatory(tables: Mapping[str, pd.DataFrame], epochs: tuple[int, int]) -> list[str]:
    """The family, the accuracies, and the linear probe."""
    return [
        *_section(f"Confirmatory family, {epochs[0]} epochs (points)", _points(tables["contrasts"])),
        *_section(f"Confirmatory family, {epochs[1]} epochs (points)", _points(tables["contrasts_longer"])),
        *_section(f"Accuracy (%), {epochs[0]} epochs", wide_table(tables["accuracy"])),
        *_section(f"Accuracy (%), {epochs[1]} epochs", wide_table(tables["accuracy_longer"])),
        *_section("Linear probe (logistic regression on the features; deterministic)", tables["linear_probe"].round(4)),
    ]


def _exploratory(tables: Mapping[str, pd.DataFrame], epochs: tuple[int, int]) -> list[str]:
    """Other controls, single domains, and the sweep."""
    sweep = tables["sweep"]
    return [
        *_section(f"EXPLORATORY: the other controls, {epochs[0]} epochs (points)", _points(tables["controls"])),
        *_section("EXPLORATORY: the family's contrasts per domain (points)", _by_domain(tables["per_domain"])),
        *_section(
            f"EXPLORATORY: one setting at a time, {sweep['n'].max()} seeds, accuracy averaged over the holdouts; "
            "the best point is not a result",
            sweep.round(4),
        ),
    ]


def _points(table: pd.DataFrame) -> pd.DataFrame:
    """Differences in points, for reading."""
    shown = table.assign(**{name: (100 * table[name]).round(2) for name in ("mean", "low", "high")})
    return shown.assign(
        **{name: shown[name].map("{:.2g}".format) for name in ("p", "p_holm") if name in shown}
    ).set_index("contrast")


def _by_domain(table: pd.DataFrame) -> pd.DataFrame:
    """A row per contrast and length, a column per domain."""
    shown = table.assign(text=[interval(row) for row in table.itertuples()])
    order: Sequence[str] = list(dict.fromkeys(table["holdout"]))
    wide = shown.pivot(index=["epochs", "contrast"], columns="holdout", values="text")[order]
    return wide.loc[list(dict.fromkeys(zip(table["epochs"], table["contrast"], strict=True)))]


def _section(title: str, table: pd.DataFrame) -> list[str]:
    return ["", title, "-" * min(len(title), 100), table.to_string()]

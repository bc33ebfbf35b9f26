"""Forms of importance as arms, and the tables that compare them with their random twins and plain training.

A *form* is a criterion of `importance.CRITERIA` at a density, per cent; its *twin* is random positions with the form's
own count in each matrix.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

import pandas as pd

from config import STARTS
from evidence.contrasts import seed_averages
from evidence.report import in_points
from importance import CRITERIA, SCOPES, mask_size
from study import Arm, Run, t_interval

Form = tuple[str, float]  # a criterion and a density, per cent
TWIN = "random_layer"
CLOSER = 2  # forms that are looked at closer


def form(control: str, criterion: str, density: float, scope: str | None = None) -> Arm:
    """The arm of a criterion at a density, per cent: `importance` itself or a control; `scope`: of the mask."""
    changes = {"IMPORTANCE_CRITERION": criterion, "IMPORTANCE_THRESHOLD_PERCENTILE": density}
    return Arm(control, None, changes | ({} if scope is None else {"MASK_SCOPE": scope}))


def label(arm: Arm) -> str:
    """How tables call an arm: "importance fisher 10 %", "erm @merged_mean"."""
    changes = (f"{value} %" if isinstance(value, float) else value for _, value in arm.changes)
    return " ".join([arm.control, *changes, *([f"@{arm.start}"] if arm.start else [])])


def forms_at(densities: Sequence[float]) -> tuple[Form, ...]:
    """Every criterion at the densities, per cent."""
    return tuple((criterion, float(density)) for criterion in CRITERIA for density in dict.fromkeys(densities))


def differences(records: Sequence[Mapping], forms: Sequence[Form]) -> pd.DataFrame:
    """Each form minus its twin, from labelled records: mean, low, high (fractions) by (criterion, density)."""
    averages, rows = seed_averages(records), {}
    for own in forms:
        arm, twin = (averages[label(form(control, *own))] for control in ("importance", TWIN))
        rows[own] = t_interval((arm - twin).dropna())
    return pd.DataFrame.from_dict(rows, orient="index", columns=["mean", "low", "high"])


def forms_table(records: Sequence[Mapping], run: Run, forms: Sequence[Form]) -> pd.DataFrame:
    """Accuracy of plain training and of every form, and form minus twin and minus plain training.

    Returns:
        criterion, density (per cent; 100 for plain training), trained (number of parameters that learn at the full
        rate), n (seeds), and mean, low, high of accuracy, of "minus twin" and of "minus erm" with the prefixes
        ``twin_`` and ``erm_``; fractions, with 95 % t intervals over seeds.
    """
    averages = seed_averages(records)
    tracked = sum(layer.numel() for layer in run.network.tracked(dict(run.network.named_parameters())))
    plain = averages["erm"].dropna()
    rows = [("erm", 100.0, run.network.size, len(plain), *t_interval(plain), *[float("nan")] * 6)]
    for criterion, density in forms:
        own, twin = (averages[label(form(control, criterion, density))] for control in ("importance", TWIN))
        against = [t_interval((own - other).dropna()) for other in (twin, averages["erm"])]
        learns = run.network.size - tracked + mask_size(tracked, density)
        rows.append((criterion, density, learns, own.count(), *t_interval(own.dropna()), *against[0], *against[1]))
    names = [f"{prefix}{name}" for prefix in ("", "twin_", "erm_") for name in ("mean", "low", "high")]
    return pd.DataFrame(rows, columns=["criterion", "density", "trained", "n", *names])


def sentences(table: pd.DataFrame, part: str) -> list[str]:
    """What a part's `forms_table` says, in plain sentences."""
    erm, forms = table[table["criterion"] == "erm"].iloc[0], table[table["criterion"] != "erm"]
    above, below = forms[forms["twin_low"] > 0], forms[forms["twin_high"] < 0]
    best = forms.loc[forms["mean"].idxmax()]
    over = forms[forms["erm_low"] > 0]
    twins = "its random twin" if len(above) == 1 else "their random twins"
    return [
        f"{part}: of {len(forms)} forms, {_lying(above)} above {twins}{_named(above)}, {_lying(below)} below"
        f"{_named(below)}; {_lying(over)} above plain training{_named(over)}, which has {100 * erm['mean']:.1f} %.",
        f"{part}: the best mean is that of {best['criterion']} at {best['density']:g} % ({100 * best['mean']:.1f} %): "
        f"{points(best, 'twin')} points over its twin, {points(best, 'erm')} over plain training.",
    ]


def ranks_sentence(parts: Mapping[str, pd.DataFrame]) -> str:
    """Whether the same forms are above their twins everywhere: rank correlations between parts' `forms_table`."""
    twins = {part: table.set_index(["criterion", "density"])["twin_mean"].dropna() for part, table in parts.items()}
    found = []
    for one, other in combinations(twins, 2):
        both = pd.concat([twins[one], twins[other]], axis=1, join="inner")
        rank = f"{both.corr('spearman').iloc[0, 1]:+.2f}".replace("-", "−")
        found.append(f"{rank} between {one} and {other} ({len(both)} forms)")
    return f"Spearman's rank correlation of form minus twin: {', '.join(found)}."


def _lying(forms: pd.DataFrame) -> str:
    return {0: "none lies", 1: "1 lies"}.get(len(forms), f"{len(forms)} lie")


def _named(forms: pd.DataFrame) -> str:
    names = ", ".join(f"{row.criterion} {row.density:g} %" for row in forms.itertuples())
    return f" ({names})" if names else ""


def points(row: pd.Series, prefix: str) -> str:
    """A difference of a table's row, given by the prefix of its columns, in points."""
    return in_points(*(row[f"{prefix}_{name}"] for name in ("mean", "low", "high")))


def forms_shown(table: pd.DataFrame) -> pd.DataFrame:
    """A `forms_table` for reading."""
    rows = [
        (
            row["criterion"],
            f"{row['density']:g}",
            f"{row['trained']:,}",
            row["n"],
            f"{100 * row['mean']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]",
            points(row, "twin"),
            points(row, "erm"),
        )
        for _, row in table.iterrows()
    ]
    columns = ["criterion", "marked (%)", "parameters at full rate", "seeds", "accuracy (%)", "minus twin", "minus ERM"]
    return pd.DataFrame(rows, columns=columns).set_index("criterion")


def forms_wide(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The forms of several parts or places side by side.

    Args:
        tables: `forms_table` of each, with its name in the column "part" or "place".

    Returns:
        criterion, marked (%), and a column for each table with "accuracy (minus twin, minus ERM)": per cent, and points
        with a star where the 95 % interval excludes 0. Empty where a form was not trained.
    """

    def starred(row: pd.Series, prefix: str) -> str:
        apart = row[f"{prefix}_low"] > 0 or row[f"{prefix}_high"] < 0
        return f"{100 * row[f'{prefix}_mean']:+.1f}{'*' * apart}".replace("-", "−")

    columns = {}
    for table in tables:
        name = table["part" if "part" in table else "place"].iloc[0]
        columns[name] = {
            (row["criterion"], row["density"]): f"{100 * row['mean']:.1f}"
            + ("" if row["criterion"] == "erm" else f" ({starred(row, 'twin')}, {starred(row, 'erm')})")
            for _, row in table.iterrows()
        }
    forms = dict.fromkeys(own for column in columns.values() for own in column)
    order = sorted(
        forms, key=lambda own: (own[0] != "erm", list(CRITERIA).index(own[0]) if own[0] in CRITERIA else -1, -own[1])
    )
    rows = [
        (criterion, f"{density:g}", *(column.get((criterion, density), "") for column in columns.values()))
        for criterion, density in order
    ]
    return pd.DataFrame(rows, columns=["criterion", "marked (%)", *columns])


def best_forms(table: pd.DataFrame) -> list[Form]:
    """The forms of a `forms_table` that are farthest above their twins, of those trained on most seeds."""
    forms = table[(table["criterion"] != "erm") & (table["n"] == table.loc[table["criterion"] != "erm", "n"].max())]
    best = forms.sort_values("twin_mean", ascending=False, kind="stable").head(CLOSER)
    return [(row.criterion, row.density) for row in best.itertuples()]


def closer_arms(forms: Sequence[Form]) -> list[Arm]:
    """Forms, their twins and two more controls, and the same forms and twins with masks of other scopes."""
    arms = [form(control, *own) for own in forms for control in ("importance", TWIN, "permuted", "inverted")]
    scoped = [form(control, *own, scope) for own in forms for scope in SCOPES[1:] for control in ("importance", TWIN)]
    return arms + scoped


def start_arms() -> list[Arm]:
    """Plain training and the project's own mask, from every start."""
    return [Arm(control, start) for start in STARTS for control in ("erm", "importance")]


def starts_table(records: Sequence[Mapping]) -> pd.DataFrame:
    """Accuracy from every start, from labelled records of `start_arms`.

    Returns:
        start, arm, n, mean, low, high, and "minus fresh", the same arm from a fresh start, with the prefix ``fresh_``;
        fractions, with 95 % t intervals.
    """
    averages, rows = seed_averages(records), []
    for arm in start_arms():
        own, fresh = (averages[label(a)] for a in (arm, Arm(arm.control, "fresh")))
        rows.append(
            (arm.start, arm.control, own.count(), *t_interval(own.dropna()), *t_interval((own - fresh).dropna()))
        )
    names = [f"{prefix}{name}" for prefix in ("", "fresh_") for name in ("mean", "low", "high")]
    return pd.DataFrame(rows, columns=["start", "arm", "n", *names])


def starts_shown(table: pd.DataFrame) -> pd.DataFrame:
    """A `starts_table` for reading: accuracy in per cent, minus a fresh start in points."""
    rows = [
        (
            row["start"],
            row["arm"],
            row["n"],
            f"{100 * row['mean']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]",
            "" if row["start"] == "fresh" else points(row, "fresh"),
        )
        for _, row in table.iterrows()
    ]
    columns = ["start", "arm", "seeds", "accuracy (%)", "minus fresh start"]
    return pd.DataFrame(rows, columns=columns).set_index("start")


def closer_table(records: Sequence[Mapping], forms: Sequence[Form]) -> pd.DataFrame:
    """Forms beside more controls and in other scopes, from labelled records of `closer_arms`.

    Returns:
        criterion, density, difference (in words), n, mean, low, high (fractions, 95 % t intervals).
    """
    averages, rows = seed_averages(records), []
    for own in forms:
        here = form("importance", *own)
        pairs = {f"global − {control}": (here, form(control, *own)) for control in ("permuted", "inverted")}
        for scope in SCOPES[1:]:
            there = form("importance", *own, scope)
            pairs |= {f"{scope} − its twin": (there, form(TWIN, *own, scope)), f"{scope} − global": (there, here)}
        for words, (one, other) in pairs.items():
            values = (averages[label(one)] - averages[label(other)]).dropna()
            rows.append((*own, words, len(values), *t_interval(values)))
    return pd.DataFrame(rows, columns=["criterion", "density", "difference", "n", "mean", "low", "high"])


def closer_shown(table: pd.DataFrame) -> pd.DataFrame:
    """A `closer_table` for reading: a row per form, a column per difference, in points."""
    texts = [in_points(row.mean, row.low, row.high) for row in table.itertuples()]
    forms = [f"{row.criterion} {row.density:g} %" for row in table.itertuples()]
    wide = table.assign(form=forms, text=texts).pivot(index="form", columns="difference", values="text")
    return wide.loc[list(dict.fromkeys(forms)), list(dict.fromkeys(table["difference"]))]

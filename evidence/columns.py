"""Importance of features: which columns of all layers of a ViT carry over to a new domain, fixed in advance.

Head2Toe (Evci, Dumoulin, Larochelle & Mozer, ICML 2022) in the form of domain generalization, on features of all layers
(`FEATURE_LAYERS` = "all"). Each layer, that is the ``[CLS]`` or the mean patch of one block, is scaled to norm 1 in
every image. *Phase 1:* logistic regression with L2 on each source domain's `in` part, per seed, C = `PHASE1_STRENGTH`;
the importance of a column is Σ_c W_c², the weights centred over classes, which is what it moved from zero, squared. It
is aggregated over the source domains by "sum", the project's rule, or by "min", which asks for importance in each of
them. *Phase 2:* logistic regression on the 60, 20, 5 or 1 % of the columns with the largest importance, all source
domains' `in` parts pooled; tested on all images of the held-out domain.

*Arms:* all columns; the last ``[CLS]`` alone; the best single layer; both criteria at the four densities, and their
controls: `random_layer` keeps as many columns of each layer, drawn from the seed's own stream (columns of a layer have
no further order, so that permuting them is the same), `inverted` those of least importance.
*Selection:* C, and the best layer, by the accuracy on the sources' `out` part, mean over source domains and the first
`CHOOSING_SEEDS` seeds, per arm and held-out domain; the other seeds are fitted with that C alone.
*Headline:* all images of the held-out domain, mean over the holdouts, paired by seed.
*Confirmatory family:* `min` − its `random_layer` at 5 % and at 20 %, `min` at 20 % − all columns, all columns − last
``[CLS]``, with Holm's correction over the four. Everything else is exploratory.
"""

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from logging import getLogger
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import normalize

import config
from config import InputError
from engine import accuracies, fit_linear, training_threads
from evidence.contrasts import seed_averages
from evidence.report import (
    PLUS_MINUS,
    by_density,
    contrast_sentences,
    edge_sentences,
    family_shown,
    section,
    write_report,
)
from evidence.statistics import LEVEL, family
from importance import aggregate, top_k_mask
from storage import FeatureSet
from study import (
    AVERAGE,
    FEWEST_SEEDS,
    Counted,
    Run,
    check_seeds,
    lodo_table,
    make_records,
    random_layer_mask,
    t_interval,
    wide_table,
)

log = getLogger(__name__)

STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0)  # of C in Phase 2
PHASE1_STRENGTH = 1.0
CHOOSING_SEEDS = 2  # the first ones
CRITERIA = ("sum", "min")
CONTROLS = ("random_layer", "inverted")
DENSITIES = (60.0, 20.0, 5.0, 1.0)  # per cent of the columns that are kept
ALL, LAST, BEST = "all", "last cls", "best layer"
FAMILY = (
    ("min 5 %", "min random_layer 5 %"),
    ("min 20 %", "min random_layer 20 %"),
    ("min 20 %", ALL),
    (ALL, LAST),
)
SHOWN = 5.0  # density at which the report shows the share kept of each layer
EXPLANATION = f"""\
The words "helps" and "hurts" need an interval on one side of 0, p < {LEVEL} after Holm's correction over the
family of four, and {FEWEST_SEEDS} seeds; "no difference" is not corrected. {PLUS_MINUS}
Intervals (95 %; of the family percentile bootstrap over seeds, else Student's t) cover splits and draws of columns,
and are conditional on images, backbone, and the values of C that the first seeds chose."""


class Layout(NamedTuple):
    """What the columns of features of all layers are: ``[blocks, kinds, width]``."""

    blocks: int
    kinds: tuple[str, ...]
    width: int

    @classmethod
    def of(cls, features: FeatureSet) -> "Layout":
        """As the header of the features says; an `InputError` if they are not of all layers."""
        about = features.header.get("layers")
        try:
            found = cls(int(about["blocks"]), tuple(map(str, about["kinds"])), int(about["width"]))
        except (TypeError, KeyError, ValueError):
            found = None
        if found is None or len(found.layers) * found.width != features.feature_size:
            raise InputError(
                "Importance of features needs those of all layers: set FEATURE_LAYERS=all with --data-root, or give a "
                "file of such features with --features."
            )
        return found

    @property
    def layers(self) -> tuple[str, ...]:
        """Names in the order of the columns: "block 1 cls", "block 1 mean", …"""
        return tuple(f"block {block} {kind}" for block in range(1, self.blocks + 1) for kind in self.kinds)

    def split(self, columns: Tensor) -> list[Tensor]:
        """A number per column ``[D]`` -> layers, each ``[1, width]`` as those of a network."""
        return [*columns.view(-1, 1, self.width)]


class Choice(NamedTuple):
    """Which columns are kept: of one layer, or by a criterion or its control at a density; all where neither is."""

    layer: str = ""
    criterion: str = ""
    control: str = ""
    density: float = 100.0

    @property
    def name(self) -> str:
        """How records and tables call it: "all", "block 3 mean", "min random_layer 5 %"."""
        masked = [self.criterion, self.control, f"{self.density:g} %"] if self.criterion else []
        return self.layer or " ".join(filter(None, masked)) or ALL

    def at(self, strength: float) -> str:
        """Name of its records with a value of C."""
        return f"{self.name}[C={strength:g}]"


def arms_of(layout: Layout) -> dict[str, tuple[Choice, ...]]:
    """Arm -> the choices of columns among which it takes the best on the sources; all but one have only one."""
    masks = [
        Choice(criterion=criterion, control=control, density=density)
        for criterion in CRITERIA
        for control in ("", *CONTROLS)
        for density in DENSITIES
    ]
    single = tuple(Choice(layer) for layer in layout.layers)
    last = Choice(f"block {layout.blocks} {layout.kinds[0]}")
    return {ALL: (Choice(),), LAST: (last,), BEST: single} | {choice.name: (choice,) for choice in masks}


def column_importance(weights: Tensor) -> Tensor:
    """How much each column matters to a linear classifier: Σ_c W_c² of weights centred over classes.

    Centred, because weights that are the same for all classes change no prediction.

    Args:
        weights: ``[classes, D]``.

    Returns:
        ``[D]``.
    """
    return (weights - weights.mean(0)).square().sum(0)


def kept_columns(
    choice: Choice, layout: Layout, importances: Sequence[Tensor], seed: int = 0, holdout: str = ""
) -> Tensor:
    """The columns of a choice: bool ``[D]``.

    Args:
        importances: of each source domain, ``[D]``; of no effect on a choice without a criterion.
        seed, holdout: name the random stream.
    """
    if not choice.criterion:
        whole = [torch.full((1, layout.width), choice.layer in ("", layer)) for layer in layout.layers]
        return torch.cat(whole, dim=1)[0]
    scores = aggregate([layout.split(values) for values in importances], choice.criterion)
    if choice.control == "inverted":
        scores = [-layer for layer in scores]
    mask = top_k_mask(scores, choice.density)
    if choice.control == "random_layer":
        mask = random_layer_mask(seed, holdout, mask)
    return torch.cat(mask, dim=1)[0]


class ColumnProtocol:
    """Fits what is missing of both phases, and says what it shows; resumable, an arm, holdout and seed at a time.

    ``importance/columns_<domain>`` keeps Phase 1's importance of each seed, ``records.jsonl`` a record for each choice
    of columns and C (`Choice.at`), holdout and seed, with "columns", their number, and "C".

    Args:
        run: features of all layers, seeds and holdouts, and how it is carried out; of its settings only
            `OUT_FRACTION` has an effect.

    Raises:
        InputError: features that are not of all layers, fewer than two seeds or source domains, or one split for all.
    """

    def __init__(self, run: Run):
        self.run, self.layout = run, Layout.of(run.features)
        check_run(run.seeds, run.settings.split_seed)
        self.arms = arms_of(self.layout)
        layers = run.data.features.to(run.data.dtype).view(len(run.features), -1, self.layout.width)
        self.columns = normalize(layers, dim=2).flatten(1).T.contiguous()  # [D, N]: columns are taken, then rows

    @classmethod
    def from_config(
        cls,
        seeds: Sequence[int] | None = None,
        directory: str | Path | None = None,
        *,
        overwrite: bool = False,
        verify: bool = False,
    ) -> "ColumnProtocol":
        """The protocol at the constants of `config`.

        Args:
            seeds: default 0 … `NUM_SEEDS` − 1.
            directory: default ``columns`` below `RESULTS_DIR`.
            overwrite, verify: see `study.Run.from_config`.
        """
        seeds = check_seeds(range(config.NUM_SEEDS) if seeds is None else seeds)
        check_run(seeds, config.SPLIT_SEED)
        directory = Path(config.RESULTS_DIR) / "columns" if directory is None else Path(directory)
        options = {"overwrite": overwrite, "verify": verify, "check": Layout.of}
        return cls(Run.from_config(seeds, directory=directory, **options))

    def train(self) -> None:
        """Fit what is missing."""
        self._phase1()
        first, later = self.run.seeds[:CHOOSING_SEEDS], self.run.seeds[CHOOSING_SEEDS:]
        every = dict.fromkeys(choice for choices in self.arms.values() for choice in choices)
        wanted = [(choice, holdout, STRENGTHS) for holdout in self.run.holdouts for choice in every]
        self._phase2([(*what, (seed,)) for seed in first for what in wanted])
        if later:
            chosen = {(row.choice, row.holdout, row.C) for row in self.chosen().itertuples()}
            taken = [(c, h, tuple(s for s in STRENGTHS if (c.name, h, s) in chosen)) for c, h, _ in wanted]
            self._phase2([(*what, (seed,)) for seed in later for what in taken])

    def _phase1(self) -> None:
        """Importance of the columns on each domain that is a source, for the seeds that lack it."""
        run = self.run
        known = {domain: self.importances(domain).keys() for domain in run.domains}
        units = [(domain, (seed,)) for seed in run.seeds for domain in run.domains if seed not in known[domain]]
        with run.writing(units):
            found = run.side_by_side("Phase 1", units, self._importance, 1, self.columns.numel() // 4, "fit")
            for (domain, seeds), scores in zip(units, found, strict=True):
                arrays = {"scores": scores[None]}
                run.results.save("importance", f"columns_{domain}", seeds, arrays, run.archive.header)

    def _importance(self, unit: tuple[str, tuple[int]], tick: Callable[[], object]) -> Tensor:
        domain, seeds = unit
        rows, y = self.run.data.rows([domain], "in", seeds)[0], self.run.data.labels
        with training_threads(self.run.execution.threads):
            fitted = fit_linear(self.columns[:, rows].T, y[rows], self._classes, [PHASE1_STRENGTH])
        tick()
        return column_importance(fitted.weights[0]).cpu()

    @property
    def _classes(self) -> int:
        return self.run.features.num_classes

    def importances(self, domain: str) -> dict[int, Tensor]:
        """Phase 1's importance on a domain, by the seeds that there is one of: ``[D]``."""
        if not self.run.results.has("importance", f"columns_{domain}"):
            return {}
        arrays, _ = self.run.results.load("importance", f"columns_{domain}")
        return dict(zip(arrays["seeds"].tolist(), arrays["scores"], strict=True))

    def _phase2(self, units: Iterable[tuple[Choice, str, Sequence[float], tuple[int]]]) -> None:
        """Fit those values of C of which there is no record."""
        run = self.run
        known = {(r["algorithm"], r["holdout"], r["seed"]) for r in run.records()}
        units = [
            (choice, holdout, missing, seeds)
            for choice, holdout, strengths, seeds in units
            if (missing := [c for c in strengths if (choice.at(c), holdout, *seeds) not in known])
        ]
        if not units:
            return
        scores = {domain: self.importances(domain) for domain in run.domains}

        def fit(unit: tuple, tick: Callable[[], object]) -> list[dict]:
            records = self._fit(*unit, [scores[source][unit[-1][0]] for source in run.data.sources(unit[1])])
            tick()
            return records

        log.info("%d fits.", sum(len(missing) for _, _, missing, _ in units))
        with run.writing(units):
            for records in run.side_by_side("Phase 2", units, fit, 1, self.columns.numel() // 4, "arm"):
                run.results.append(records)

    def _fit(
        self, choice: Choice, holdout: str, strengths: Sequence[float], seeds: tuple[int], scores: Sequence[Tensor]
    ) -> list[dict]:
        """A record for each value of C."""
        run, data = self.run, self.run.data
        sources, (seed,) = data.sources(holdout), seeds
        kept = kept_columns(choice, self.layout, scores, seed, holdout).to(self.columns.device)
        rows = data.rows(sources, "in", seeds)[0]
        with training_threads(run.execution.threads):
            x = self.columns[kept]
            right = fit_linear(x[:, rows].T, data.labels[rows], self._classes, strengths).predict(x.T) == data.labels
        size, own, records = data.totals.numel(), [data.domain_names.index(name) for name in sources], []
        for strength, answers in zip(strengths, right, strict=True):
            correct = torch.bincount(data.cells(seeds)[0][answers], minlength=size).view(data.cell_shape).cpu()
            validation = accuracies(correct, data.totals.cpu())["out"][own].mean()
            counted = Counted(seeds, validation.view(1, 1), correct[None, None], torch.zeros(1, dtype=torch.long))
            more = {"columns": int(kept.sum()), "C": strength}
            records += make_records(run, choice.at(strength), [holdout], counted, more, selections=("last",))
        return records

    def chosen(self) -> pd.DataFrame:
        """`chosen_strengths` of all arms, by the first seeds."""
        first = [r for r in self.run.records() if r["seed"] in self.run.seeds[:CHOOSING_SEEDS]]
        return chosen_strengths(first, self.arms, self.run.holdouts)

    def tables(self) -> dict[str, pd.DataFrame]:
        """Everything the report says in numbers, by file name."""
        chosen = self.chosen()
        records = at_chosen(self.run.records(), chosen)
        averages = seed_averages(records)[list(self.arms)]
        pairs = {f"{arm} − {baseline}": averages[arm] - averages[baseline] for arm, baseline in FAMILY}
        return {
            "chosen": chosen,
            "seeds": averages,
            "accuracy": lodo_table(records),
            "contrasts": family(pairs),
            "densities": densities_table(averages, self.layout),
            "layers": self.layers_table(),
        }

    def layers_table(self) -> pd.DataFrame:
        """Exploratory: where the kept columns are.

        Returns:
            criterion, density (per cent), layer, share: of the layer's columns, mean over seeds and holdouts, a
            fraction.
        """
        scores, rows = {domain: self.importances(domain) for domain in self.run.domains}, []
        units = [(holdout, seed) for holdout in self.run.holdouts for seed in self.run.seeds]
        for choice in (Choice("", criterion, "", density) for criterion in CRITERIA for density in DENSITIES):
            masks = [
                kept_columns(choice, self.layout, [scores[source][seed] for source in self.run.data.sources(holdout)])
                for holdout, seed in units
            ]
            shares = torch.stack(masks).float().mean(0).view(-1, self.layout.width).mean(1)
            names = zip(self.layout.layers, shares.tolist(), strict=True)
            rows += [(choice.criterion, choice.density, layer, share) for layer, share in names]
        return pd.DataFrame(rows, columns=["criterion", "density", "layer", "share"])

    def write(self) -> str:
        """Write tables (CSV) and ``report.txt``; returns the report."""
        tables = self.tables()
        text = report(tables, self.run)
        write_report(self.run.results, tables, text)
        return text

    def save_figures(self) -> None:
        """Draw accuracy against density from the tables that `write` has written, into the same directory."""
        from evidence.figures import save_columns  # imports matplotlib

        with self.run.results:
            save_columns(self.run.results.directory)


def check_run(seeds: Sequence[int], split_seed: int | str) -> None:
    """Raise an `InputError` if there is nothing that differs between seeds."""
    if len(seeds) < 2:
        raise InputError("Importance of features is compared over seeds: --seeds must be at least 2.")
    if split_seed != "seed":
        raise InputError("Importance of features is compared over splits: SPLIT_SEED must be 'seed'.")


def chosen_strengths(
    records: Sequence[Mapping], arms: Mapping[str, Sequence[Choice]], holdouts: Sequence[str]
) -> pd.DataFrame:
    """The choice of columns and the C of each arm and holdout with the best mean validation accuracy.

    Of equals the smaller C is taken, then the choice that comes first.

    Returns:
        arm, holdout, choice (its name), C, validation (mean over seeds and source domains, a fraction), and edge:
        whether C is the smallest or the largest of the grid.
    """
    table = pd.DataFrame([(r["algorithm"], r["holdout"], r["validation"]) for r in records])
    means, rows = table.groupby([0, 1])[2].mean(), []
    for arm, choices in arms.items():
        for holdout in holdouts:
            tried = [(strength, choice) for strength in STRENGTHS for choice in choices]
            strength, choice = max(tried, key=lambda one: means[one[1].at(one[0]), holdout])
            edge = strength in (STRENGTHS[0], STRENGTHS[-1])
            rows.append((arm, holdout, choice.name, strength, means[choice.at(strength), holdout], edge))
    return pd.DataFrame(rows, columns=["arm", "holdout", "choice", "C", "validation", "edge"])


def at_chosen(records: Sequence[Mapping], chosen: pd.DataFrame) -> list[dict]:
    """The records of each arm with the columns and the C that were chosen for it, under the arm's name."""
    found = {(record["algorithm"], record["holdout"]): [] for record in records}
    for record in records:
        found[record["algorithm"], record["holdout"]].append(record)
    return [
        record | {"algorithm": row.arm}
        for row in chosen.itertuples()
        for record in found[f"{row.choice}[C={row.C:g}]", row.holdout]
    ]


def densities_table(averages: pd.DataFrame, layout: Layout) -> pd.DataFrame:
    """Accuracy against density, and minus all columns.

    Args:
        averages: seeds × arms, see `contrasts.seed_averages`.

    Returns:
        criterion (with its control), density (per cent of the columns), n, mean, low, high, and above, above_low,
        above_high: minus all columns, paired by seed. Fractions, with 95 % t intervals.
    """
    rows = []
    for arm, (choice, *_) in arms_of(layout).items():
        density = 100 / len(layout.layers) if choice.layer else choice.density
        values, above = averages[arm].dropna(), (averages[arm] - averages[ALL]).dropna()
        criterion = " ".join(filter(None, (choice.criterion, choice.control))) or arm
        rows.append((criterion, density, len(values), *t_interval(values), *t_interval(above)))
    columns = ["criterion", "density", "n", "mean", "low", "high", "above", "above_low", "above_high"]
    return pd.DataFrame(rows, columns=columns)


def report(tables: Mapping[str, pd.DataFrame], run: Run) -> str:
    """The finding in plain sentences, then the tables of `ColumnProtocol.tables`."""
    shares = tables["layers"][tables["layers"]["density"] == SHOWN].pivot(
        index="layer", columns="criterion", values="share"
    )
    shares = (100 * shares.loc[list(dict.fromkeys(tables["layers"]["layer"])), list(CRITERIA)]).round(1)
    densities = columns_shown(tables["densities"])
    lines = [
        "Importance of features: which columns of the ViT's layers carry over to a new domain?",
        "",
        f"{run.features.describe()}; {len(tables['seeds'])} seeds, {len(run.holdouts)} held-out domains.",
        "Headline: all images of the held-out domain, mean over the holdouts, paired by seed. Each arm has the C that",
        f"is best for it on the sources' `out` part, per held-out domain, on the first {CHOOSING_SEEDS} seeds, from",
        f"{', '.join(f'{c:g}' for c in STRENGTHS)}; Phase 1 has C = {PHASE1_STRENGTH:g}.",
        "",
        *(line for text in column_sentences(tables) for line in textwrap.wrap(text, 118)),
        "",
        *EXPLANATION.splitlines(),
        *section("Confirmatory family", family_shown(tables["contrasts"])),
        *section("Accuracy (%)", wide_table(tables["accuracy"]).loc[list(tables["seeds"])]),
        *section("EXPLORATORY: accuracy (%) by density, and minus all columns (points)", densities),
        *section(f"EXPLORATORY: share of each layer that is kept at {SHOWN:g} % (%)", shares),
        *section("C that was chosen (and the best layer)", chosen_shown(tables["chosen"])),
    ]
    return "\n".join(lines) + "\n"


def columns_shown(table: pd.DataFrame) -> pd.DataFrame:
    """A `densities_table` for reading."""
    return by_density(table, ALL, "columns kept")


def column_sentences(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """What the tables say, in plain sentences."""
    found = contrast_sentences(tables["contrasts"])
    means = tables["accuracy"][tables["accuracy"]["holdout"] == AVERAGE].set_index("algorithm")["mean"]
    best = means.idxmax()
    found.append(
        f"The last [CLS] has {100 * means[LAST]:.1f} %, the best single layer {100 * means[BEST]:.1f} %, all columns "
        f"{100 * means[ALL]:.1f} %; the best mean is that of {best} ({100 * means[best]:.1f} %)."
    )
    return found + edge_sentences(tables["chosen"], "values of C")


def chosen_shown(table: pd.DataFrame) -> pd.DataFrame:
    """`chosen_strengths` for reading: arms × holdouts."""
    words = [f"{row.C:g}{' (edge)' * row.edge}{f', {row.choice}' * (row.arm == BEST)}" for row in table.itertuples()]
    wide = table.assign(shown=words).pivot(index="arm", columns="holdout", values="shown")
    return wide.loc[list(dict.fromkeys(table["arm"]))]

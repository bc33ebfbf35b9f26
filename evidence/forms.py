"""Which form of importance wins: every criterion at several densities, each beside a random mask of the same counts.

EXPLORATORY throughout: what looks best here has to be confirmed on other data. A *form* is a criterion of
`importance.CRITERIA` at a density; its twin is `random_layer`, random positions with the form's own count in each
matrix. A gain over plain training that the twin shares is no finding about importance, so the question is *form minus
twin*, paired by seed, mean over the holdouts, last epoch, all images of the held-out domain. Each arm chooses its own
learning rate on the first seeds (`own_rates`), by the sources' `out` part, and masks are therefore made from the `in`
part. A form whose interval of form minus twin ends below `WORTH` after `FIRST_SEEDS` seeds is not trained on more. On
request the best two are looked at closer: beside permuted and inverted masks, and with masks of other scopes; and plain
training and the project's own mask are trained from every start, merged networks of Phase 1 among them.

A *part* is one network: a classifier of one width on frozen features, or the last blocks of the ViT.
"""

import textwrap
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import pandas as pd

import config
from config import BlockSettings, InputError, Settings
from evidence.contrasts import seed_averages
from evidence.form_tables import (
    CLOSER,
    TWIN,
    Form,
    best_forms,
    closer_arms,
    closer_shown,
    closer_table,
    differences,
    form,
    forms_at,
    forms_shown,
    forms_table,
    label,
    ranks_sentence,
    sentences,
    start_arms,
    starts_shown,
    starts_table,
)
from evidence.own_rates import BLOCKS, CLASSIFIER, OwnRates
from evidence.report import edge_sentences, failures_shown, section, write_report
from storage import Results
from study import ERM, Arm, Run, check_seeds, unlearned

DENSITIES = (60.0, 30.0, 10.0)  # per cent of the tracked weights that are marked
WIDTHS = (10, 32, 64, 128)  # units of each hidden layer
RATES = {CLASSIFIER: (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), BLOCKS: (3e-4, 1e-3, 3e-3, 1e-2)}
RATE_SEEDS = {CLASSIFIER: 3, BLOCKS: 2}  # the first, by which rates are chosen
FIRST_SEEDS, WORTH = 20, 0.005  # when a form is given up, and the difference that it must still be able to have
OWN = (  # not to be set
    "IMPORTANCE_CRITERION",
    "IMPORTANCE_THRESHOLD_PERCENTILE",
    "MASK_SCOPE",
    "PH1_DATA",
    "PH2_INIT",
    "PH2_LR_IMPORTANT",
)
EXPLANATION = f"""\
EXPLORATORY. Intervals are 95 % t intervals over seeds, conditional on images, backbone, and the learning rates that
the first seeds chose. Of forms that do nothing, about one in forty has an interval above 0, and somewhat more have one
below: a form was not trained on more than {FIRST_SEEDS} seeds where its interval over its twin ended below
+{100 * WORTH:g} points there."""
CHOSEN = f"""\
The best {CLOSER} were chosen by the very seeds that they are shown on, so that they look better than they are."""


class FormsProtocol:
    """Trains every form and its twin in every part, and says what they show; resumable as a `Study` is.

    Args:
        runs: part -> its run, in a directory of its own, of all seeds.
        directory: gets the report's files.
        densities: of the masks, per cent.
        closer: look at the best of each part closer.
        starts: train from every start, too; not with trained blocks.
    """

    def __init__(
        self,
        runs: Mapping[str, Run],
        directory: str | Path,
        densities: Sequence[float] = DENSITIES,
        closer: bool = False,
        starts: bool = False,
    ):
        self.runs, self.results, self.forms = dict(runs), Results(directory), forms_at(densities)
        self.closer, self.starts = closer, starts

    @classmethod
    def from_config(
        cls,
        seeds: Sequence[int] | None = None,
        directory: str | Path | None = None,
        widths: Sequence[int] | None = None,
        densities: Sequence[float] | None = None,
        *,
        closer: bool = False,
        starts: bool = False,
        overwrite: bool = False,
        verify: bool = False,
        strict: bool = False,
    ) -> "FormsProtocol":
        """The protocol at the constants of `config`; with `TRAINED_BLOCKS`, of those blocks.

        Args:
            seeds: default 0 … `NUM_SEEDS` − 1.
            directory: default ``forms`` below `RESULTS_DIR`.
            widths: units of each hidden layer, a part for each; default `WIDTHS`. There are as many layers as
                `HIDDEN_SIZES` has.
            densities: of the masks, per cent; default `DENSITIES`.
            closer, starts: see above.
            overwrite, verify, strict: see `study.Run.from_config`.

        Raises:
            InputError: a setting that the protocol has values of its own for, fewer seeds than rates are chosen on,
                widths with `TRAINED_BLOCKS`, or an unfit directory.
        """
        seeds = check_seeds(range(config.NUM_SEEDS) if seeds is None else seeds)
        directory = Path(config.RESULTS_DIR) / "forms" if directory is None else Path(directory)
        places = {Results(directory / part): own for part, own in _settings(widths, seeds, starts).items()}
        options = {"overwrite": overwrite, "verify": verify, "strict": strict}
        first = Run.in_places(places, seeds, **options)
        runs = {place.directory.name: first.beside(place, own) for place, own in places.items()}
        return cls(runs, directory, DENSITIES if densities is None else densities, closer, starts)

    @cached_property
    def first(self) -> dict[str, OwnRates]:
        """Part -> all forms, their twins and plain training, on the first seeds."""
        arms = [ERM, *(form(control, *own) for own in self.forms for control in ("importance", TWIN))]
        seeds = {part: run.seeds[:FIRST_SEEDS] for part, run in self.runs.items()}
        return {part: at_own_rates(run.beside(run.results, seeds=seeds[part]), arms) for part, run in self.runs.items()}

    def last(self, part: str) -> OwnRates:
        """Those of the first that are trained on all seeds: plain training, and the forms that may be worth it."""
        table = differences(self.first[part].records(), self.forms)
        alive = {row.Index for row in table.itertuples() if not row.high < WORTH}
        forms = [own for own in self.forms if own in alive]
        arms = [ERM, *(form(control, *own) for own in forms for control in ("importance", TWIN))]
        return at_own_rates(self.runs[part], arms)

    def train(self) -> None:
        """Train what is missing."""
        for part, run in self.runs.items():
            self.first[part].train()
            if len(run.seeds) > FIRST_SEEDS:
                self.last(part).train()
            if self.closer:
                self.near(part).train()
            if self.starts:
                self.from_starts(part).train()

    def best(self, part: str) -> list[Form]:
        """The forms of a part that are looked at closer."""
        return best_forms(forms_table(self.records(part), self.runs[part], self.forms))

    def near(self, part: str) -> OwnRates:
        """The best forms, their twins, further controls and other scopes, on all seeds."""
        return at_own_rates(self.runs[part], closer_arms(self.best(part)))

    def from_starts(self, part: str) -> OwnRates:
        """Plain training and the project's own mask from every start, on all seeds."""
        return at_own_rates(self.runs[part], start_arms())

    def records(self, part: str) -> list[dict]:
        """The records of a part's arms at their own rates, under their labels."""
        found = self.first[part].records()
        if len(self.runs[part].seeds) > FIRST_SEEDS:
            found += self.last(part).records()
        return list({(record["key"], record["algorithm"]): record for record in found}.values())

    def tables(self) -> dict[str, pd.DataFrame]:
        """Everything the report says in numbers, by file name."""
        records = {part: self.records(part) for part in self.runs}
        rates = {part: own.chosen() for part, own in self.first.items()}
        averages = [seed_averages(own).assign(part=part) for part, own in records.items()]
        tables = {
            "forms": pd.concat(
                [forms_table(own, self.runs[part], self.forms).assign(part=part) for part, own in records.items()]
            ),
            "rates": pd.concat([table.assign(part=part) for part, table in rates.items()]),
            "seeds": pd.concat(averages).reset_index().set_index("seed"),
        }
        if self.closer:
            found = {part: closer_table(self.near(part).records(), self.best(part)) for part in self.runs}
            tables["closer"] = pd.concat([table.assign(part=part) for part, table in found.items()])
        if self.starts:
            found = {part: starts_table(self.from_starts(part).records()) for part in self.runs}
            tables["starts"] = pd.concat([table.assign(part=part) for part, table in found.items()])
        return tables

    def write(self) -> str:
        """Write tables (CSV) and ``report.txt``; returns the report."""
        tables = self.tables()
        text = report(tables, self)
        write_report(self.results, tables, text, ("closer", "starts"))
        return text

    def save_figures(self) -> None:
        """Draw form minus twin from the tables that `write` has written, into the same directory."""
        from evidence.figures import save_forms  # imports matplotlib

        with self.results:
            save_forms(self.results.directory)


def _settings(widths: Sequence[int] | None, seeds: Sequence[int], starts: bool) -> dict[str, Settings]:
    """Part -> settings, or an `InputError` for what the protocol cannot do."""
    config.refuse_whole_model("forms")
    own = (*OWN, "BACKBONE_LEARNING_RATE") if config.TRAINED_BLOCKS else OWN
    for name in own:
        if config.changed(name):
            raise InputError(f"The forms of importance have values of {name} of their own: leave it out.")
    fewest = RATE_SEEDS[BLOCKS if config.TRAINED_BLOCKS else CLASSIFIER]
    if len(seeds) < fewest:
        raise InputError(f"Learning rates are chosen on {fewest} seeds: --seeds must be at least that.")
    if config.TRAINED_BLOCKS:
        if widths is not None:
            raise InputError("--widths is for classifiers on features, not for TRAINED_BLOCKS: leave it out.")
        if starts:
            raise InputError("--starts is for classifiers on features, not for TRAINED_BLOCKS: leave it out.")
        return {"blocks": Settings.current()}
    layers = len(config.HIDDEN_SIZES)
    return {
        f"width_{width}": Settings.current(hidden_sizes=(width,) * layers, ph1_data="in")
        for width in dict.fromkeys(WIDTHS if widths is None else widths)
    }


def at_own_rates(run: Run, arms: Sequence[Arm]) -> OwnRates:
    """Arms at their own rates, from the grid for what the run trains."""
    setting = BLOCKS if isinstance(run.settings, BlockSettings) else CLASSIFIER
    return OwnRates(run, arms, setting, RATES[setting], RATE_SEEDS[setting], label)


def report(tables: Mapping[str, pd.DataFrame], protocol: FormsProtocol) -> str:
    """The finding in plain sentences, then the tables of `FormsProtocol.tables`, and what failed."""
    run = next(iter(protocol.runs.values()))
    lines = [
        "Which form of importance wins?",
        "",
        f"{run.features.describe()}; {len(run.holdouts)} held-out domains.",
        "",
    ]
    for part, own in tables["forms"].groupby("part", sort=False):
        for text in [*sentences(own, part), *_cautions(tables["rates"], part, protocol.runs[part])]:
            lines += textwrap.wrap(text, 118)
    if len(protocol.runs) > 1:
        lines += textwrap.wrap(ranks_sentence(dict(iter(tables["forms"].groupby("part", sort=False)))), 118)
    lines += ["", *EXPLANATION.splitlines()]
    for part, own in tables["forms"].groupby("part", sort=False):
        lines += section(f"{part}: accuracy (%), and differences (points)", forms_shown(own))
        if "closer" in tables:
            closer = tables["closer"][tables["closer"]["part"] == part]
            lines += [*section(f"{part}: the best {CLOSER}, closer (points)", closer_shown(closer)), CHOSEN]
        if "starts" in tables:
            starts = tables["starts"][tables["starts"]["part"] == part]
            lines += section(f"{part}: from other starts (movement 60 %; %, points)", starts_shown(starts))
    lines += failures_shown([own.whole for own in protocol.first.values()])
    return "\n".join(lines) + "\n"


def _cautions(rates: pd.DataFrame, part: str, run: Run) -> list[str]:
    """Sentences on arms that did not learn, and on rates at the edge of the grid."""
    own = rates[rates["part"] == part]
    validation = own.groupby("arm")["validation"].mean().to_dict()
    about = validation, run.facts["counts"], run.settings, "PH2_NUM_EPOCHS"
    edges = [f"{part}: {text}" for text in edge_sentences(own, "learning rates")]
    return [*edges, *unlearned(*about, images="the sources' validation images")]

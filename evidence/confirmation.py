"""The forms that looked best, on data and features that nobody tuned on: what is compared, fixed in advance.

`PLACES` and `FAMILY` were written, and committed, after the exploration (`forms`) and before the first run of this
module. Everything else is as in `forms`: Phase 1 on the `in` parts, the twin `random_layer` with a form's own count in
each matrix, a learning rate of its own for each arm, chosen on the first seeds by the sources' `out` part; last epoch,
all images of the held-out domain, mean over the holdouts, paired by seed. No form is given up on the way. The verdicts
are of `statistics.family`, with Holm's correction over the family.

`confirm --place NAME` trains a place: of the block with ``--data-root DIR --set TRAINED_BLOCKS=1``, of
EfficientNet-Lite0 with ``--features FILE``, a file that ``benchmarks/efficientnet.py`` writes.

What was known before: Office-31 had been looked at with seeds 0 to 19, with ViT-Tiny's frozen features and the default
classifier, hence the seeds from 100 on. PACS on another backbone is another backbone, and not new data.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import pandas as pd

import config
from config import InputError, Settings
from evidence.contrasts import seed_averages
from evidence.form_tables import TWIN, Form, form, forms_shown, forms_table, label
from evidence.forms import at_own_rates
from evidence.own_rates import OwnRates
from evidence.report import contrast_sentences, failures_shown, family_shown, section, verdict_counts, write_report
from evidence.statistics import LEVEL, family
from storage import FeatureSet, Results
from study import ERM, FEWEST_SEEDS, Run


class Place(NamedTuple):
    """Where forms are confirmed: data, backbone, network and seeds.

    Attributes:
        dataset, model: names that the features must have.
        forms: that are trained there.
        seeds: those of the confirmation.
        width: units of each hidden layer of a classifier on features; None = the last block is trained.
    """

    dataset: str
    model: str
    forms: tuple[Form, ...]
    seeds: range
    width: int | None = None

    def check(self, features: FeatureSet) -> None:
        """Raise an `InputError` for the features of another place."""
        if (features.dataset, features.model_name) != (self.dataset, self.model):
            raise InputError(
                f"This place needs the features of {self.dataset} by {self.model}, and these are of "
                f"{features.dataset} by {features.model_name}."
            )


class Claim(NamedTuple):
    """A contrast of the family: a form at a place, minus its twin or plain training."""

    place: str
    form: Form
    baseline: str

    @property
    def name(self) -> str:
        """How tables call it."""
        criterion, density = self.form
        return f"{self.place}: {criterion} {density:g} % − {self.baseline}"

    def differences(self, seeds: pd.DataFrame) -> pd.Series:
        """By seed, from the accuracies of the place, seeds × labelled arms."""
        baseline = "erm" if self.baseline == "erm" else label(form(self.baseline, *self.form))
        return seeds[label(form("importance", *self.form))] - seeds[baseline]


# Of the last block the best form of the exploration, and the project's own, above its twin in the study of blocks; of
# heads the best against its twin, and beside it, outside the family, the best against plain training.
MAGNITUDE, MOVEMENT, AGREE, FISHER = ("magnitude", 10.0), ("movement", 10.0), ("agree", 10.0), ("fisher", 60.0)
PLACES: Mapping[str, Place] = {
    "office31_blocks": Place("office31", "vit-tiny-patch16-224", (MAGNITUDE, MOVEMENT), range(100, 120)),
    "pacs_efficientnet": Place("pacs", "efficientnet-lite0", (AGREE, FISHER), range(100, 150), 10),
    "office31_efficientnet": Place("office31", "efficientnet-lite0", (AGREE, FISHER), range(100, 150), 10),
}
FAMILY = (
    Claim("office31_blocks", MAGNITUDE, TWIN),
    Claim("office31_blocks", MOVEMENT, TWIN),
    Claim("pacs_efficientnet", AGREE, TWIN),
    Claim("office31_efficientnet", AGREE, TWIN),
)
EXPLANATION = f"""\
Fixed in advance, see evidence/confirmation.py. The words "helps" and "hurts" need an interval on one side of 0,
p < {LEVEL} after Holm's correction over the {len(FAMILY)} contrasts, and {FEWEST_SEEDS} seeds; "no difference" is not
corrected. Intervals (95 %; of the contrasts percentile bootstrap over seeds, else Student's t) cover starts, batch
orders and splits, and are conditional on images, backbone, and the learning rates that the first seeds chose."""


class Confirmation:
    """Trains the arms of one place, and says what is known of all places; resumable as a `Study` is.

    Args:
        place: a name of `PLACES`.
        run: of that place's features, settings and seeds, in the directory of that name.
    """

    def __init__(self, place: str, run: Run):
        PLACES[place].check(run.features)
        self.place, self.run = place, run
        arms = [form(control, *own) for own in PLACES[place].forms for control in ("importance", TWIN)]
        self.arms: OwnRates = at_own_rates(run, [ERM, *arms])

    @classmethod
    def from_config(
        cls,
        place: str,
        directory: str | Path | None = None,
        *,
        overwrite: bool = False,
        verify: bool = False,
        strict: bool = False,
    ) -> "Confirmation":
        """The confirmation at one place, on the features that the constants of `config` describe.

        Args:
            place: a name of `PLACES`.
            directory: of all places; default ``confirmation`` below `RESULTS_DIR`.
            overwrite, verify, strict: see `study.Run.from_config`.

        Raises:
            InputError: an unknown place, a setting that is not the default, other features, or an unfit directory.
        """
        directory = Path(config.RESULTS_DIR) / "confirmation" if directory is None else Path(directory)
        settings = _settings(place)
        options = {"overwrite": overwrite, "verify": verify, "strict": strict, "check": PLACES[place].check}
        return cls(place, Run.in_places({Results(directory / place): settings}, PLACES[place].seeds, **options))

    def train(self) -> None:
        """Train what is missing."""
        self.arms.train()

    def write(self) -> str:
        """Write this place's tables into its directory, and those of all places with the report beside it."""
        records = self.arms.records()
        tables = {
            "forms": forms_table(records, self.run, PLACES[self.place].forms),
            "rates": self.arms.chosen(),
            "seeds": seed_averages(records),
        }
        failed = "\n".join(failures_shown([self.arms.whole]))
        write_report(self.run.results, tables, "\n".join([self.run.features.describe(), failed]).strip() + "\n")
        return write_all(self.run.results.directory.parent)

    def save_figures(self) -> None:
        """Draw the forms of all places from the tables that `write` has written, beside them."""
        from evidence.figures import save_confirmation  # imports matplotlib

        save_confirmation(self.run.results.directory.parent)


def _settings(place: str) -> Settings:
    """The settings of a place, or an `InputError` where they were to be others."""
    if place not in PLACES:
        raise InputError(f"There is no place '{place}' to confirm at; there are {', '.join(PLACES)}.")
    width = PLACES[place].width
    if int(width is None) != config.TRAINED_BLOCKS:
        raise InputError(f"The place '{place}' needs TRAINED_BLOCKS to be {int(width is None)}.")
    own = {} if width is None else {"hidden_sizes": (width,) * len(config.HIDDEN_SIZES), "ph1_data": "in"}
    settings = Settings.current(**own)
    names = (settings.constant(field.name) for field in fields(settings))
    if changed := [name for name in names if name != "TRAINED_BLOCKS" and config.changed(name)]:
        raise InputError(f"The settings of a confirmation are fixed: leave out {changed[0]}.")
    return settings


def write_all(directory: Path) -> str:
    """Write the tables of all places that are there, and the report; returns the report."""
    there = {name: Results(directory / name) for name in PLACES if (directory / name / "seeds.csv").is_file()}
    forms = {name: pd.read_csv(place.directory / "forms.csv").assign(place=name) for name, place in there.items()}
    seeds = {name: pd.read_csv(place.directory / "seeds.csv", index_col="seed") for name, place in there.items()}
    about = {name: (place.directory / "report.txt").read_text("utf-8") for name, place in there.items()}
    tables, missing = {"forms": pd.concat(forms.values())}, [name for name in PLACES if name not in there]
    if not missing:
        tables["contrasts"] = family({claim.name: claim.differences(seeds[claim.place]) for claim in FAMILY})
    text = report(tables, about, missing)
    write_report(Results(directory), tables, text)
    return text


def report(tables: Mapping[str, pd.DataFrame], about: Mapping[str, str], missing: Sequence[str]) -> str:
    """The verdicts in plain sentences, if no place is missing, and the tables of every place.

    Args:
        tables: "forms", and "contrasts" where all places are there.
        about: place -> what its features are, and what failed.
    """
    lines = ["Do the forms that looked best win where nobody tuned?", ""]
    if missing:
        lines.append(f"Not decided: nothing was trained yet at {', '.join(missing)}.")
    else:
        lines += [line for text in contrast_sentences(tables["contrasts"]) for line in textwrap.wrap(text, 118)]
    lines += ["", *EXPLANATION.splitlines()]
    if not missing:
        lines += section("Confirmatory family", family_shown(tables["contrasts"]))
    for name, own in tables["forms"].groupby("place", sort=False):
        lines += section(f"{name}: accuracy (%), and differences (points)", forms_shown(own))
        lines += about[name].splitlines()
    return "\n".join(lines) + "\n"


def confirmation_sentence(contrasts: pd.DataFrame) -> str:
    """How often each verdict was reached in the family, in one sentence."""
    *most, last = (f"{words} in {count}" for words, count in verdict_counts(contrasts).items() if "few" not in words)
    return f"Of the {len(contrasts)} contrasts of forms and their random twins a form {', '.join(most)} and {last}."

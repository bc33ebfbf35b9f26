"""Phase 1, masks and Phase 2 of several arms on the same seeds, starts and batches, everything on disk.

A study is resumable: it trains what its results directory does not hold yet, in units of (phase, domain or holdout,
chunk of seeds), and each unit is on disk before the next begins.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property

import torch
from torch import Tensor

from config import InputError, Settings
from engine import Params
from importance import CRITERIA
from study.archive import SavedNetworks
from study.controls import CONTROLS, ERM, IMPORTANCE, Arm, MaskSource, check_arms
from study.merging import MERGES, merge
from study.records import SELECTIONS, Counted, make_records
from study.report import report, unlearned
from study.run import Run, check_density
from trainer_phase1 import DomainNetworks, train_domain
from trainer_phase2 import HoldoutMasks, HoldoutNetworks, in_stacks, masks_for, train_holdout

OF_MASKS = ("importance_criterion", "importance_aggregation", "importance_threshold_percentile", "mask_scope")


class Study:
    """Arms of Phase 2, compared on one run.

    Args:
        arms: what to compare; default plain training and importance masking. With `records_only` they may differ by
            holdout: a mapping from each to its arms.
        keep_weights: write the weights of Phase 2; a study of many arms can do without them.
        records_only: measure after the last epoch only, and keep nothing of Phase 2 but the records of that: for a grid
            of many large networks.
    """

    def __init__(
        self,
        run: Run,
        arms: Sequence[Arm] | Mapping[str, Sequence[Arm]] = (ERM, IMPORTANCE),
        keep_weights: bool = True,
        records_only: bool = False,
    ):
        self.run, self.keep_weights, self.records_only = run, keep_weights and not records_only, records_only
        by_holdout = arms if isinstance(arms, Mapping) else dict.fromkeys(run.holdouts, arms)
        pretrained = run.data.tail is not None
        self.by_holdout = {holdout: check_arms(own, pretrained) for holdout, own in by_holdout.items()}
        self.arms = tuple(dict.fromkeys(arm for own in self.by_holdout.values() for arm in own))
        if run.data.tail is not None:
            for arm in self.arms:
                if arm.settings(run.settings).ph2_init in MERGES:
                    raise InputError("Merged starts are of classifiers on features, not of TRAINED_BLOCKS.")
                if arm.chooses:
                    check_density(arm.settings(run.settings), run.data.tail)
        self.selections = ("last",) if records_only else SELECTIONS

    @cached_property
    def arm_names(self) -> tuple[str, ...]:
        """Names of the arms, as in records and files."""
        return tuple(arm.name for arm in self.arms)

    def train(self) -> None:
        """Train what is missing of both phases."""
        self.phase1()
        self.phase2()

    def phase1(self) -> None:
        """Train what is missing of Phase 1: one network per domain and seed."""
        run = self.run
        missing = self._missing()  # what is damaged of Phase 2 is found now, not after Phase 1
        seeds = {seed for _, seed in missing} if self.records_only else {*run.seeds}
        wanted = {*seeds, *(seed + 1 for seed in seeds if any(arm.needs_next_seed for arm in self.arms))}
        evidence, archive, units = self.evidence, run.archive, []
        for domain in run.domains:
            new = wanted - archive.phase1_seeds(domain)
            known = wanted - archive.evidence_seeds(domain, evidence) - new  # trained again, for what to measure
            units += [(domain, chunk) for part in (new, known) for chunk in run.chunks(part)]

        def train(unit: tuple[str, tuple[int, ...]], tick: Callable[[], None]) -> DomainNetworks:
            options = {"strict": run.strict, "threads": run.execution.threads, "on_epoch": tick}
            options |= {"evidence": evidence, "every_epoch": not self.records_only}
            return train_domain(run.data, *unit, run.settings, **options)

        run.check_memory(units, self._together)  # Phase 2 needs the most
        with run.writing(units):
            floats, epochs = run.network.size, run.settings.ph1_num_epochs
            for networks in run.side_by_side("Phase 1", units, train, epochs, floats):
                archive.save_evidence(networks)
                if not {*networks.seeds} <= archive.phase1_seeds(networks.domain):
                    archive.save_domain(networks, run.settings.importance_threshold_percentile)

    @property
    def evidence(self) -> tuple[str, ...]:
        """What the arms' criteria need of Phase 1, see `importance.Criterion`."""
        settings = [arm.settings(self.run.settings) for arm in self.arms if CONTROLS[arm.control].learned]
        return tuple(sorted({name for own in settings for name in CRITERIA[own.importance_criterion].needs}))

    def phase2(self) -> None:
        """Train what is missing of Phase 2: all arms per holdout and seed, with masks from Phase 1."""
        run, groups = self.run, defaultdict(set)
        for (holdout, seed), arms in self._missing().items():
            groups[holdout, arms].add(seed)
        units = [(holdout, arms, chunk) for (holdout, arms), seeds in groups.items() for chunk in run.chunks(seeds)]

        def train(unit: tuple[str, tuple[Arm, ...], tuple[int, ...]], tick: Callable[[], None]) -> tuple:
            holdout, arms, seeds = unit
            source = mask_source(run, [holdout], seeds)
            maskings = [arm.masking(source, run.settings) for arm in arms]
            options = {"strict": run.strict, "threads": run.execution.threads, "on_epoch": tick}
            options |= {"keep_params": not self.records_only, "every_epoch": not self.records_only}
            return arms, train_holdout(run.data, holdout, seeds, maskings, **options), source.own(run.settings)

        run.check_memory(units, self._together)
        with run.writing(units):
            run.keep_phase1(weights=any(arm.settings(run.settings).ph2_init in MERGES for arm in self.arms))
            floats, epochs = run.network.size * self._together, run.settings.ph2_num_epochs
            for arms, networks, masks in run.side_by_side("Phase 2", units, train, epochs, floats):
                self._save(arms, networks, masks)

    @property
    def _together(self) -> int:
        """Arms whose networks are in memory at a time: where only records are kept, those of a stack."""
        run, most = self.run, max(map(len, self.by_holdout.values()))
        if not self.records_only:
            return most
        seeds = min(len(run.seeds), run.execution.seeds_per_chunk)
        return max(map(len, in_stacks(run.data, seeds, range(most), run.network.size)))

    def report(self) -> str:
        """The answer as text, of all that the directory holds; written to ``summary_report.txt`` as well."""
        whole, results = self.whole(), self.run.results
        with self.run.writing():
            text = report(whole.run.records(), results.read_settings(), whole.failures(), whole.warnings())
            results.write_text("summary_report.txt", text)
        return text

    def whole(self) -> "Study":
        """These arms on all seeds and holdouts that the results directory holds, also of earlier runs."""
        run, found = self.run, self._complete(self.run.results.records())
        seeds = {*run.seeds, *(seed for _, seed in found)}
        holdouts = {*run.holdouts, *(holdout for holdout, _ in found)}
        if (len(seeds), len(holdouts)) == (len(run.seeds), len(run.holdouts)):
            return self
        names = [name for name in run.features.domain_names if name in holdouts]
        every = Run(run.features, run.settings, run.results, sorted(seeds), names, run.execution)
        return Study(every, self.arms, self.keep_weights, self.records_only)

    def records(self) -> list[dict]:
        """What is on disk of these arms, seeds and holdouts."""
        return [r for r in self.run.records() if r["algorithm"] in self.arm_names]

    def warnings(self) -> list[str]:
        """Sentences on networks that did not learn even the images that they were trained on."""
        run, archive = self.run, self.run.archive

        def last(networks: Iterable[SavedNetworks]) -> float:
            return float(torch.cat([saved.curves["train_accuracy"][-1] for saved in networks]).nanmean())

        phase1 = {"Phase 1": last(map(archive.phase1, run.domains))}
        phase2 = {name: last(archive.phase2(holdout, name) for holdout in run.holdouts) for name in self.arm_names}
        about = run.facts["counts"], run.settings
        return unlearned(phase1, *about, "PH1_NUM_EPOCHS", "PH1_LEARNING_RATE") + unlearned(phase2, *about)

    def failures(self) -> list[str]:
        """One sentence per failed network, for the warning at the end."""
        return [
            f"{record['algorithm']}, holdout {record['holdout']}, seed {record['seed']}: {record['failed']}"
            for record in self.run.records()
            if record["failed"] and record["selection"] == "last"
        ]

    def _missing(self) -> dict[tuple[str, int], tuple[Arm, ...]]:
        """What of Phase 2 is not complete on disk: (holdout, seed) -> the arms to train, in order.

        All arms, as one file of masks serves them; where there are no files but the records, those without a record.
        """
        run, records = self.run, self.run.records()
        pairs = [(holdout, seed) for holdout in run.holdouts for seed in run.seeds]
        if self.records_only:
            found = {(r["holdout"], r["seed"], r["algorithm"]) for r in records}
            wanted = {pair: self.by_holdout[pair[0]] for pair in pairs}
            lacking = {p: tuple(arm for arm in arms if (*p, arm.name) not in found) for p, arms in wanted.items()}
            return {pair: arms for pair, arms in lacking.items() if arms}
        stored = {h: run.archive.phase2_seeds(h, self.arm_names, self.keep_weights) for h in run.holdouts}
        complete = self._complete(records)
        return {pair: self.arms for pair in pairs if pair not in complete or pair[1] not in stored[pair[0]]}

    def _complete(self, records: Iterable[Mapping]) -> set[tuple[str, int]]:
        """Holdouts and seeds with all records of all arms."""
        counts = Counter((r["holdout"], r["seed"]) for r in records if r["algorithm"] in self.arm_names)
        return {pair for pair, count in counts.items() if count == len(self.arms) * len(self.selections)}

    def _save(self, arms: Sequence[Arm], networks: HoldoutNetworks, masks: HoldoutMasks) -> None:
        run = self.run
        if not self.records_only:
            run.archive.save_holdout(networks, [arm.name for arm in arms], masks, self.keep_weights)
        records = []
        for v, arm in enumerate(arms):
            own = (values[:, v] for values in (networks.validation_accuracy, networks.correct, networks.failed))
            peeked = arm.saw_validation(run.settings)
            counted = Counted(networks.seeds, *own)
            choice = {"peeked": peeked, "selections": self.selections}
            records += make_records(run, arm.name, [networks.holdout], counted, **choice)
        run.results.append(records)


def mask_source(run: Run, holdouts: Sequence[str], seeds: Sequence[int]) -> MaskSource:
    """Where the masks of held-out domains (one or two) come from: Phase 1 of the others, read when first asked for."""
    sources = run.data.sources(holdouts)

    def masks_of(numbers: Sequence[int]) -> Callable[[Settings], HoldoutMasks]:
        @cache
        def failed() -> dict[str, Tensor]:
            return {domain: run.archive.phase1(domain, numbers).failed for domain in sources}

        @cache
        def evidence(name: str) -> dict[str, list[Tensor]]:
            return {domain: run.archive.evidence(domain, name, numbers) for domain in sources}

        @cache
        def masks(mask_settings: Settings) -> HoldoutMasks:
            needs = CRITERIA[mask_settings.importance_criterion].needs
            found = {domain: {name: evidence(name)[domain] for name in needs} for domain in sources}
            return masks_for(found, failed(), mask_settings)

        def own(settings: Settings) -> HoldoutMasks:  # arms that differ in rates and schedules alone share their masks
            return masks(replace(run.settings, **{name: getattr(settings, name) for name in OF_MASKS}))

        return own

    @cache
    def merged(rule: str, percent: float) -> Params:
        networks = [run.archive.phase1(domain, seeds) for domain in sources]
        return merge(rule, networks[0].params("start"), [own.params() for own in networks], percent)

    def merged_start(settings: Settings) -> Params:
        return merged(settings.ph2_init, settings.importance_threshold_percentile)

    own, following = masks_of(seeds), masks_of([seed + 1 for seed in seeds])
    return MaskSource("+".join(holdouts), tuple(seeds), own, following, run.network, merged_start)

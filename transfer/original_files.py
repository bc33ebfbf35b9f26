"""The result files of tusharmanekar/mp-tl-study: read and analysed as ours are, and written from our records.

A file ``SET/results/cuts_CLASSES_SETTING.json`` is a list. Its first entry holds the parameters; each other one is a
run: lr, sampled_percentage, sampled_cut_point (kept convolutions), repeat, train_acc and test_acc. The settings are FR
(frozen, the rest drawn anew), F (frozen, the rest pretrained), R (kept and trained, the rest drawn anew) and FT
(frozen, the rest removed). ``baselines_CLASSES.json`` holds networks trained from scratch, as cut point −1;
``CLASSES_cluster.json`` how well the classes of the new task cluster in each layer, by adjusted Rand index.

Which images "test" was is not written there, but its accuracies are whole numbers of them.
"""

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pandas as pd

from config import InputError
from storage import Results, atomic_write
from transfer import report
from transfer.images import PRESETS
from transfer.original import ARMS, KINDS
from transfer.probes import PRETRAINED
from transfer.statistics import share
from transfer.tables import COLUMNS

log = logging.getLogger(__name__)

FOLDERS = {  # folder and classes in its file names -> task of `PRESETS`
    ("MNIST", "regular_classes"): "mnist",
    ("FashionMNIST", "regular_classes"): "fashion",
    ("FashionMNIST", "random_classes"): "fashion_random",
    ("CIFAR", "regular_classes"): "cifar",
    ("CIFAR", "reverse_classes"): "cifar_reverse",
    ("CIFAR", "random_classes"): "cifar_random",
    ("FashionMNIST_to_MNIST", "regular_classes"): "fashion_to_mnist",
    ("MNIST_to_FashionMNIST", "regular_classes"): "mnist_to_fashion",
    ("digits", "regular_classes"): "digits",  # ours
}
IMAGES = {  # training and test images of each class
    "digits": ((142, 146, 142, 146, 145, 146, 145, 143, 139, 144), (36, 36, 35, 37, 36, 36, 36, 36, 35, 36)),
    "mnist": (
        (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949),
        (980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009),
    ),
    "fashion_mnist": ((6000,) * 10, (1000,) * 10),
    "cifar10": ((5000,) * 10, (1000,) * 10),
}
RUN = ("lr", "sampled_percentage", "sampled_cut_point", "repeat", "train_acc", "test_acc")
CLUSTER = ("Percentage", "Repeat", "Layer", "ARI")
BASELINE = -1  # its cut point
VALIDATION = 0.1  # share of the training images that it keeps for validation
DEPTH = 6  # convolutions, where no run says otherwise
LARGEST = 10**6  # images; a larger common denominator belongs to no share of images
RELU = "<class 'torch.nn.modules.activation.ReLU'>"
SPLITS = {"accuracy": "the test split", "seen_accuracy": "the training split"}  # columns -> what they are measured on


@dataclass(frozen=True, eq=False)
class ResultFile:
    """A file of runs."""

    path: Path
    task: str  # of `PRESETS`
    setting: str | None  # of `ARMS`; None of baselines
    header: Mapping[str, object]
    runs: pd.DataFrame  # columns `RUN`
    measure: str  # of `SPLITS`
    images: int  # that test_acc is measured on

    @property
    def name(self) -> str:
        """What it is called in a report."""
        return f"{self.task} {self.setting or 'baselines'}"

    @property
    def depth(self) -> int:
        """Convolutions of its networks."""
        return int(self.header["depth"])

    def at(self, cut: int) -> pd.Series:
        """test_acc at a cut point, by percentage and repeat."""
        rows = self.runs[self.runs["sampled_cut_point"] == cut]
        return rows.set_index(["sampled_percentage", "repeat"])["test_acc"]


def import_original(directory: str | Path, output: str | Path | None = None) -> tuple[pd.DataFrame, str]:
    """Analyse the original's result files as our own runs.

    Where the runs of two settings were tested on different images, they are in different columns of the table, and are
    not compared.

    Args:
        directory: with files as above, at any depth.
        output: a folder, made if need be, that gets the report and its tables, see `report.write`.

    Returns:
        The common table (see `transfer.statistics`) of all ``cuts_*`` files, and the report.

    Raises:
        InputError: no such files; one that is damaged, or of a data set and classes that the original does not have.
    """
    files = result_files(directory)
    table = common_table(files)
    chance = {file.task: _chance(file) for file in reversed(files)}
    about = dict(facts(files)) | {"chance": chance, "depth": {file.task: file.depth for file in files}}
    probes = cluster_table(directory)
    if output is not None:
        return table, report.write(Path(output), table, about, probes)
    return table, report.report(report.tables(table, probes, about["depth"]), about)


def result_files(directory: str | Path) -> list[ResultFile]:
    """The ``cuts_*`` files below a directory, by folder and in the order of `ARMS`, then the ``baselines_*`` files.

    Raises:
        InputError: see `import_original`.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"There is no directory '{directory}'.")
    files = [_result_file(path) for path in _found(directory, "cuts_*_*.json")]
    files.sort(key=lambda file: (file.path.parent, list(ARMS).index(file.setting)))
    if not files:
        raise InputError(f"'{directory}' has no files cuts_CLASSES_SETTING.json of the original.")
    if len({(file.task, file.setting) for file in files}) < len(files):
        raise InputError(f"'{directory}' has the results of a task twice: read one folder at a time.")
    return files + [_result_file(path) for path in _found(directory, "baselines_*.json")]


def _found(directory: Path, pattern: str) -> list[Path]:
    """Files below a directory in whose path, from there on, nothing is hidden."""
    below = ((path, path.relative_to(directory).parts) for path in directory.rglob(pattern))
    return sorted(path for path, parts in below if not any(part.startswith(".") for part in parts))


def _task_of(path: Path, classes: str) -> str:
    folder = path.resolve().parent
    folder = folder.parent if folder.name == "results" else folder
    if (folder.name, classes) not in FOLDERS:
        known = ", ".join("/".join(names) for names in FOLDERS)
        raise InputError(f"'{path}' is of {folder.name}/{classes}; known are {known}.")
    return FOLDERS[folder.name, classes]


def _result_file(path: Path) -> ResultFile:
    """Read and check a file."""
    kind, _, classes = path.stem.partition("_")
    setting = None
    if kind == "cuts":
        classes, _, setting = classes.rpartition("_")
        if setting not in ARMS:
            raise InputError(f"'{path}' is of the setting '{setting}'; there are {', '.join(ARMS)}.")
    task = _task_of(path, classes)
    header, *runs = _entries(path)
    if type(header.get("depth")) is not int or not isinstance(header.get("fine_tune_classes"), list):
        raise InputError(f"'{path}' does not begin with parameters: depth, fine_tune_classes and others.")
    for number, run in enumerate(runs, start=1):
        if fault := _fault(run, header["depth"], setting):
            raise InputError(f"'{path}', run {number}: {fault}.")
    frame = pd.DataFrame(runs, columns=list(RUN)).astype({"sampled_percentage": float, "train_acc": float})
    if frame.empty or frame.duplicated(["sampled_percentage", "sampled_cut_point", "repeat"]).any():
        raise InputError(f"'{path}' has {'no runs' if frame.empty else 'a run twice'}.")
    return ResultFile(path, task, setting, header, frame, *_test_images(path, task, header, frame["test_acc"]))


def _entries(path: Path) -> list[dict]:
    """The list of objects in a file."""
    try:
        entries = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"'{path}' cannot be read as JSON ({error}).") from None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"'{path}' is no list of parameters and runs.")
    return entries


def _fault(run: Mapping, depth: int, setting: str | None) -> str | None:
    """What is wrong with a run, if anything."""
    for name in RUN:
        if name not in run:
            return f"it lacks {name}"
    for name in ("train_acc", "test_acc"):
        if not _share(run[name]) and not (name == "train_acc" and run[name] is None):
            return f"{name} is no number in [0, 1]"
    if not _share(run["sampled_percentage"]) or not run["sampled_percentage"]:
        return "sampled_percentage is no share above 0"
    lowest, highest = (BASELINE, BASELINE) if setting is None else (0, depth)
    if type(run["sampled_cut_point"]) is not int or not lowest <= run["sampled_cut_point"] <= highest:
        return f"sampled_cut_point is none of {lowest} … {highest}"
    return None if type(run["repeat"]) is int and run["repeat"] >= 0 else "repeat is no number of a repeat"


def _share(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def _sizes(task: str, header: Mapping) -> dict[str, list[int]]:
    """Images of the new task, by class: measure (of `SPLITS`) -> counts."""
    train, test = IMAGES[PRESETS[task].target]
    classes = header["fine_tune_classes"]
    if not classes or not all(type(one) is int and 0 <= one < len(train) for one in classes):
        raise InputError(f"The fine_tune_classes of {task} are {classes}, and it has the classes 0 … {len(train) - 1}.")
    return {"accuracy": [test[one] for one in classes], "seen_accuracy": [train[one] for one in classes]}


def common_denominator(values: Iterable[float]) -> int:
    """The smallest number of images of which all values are whole shares; above `LARGEST` where there is none."""
    found = 1
    for value in values:
        found = math.lcm(found, Fraction(value).limit_denominator(LARGEST).denominator)
        if found > LARGEST:
            break
    return found


def _test_images(path: Path, task: str, header: Mapping, values: Sequence[float]) -> tuple[str, int]:
    """Which images "test" was: of the splits whose size the denominator divides, the smaller one."""
    sizes, denominator = (
        {name: sum(counts) for name, counts in _sizes(task, header).items()},
        common_denominator(values),
    )
    for measure, size in sorted(sizes.items(), key=lambda item: item[1]):
        if size % denominator == 0:
            return measure, size
    raise InputError(f"test_acc in '{path}' are shares of neither {' nor '.join(map(str, sizes.values()))} images.")


def training_images(file: ResultFile, amount: float) -> int:
    """Images in a subset: as many of each class, of what validation leaves; from the header where it says so (ours)."""
    if "images" in file.header:
        return int(file.header["images"][f"{amount:g}"])
    counts = _sizes(file.task, file.header)["seen_accuracy"]
    left = sum(counts) - int(VALIDATION * sum(counts))
    return int(left * amount / len(counts)) * len(counts)


def common_table(files: Iterable[ResultFile]) -> pd.DataFrame:
    """The runs of ``cuts_*`` files as a common table, see `transfer.statistics`.

    Cut 0 of FR and R is `scratch`, cut 0 of F is `finetune`: the same programs. What FR has at cut 0 or at the depth is
    not taken a second time from R or F.
    """
    parts = []
    for file in files:
        if file.setting is not None:
            runs, arm = file.runs, ARMS[file.setting]
            own = pd.DataFrame({"cut": runs["sampled_cut_point"], "amount": runs["sampled_percentage"]})
            own["repeat"], own["arm"], own["task"] = runs["repeat"], arm, file.task
            own["protocol"] = file.header.get("protocol", "original")
            own["updates"], own["failed"] = int(file.header.get("updates", 0)), None
            own[[*SPLITS, "balanced_accuracy"]] = float("nan")
            own[file.measure] = runs["test_acc"]
            own["n"] = [training_images(file, amount) for amount in own["amount"]]
            parts.append(_named(own, file.depth))
    table = pd.concat(parts, ignore_index=True)[list(COLUMNS)]
    return table.drop_duplicates(["task", "protocol", "arm", "cut", "amount", "repeat"], ignore_index=True)


def _named(runs: pd.DataFrame, depth: int) -> pd.DataFrame:
    """Runs with programs under the names that `arms.arms_of` gives them, but for truncated at the full depth."""
    first, last = runs["cut"] == 0, runs["cut"] == depth
    scratch = first & runs["arm"].isin(("frozen", "warm"))
    finetune = (first & (runs["arm"] == "frozen+rest")) | (last & (runs["arm"] == "warm"))
    frozen = last & (runs["arm"] == "frozen+rest")
    runs.loc[scratch, "arm"], runs.loc[frozen, "arm"] = "scratch", "frozen"
    runs.loc[finetune, ["arm", "cut"]] = ["finetune", depth]
    return runs


def _chance(file: ResultFile) -> float:
    """Share of the largest class among the images it was tested on."""
    counts = _sizes(file.task, file.header)[file.measure]
    return max(counts) / sum(counts)


def facts(files: Sequence[ResultFile]) -> Iterator[tuple[str, str]]:
    """What the files are and what they cannot say: name -> words, a line each."""
    by_name = {(file.task, file.setting): file for file in files}
    for file in files:
        if file.setting is not None:
            yield file.name, _about(file)
    for (task, setting), file in by_name.items():
        partner = by_name.get((task, "FR"))
        if setting in ("F", "FT") and partner is not None:
            yield f"{task} FR and {setting}", _comparable(partner, file)
        elif setting is None and partner is not None:
            equal, both = _agreement(file.at(BASELINE), partner.at(0))
            words = "so comparing the two says nothing" if equal == both else "although they are one program"
            yield f"{task} baselines and cut 0 of FR", f"{equal} of {both} runs are equal, {words}"


def _about(file: ResultFile) -> str:
    """Test images, repeats with the smallest p they can give, and how long it trained."""
    repeats = file.runs.groupby("sampled_percentage")["repeat"].nunique()
    amounts = ", ".join(f"{count} at {share(amount)}" for amount, count in repeats.items())
    few = [amount for amount, count in repeats.items() if 2 / 2**count >= report.LEVEL]
    words = f'"test" is {SPLITS[file.measure]} ({file.images:,} images); repeats: {amounts}'
    if few:
        lowest = 2 / 2 ** repeats[few].max()
        words += f"; at {', '.join(map(share, few))} no test can reject (p ≥ {lowest:g})"
    batch, epochs = file.header.get("batch_size"), file.header.get("num_train")
    if batch and epochs:
        most = [epochs * math.ceil(training_images(file, amount) / batch) for amount in repeats.index]
        words += f"; at most {', '.join(f'{count:,}' for count in most)} updates"
    return words


def _agreement(first: pd.Series, second: pd.Series) -> tuple[int, int]:
    """Of how many runs that both have the accuracies are equal."""
    pairs = pd.concat([first, second], axis=1, join="inner")
    return int((pairs.iloc[:, 0] == pairs.iloc[:, 1]).sum()), len(pairs)


def _comparable(first: ResultFile, second: ResultFile) -> str:
    """Whether two settings were tested on the same images, seen where they are the same program: at the full depth."""
    cells = [file.at(file.depth) for file in (first, second)]
    equal, both = _agreement(*cells)
    words = f"at cut {first.depth}, where they are one program, {equal} of {both} runs are equal"
    if first.measure == second.measure:
        return words
    gaps = (cells[1] - cells[0]).groupby(level=0).median()
    points = ", ".join(f"{100 * gap:+.2f} at {share(amount)}" for amount, gap in gaps.items()).replace("-", "−")
    return (
        f"they cannot be compared, for they were tested on {first.images:,} images of {SPLITS[first.measure]} and on "
        f"{second.images:,} of {SPLITS[second.measure]}; {words}, {second.setting} is higher by {points} (medians)"
    )


def cluster_table(directory: str | Path) -> pd.DataFrame | None:
    """The adjusted Rand indices of ``*_cluster.json`` as measures of probes (see `probes.probe_layers`), or None.

    They were computed from as many images as each amount has, and fall with their number alone: each amount is a
    measure of its own. Layer c is convolution c − 1.
    """
    rows = []
    for path in _found(Path(directory), "*_cluster.json"):
        task = _task_of(path, path.stem.removesuffix("_cluster"))
        for number, entry in enumerate(_entries(path), start=1):
            if any(name not in entry for name in CLUSTER) or not str(entry["Layer"]).removeprefix("conv").isdigit():
                raise InputError(f"'{path}', entry {number}, lacks one of {', '.join(CLUSTER)}.")
            layer, amount = int(entry["Layer"].removeprefix("conv")) + 1, float(entry["Percentage"])
            index = float("nan") if entry["ARI"] is None else entry["ARI"]  # null of ours: nothing to cluster
            rows.append((task, PRETRAINED, entry["Repeat"], layer, f"ari at {share(amount)}", index))
    columns = ["task", "network", "repeat", "layer", "measure", "value"]
    return pd.DataFrame(rows, columns=columns) if rows else None


def export_original(directory: str | Path, results: Results) -> list[Path]:
    """Write the records of a transfer study as the original's result files; their entries have exactly its keys.

    Accuracies are those of the last checkpoint on the *true* test split; the header says so with "test", and has the
    number of training images of each amount. train_acc is null where it was not measured. What the original has no
    setting for (weight-wise arms, other networks) is left out, as are runs that failed.

    Args:
        directory: made if need be; gets ``SET/results/``, with the names of the original.
        results: of the transfer study.

    Returns:
        The files that were written.

    Raises:
        InputError: no record that the original has a place for; a directory that cannot be written to.
    """
    folders, kept, left = {task: names for names, task in FOLDERS.items()}, {}, 0
    for record in results.records():
        if record.get("arm") in KINDS and record["task"] in folders and not record["failed"]:
            kept.setdefault(record["task"], []).append(record)
        else:
            left += 1
    if not kept:
        raise InputError(f"'{results.directory}' has no runs of layer-wise arms on a task of the original.")
    if left:
        log.warning("%d records are left out: they failed, or the original has no setting or task for them.", left)
    settings, written = results.read_settings()["settings"], []
    for task, own in kept.items():
        folder, classes = folders[task]
        for stem, entries in _exported(task, classes, own, settings):
            written.append(Path(directory) / folder / "results" / f"{stem}.json")
            with atomic_write(written[-1]) as path:
                path.write_text(json.dumps(entries, allow_nan=False), "utf-8")
    return written


def _exported(
    task: str, classes: str, records: Sequence[Mapping], settings: Mapping[str, object]
) -> Iterator[tuple[str, list[dict]]]:
    """Name and entries of each file of a task."""
    depth = next((record["cut"] for record in records if record["arm"] == "finetune"), DEPTH)
    present, placed = {record["arm"] for record in records}, {name: [] for name in (None, *ARMS)}
    for record in records:
        for setting, cut in _places(record["arm"], record["cut"], depth, present):
            placed[setting].append(_entry(record, cut, settings))
    images = {f"{record['amount']:g}": record["n"] for record in sorted(records, key=lambda record: record["amount"])}
    for setting, runs in placed.items():
        if runs:
            header = _header(task, setting, depth, settings) | {"images": images}
            runs.sort(key=lambda run: (run["sampled_percentage"], run["sampled_cut_point"], run["repeat"]))
            yield f"baselines_{classes}" if setting is None else f"cuts_{classes}_{setting}", [header, *runs]


def _places(arm: str, cut: int, depth: int, present: Iterable[str]) -> list[tuple[str | None, int]]:
    """Settings and cut points of the original that an arm stands for, among those whose own arm is present."""
    places = {"scratch": [(None, BASELINE), ("FR", 0), ("R", 0)], "finetune": [("F", 0), ("R", depth)]}.get(arm)
    if places is None:
        places = [(setting, cut) for setting, name in ARMS.items() if name == arm]
    if arm == "frozen" and cut == depth:
        places += [("F", depth), ("FT", depth)]
    return [place for place in places if place[0] is None or ARMS[place[0]] in present]


def _entry(record: Mapping, cut: int, settings: Mapping[str, object]) -> dict[str, object]:
    """A run with the original's keys, at its last checkpoint."""
    train, test = (record.get(name) for name in ("train_accuracy", "accuracy"))
    last = max(test, key=int)
    values = (_rate(settings), record["amount"], cut, record["repeat"], train and train[last], test[last])
    return dict(zip(RUN, values, strict=True))


def _rate(settings: Mapping[str, object]) -> object:
    """Learning rate of a study, by either protocol."""
    return settings.get("TRANSFER_LEARNING_RATE", settings.get("ORIGINAL_LEARNING_RATE"))


def _header(task: str, setting: str | None, depth: int, settings: Mapping[str, object]) -> dict[str, object]:
    """The original's parameters with our values, null for what we do not have, and what else `import_original` uses."""
    preset = PRESETS[task]
    return {
        "depth": depth,
        "num_channels": settings.get("TRANSFER_CHANNELS"),
        "activation_function": RELU,
        "kernel_size": 3,
        "lr_pretrain": _rate(settings),
        "lr_fine_tune": _rate(settings),
        "num_train": settings.get("ORIGINAL_EPOCHS"),
        "early_stop_patience": settings.get("ORIGINAL_PATIENCE"),
        "batch_size": settings.get("TRANSFER_BATCH_SIZE", settings.get("ORIGINAL_BATCH_SIZE")),
        "pre_train_classes": list(preset.source_classes),
        "fine_tune_classes": list(preset.target_classes),
        "val_split": settings.get("ORIGINAL_VALIDATION"),
        "generate_dataset_seed": settings.get("ORIGINAL_SPLIT_SEED"),
        "use_pooling": True,
        "pooling_every_n_layers": 2,
        "pooling_stride": 2,
        "freeze": setting not in (None, "R"),
        "reinit": setting != "F",
        "truncate": setting == "FT",
        "test": "true",
        "protocol": settings["protocol"],
        "updates": settings.get("TRANSFER_UPDATES", 0),
    }

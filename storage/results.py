"""Results on disk: one directory, one set of settings.

`records.jsonl` holds one JSON line per result and is only ever appended to, all records of a unit of work at once; a
line torn by a crash is cut off by the next run. `weights/`, `histories/`, `importance/` and `evidence/` hold one file
per domain or holdout with a leading seed axis, written whole. `settings.json` says what made them. Nothing here holds a
clock time or a path: equal runs, equal bytes.
"""

import hashlib
import json
import logging
import os
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from config import ADDED_LATER, InputError, Settings
from storage.atomic import atomic_write, remove_leftovers, write_errors
from storage.schema import check_json, damaged

log = logging.getLogger(__name__)

RULES = ("training-domain", "leave-one-domain-out", "oracle", "last")  # of selection; each has a table
OUTPUTS = ("weights", "histories", "importance", "evidence", "plots", "records.jsonl", "summary_report.txt")
OUTPUTS += ("comparison.txt",)
OUTPUTS += (*(f"comparison_{rule}.csv" for rule in RULES), "comparison_seeds.csv", "linear_probe.csv")
OUTPUTS += ("report.html", "settings.json")
PACKAGES = ("torch", "torchvision", "transformers", "numpy", "scipy", "scikit-learn")


def record_key(record: Mapping) -> str:
    """Identity of a result, 16 hex digits over the values of `names`; a comparison has trial and hyperparameters."""
    names = ["features", "algorithm", "settings", "holdout", "seed", "selection"]
    names += [name for name in ("trial", "hyperparameters") if name in record]
    return hashlib.sha256(json.dumps([record[name] for name in names]).encode()).hexdigest()[:16]


def environment(device: str, threads: int) -> dict[str, object]:
    """What a result may depend on beside its settings: versions, device, threads, commit."""
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    versions = {package: version(package) for package in PACKAGES}
    return {"versions": versions, "device": name, "threads": threads, "commit": _commit()}


def _commit() -> str | None:
    """Commit of this project's own checkout; None where it has none, even inside the checkout of something else."""
    folder = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != folder:
            return None
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")  # a notebook changes no result
        return git("describe", "--always", "--exclude", "*") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


class Results:
    """A results directory, made when something is written. ``with results:`` locks it against a second writer."""

    def __init__(self, directory: str | Path):
        self.directory = Path(os.path.expanduser(directory))
        self._lock = FileLock(self.directory / ".lock")  # counts its holders: `with` may be nested
        self._parsed: tuple[tuple[int, int], dict[str, dict]] | None = None  # state of records.jsonl, records by key

    def __enter__(self) -> "Results":
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InputError(
                f"Another run is writing to '{self.directory}': wait for it or give another RESULTS_DIR."
            ) from None
        return self

    def __exit__(self, *_) -> None:
        self._lock.release()

    def claim(self, settings: Settings, features: Mapping, environment: Mapping | None = None) -> None:
        """Make this directory that of one set of settings and features, or check that it already is.

        A torn last record is cut off, and temporary files of processes that were killed are removed.

        Args:
            features: facts about the features, with "fingerprint".
            environment: what trains (see `environment`), added to those noted; None = nothing is trained.

        Raises:
            InputError: it holds results of others, the differing settings are named; or its records are damaged.
        """
        stored = self._refuse_others(settings, features)
        self._cut_torn_line()
        self.records()
        for folder in (self.directory, *(self.directory / name for name in OUTPUTS)):
            remove_leftovers(folder)
        known = [] if stored is None else stored["environments"]
        if stored is not None and (environment is None or environment in known):
            return
        content = {"hash": settings.hash, "settings": settings.as_dict(), "features": dict(features)}
        content["environments"] = [*known, *([] if environment is None else [dict(environment)])]
        self._write_settings((stored or {}) | content)

    def _write_settings(self, content: Mapping) -> None:
        self.write_text("settings.json", json.dumps(content, indent=1) + "\n")

    def note_contents(self) -> None:
        """Note in settings.json which seeds there are records of, by holdout."""
        seeds, stored = defaultdict(set), self.read_settings()
        for record in self.records():
            seeds[record["holdout"]].add(record["seed"])
        holdouts = {name: ranges(seeds[name]) for name in sorted(seeds)}
        if stored is not None and stored.get("holdouts", {}) != holdouts:
            self._write_settings(stored | {"holdouts": holdouts})

    def check(self, settings: Settings, overwrite: bool = False) -> None:
        """Refuse what `claim` (`clear`, if the run is going to) would refuse and can be known without features."""
        with self:
            if overwrite:
                self._own_settings()
            else:
                self._refuse_others(settings)
                self.records()  # refuses damaged ones

    def _refuse_others(self, settings: Settings, features: Mapping | None = None) -> dict | None:
        """The content of settings.json, if it is that of these settings and, where known, features."""
        stored = self._own_settings()
        if stored is None:
            return None
        expected, found = (ADDED_LATER | values for values in (settings.as_dict(), stored["settings"]))
        if features is not None:
            expected["features"], found["features"] = features["fingerprint"], stored["features"]["fingerprint"]
        differ = [f"{n} = {found.get(n)!r}, not {value!r}" for n, value in expected.items() if found.get(n) != value]
        blocks = [values.get("TRAINED_BLOCKS", 0) for values in (found, expected)]
        if blocks[0] != blocks[1]:  # then most of the others have other names, too
            differ = [f"TRAINED_BLOCKS = {blocks[0]}, not {blocks[1]}"]
        if differ:
            raise InputError(
                f"'{self.directory}' holds results with {'; '.join(differ)}: give another RESULTS_DIR (--results-dir), "
                "or delete them with OVERWRITE (--overwrite)."
            )
        return stored

    def read_settings(self) -> dict | None:
        """The content of settings.json, or None where there is none."""
        path = self.directory / "settings.json"
        if not path.is_file():
            return None
        try:
            stored = json.loads(path.read_text("utf-8"))
        except (ValueError, RecursionError) as error:
            raise damaged(f"'{path}'", error) from error
        check_json(f"'{path}'", stored, "settings")
        return stored

    def clear(self) -> None:
        """Delete what a run writes, and nothing else.

        Raises:
            InputError: files of these names are there, but no settings.json of this project.
        """
        with self:
            self._own_settings()
            for name in OUTPUTS:
                path = self.directory / name
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)

    def _own_settings(self) -> dict | None:
        """The content of settings.json; None where there is neither that nor anything else of a run."""
        stored, left = self.read_settings(), [name for name in OUTPUTS if (self.directory / name).exists()]
        if stored is None and left:
            raise InputError(f"'{self.directory}' has {left[0]} but no settings.json: give another RESULTS_DIR.")
        return stored

    @property
    def _records_path(self) -> Path:
        return self.directory / "records.jsonl"

    def records(self) -> list[dict]:
        """All complete records, one per key, in the order written; a torn last line is passed over.

        The file is parsed again only if somebody else changed it.

        Raises:
            InputError: a line that is not the last is no record.
        """
        return list(self._by_key().values())

    def _by_key(self) -> dict[str, dict]:
        if not self._records_path.is_file():
            return {}
        if self._parsed is None or self._parsed[0] != self._state():
            self._parsed = self._state(), self._parse()
        return self._parsed[1]

    def _state(self) -> tuple[int, int]:
        stat = self._records_path.stat()
        return stat.st_size, stat.st_mtime_ns

    def _parse(self) -> dict[str, dict]:
        path, records = self._records_path, {}
        *lines, torn = path.read_bytes().split(b"\n")
        if torn:
            log.warning("The last line of %s is torn and passed over.", path)
        for number, line in enumerate(lines, start=1):
            where = f"Line {number} of '{path}'"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise damaged(where, error) from error
            check_json(where, record, "transfer" if isinstance(record, dict) and "arm" in record else "record")
            records[record["key"]] = record
        return records

    def _cut_torn_line(self) -> None:
        if not self._records_path.is_file():
            return
        with self._records_path.open("rb+") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
            if file.read() not in (b"\n", b""):
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)

    def append(self, records: Iterable[Mapping]) -> None:
        """Append those records whose key is not there yet, all or none; a torn last line is cut off first."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._cut_torn_line()
        known = self._by_key()
        new = {record["key"]: json.dumps(record) for record in records if record["key"] not in known}
        with write_errors(self._records_path), self._records_path.open("ab", buffering=0) as file:
            size, rest = file.tell(), "".join(f"{line}\n" for line in new.values()).encode()
            try:
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except BaseException:  # a part of a unit's records would pass for all of them
                file.truncate(size)
                raise
        known.update((key, json.loads(line)) for key, line in new.items())
        self._parsed = self._state(), known

    def path(self, kind: str, name: str) -> Path:
        """Where `save` writes."""
        return self.directory / kind / f"{name}.{'safetensors' if kind == 'weights' else 'npz'}"

    def has(self, kind: str, name: str) -> bool:
        """Whether there is such a file."""
        return self.path(kind, name).is_file()

    def save(self, kind: str, name: str, seeds: Sequence[int], arrays: Mapping[str, Tensor], header: Mapping) -> None:
        """Write arrays with a leading seed axis, merged with the seeds that are already there.

        Args:
            kind: "weights" (safetensors), "histories" or "importance" (npz).
            name: file name without ending.
            arrays: name -> ``[S, …]``.
            header: what the file is, ready for JSON.
        """
        new = {"seeds": torch.tensor(list(seeds)), **arrays}
        if self.has(kind, name):
            old, _ = self.load(kind, name)
            keep = ~torch.isin(old["seeds"], new["seeds"])
            new = {key: torch.cat([old[key][keep], value]) for key, value in new.items() if key in old}
        order = new["seeds"].argsort()
        new = {key: value[order].contiguous() for key, value in new.items()}
        text = json.dumps(header, sort_keys=True)
        with atomic_write(self.path(kind, name)) as path:
            if kind == "weights":
                save_file(new, path, metadata={"header": text})
            else:
                np.savez_compressed(path, header=np.array(text), **{k: v.numpy() for k, v in new.items()})

    def load(self, kind: str, name: str) -> tuple[dict[str, Tensor], dict]:
        """What `save` wrote, see `load_arrays`."""
        return load_arrays(self.path(kind, name))

    def write_text(self, name: str, text: str) -> None:
        """Write a UTF-8 text file whole."""
        with atomic_write(self.directory / name) as path:
            path.write_text(text, encoding="utf-8", newline="\n")


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers in short, as the command line takes them: {0, 1, 2, 5} -> "0-2,5"."""
    groups = groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])
    ends = [(found[0], found[-1]) for _, group in groups if (found := [number for _, number in group])]
    return ",".join(f"{first}-{last}" if first < last else f"{first}" for first, last in ends)


def load_arrays(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Arrays with a leading seed axis (with "seeds") and the header, from a file that `Results.save` wrote.

    Raises:
        InputError: the file is missing or is not of that format.
    """
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        raise InputError(f"There is no file '{path}'.")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                arrays = {key: torch.from_numpy(file[key]) for key in file.files if key != "header"}
                return arrays, json.loads(str(file["header"]))
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["header"])  # noqa: SIM118
    except Exception as error:  # whatever the libraries raise on a foreign file
        raise damaged(f"'{path}'", error) from error

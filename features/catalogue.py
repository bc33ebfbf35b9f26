"""The data sets that are known by name: what they consist of, under which terms, and where they come from."""

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from config import InputError

FILE = Path(__file__).with_name("catalogue.toml")


@dataclass(frozen=True)
class KnownSet:
    """A data set of ``catalogue.toml``, which says what the entries mean."""

    name: str
    paper: str
    source: str
    licence: str
    domains: Mapping[str, list[str]]
    classes: list[str] | int
    counts: Mapping[str, Mapping[str, int] | int]
    by_class: Mapping[str, list[int]]
    hub: str | None = None
    numbered: bool = False
    lists: bool = False
    annotations: bool = False

    @property
    def num_classes(self) -> int:
        return self.classes if isinstance(self.classes, int) else len(self.classes)

    @property
    def images(self) -> int:
        """Images of the edition in use."""
        return _total(next(iter(self.counts.values())))

    def domain_of(self, folder: str) -> str | None:
        """The domain that a folder of this name is, or None."""
        called = {_plain(name): domain for domain, others in self.domains.items() for name in (domain, *others)}
        return called.get(_plain(folder))

    def class_of(self, folder: str) -> str | None:
        """The class that a folder of this name is, or None."""
        if isinstance(self.classes, int):
            return folder
        called = {_plain(name): name for name in self.classes}
        if self.numbered:
            called |= {str(number): name for number, name in enumerate(self.classes)}
        return called.get(_plain(folder))

    def edition(self, found: Mapping[str, Mapping[str, int]]) -> tuple[str | None, list[str]]:
        """Compare numbers of images, by domain and class, with those that are known.

        Returns:
            The edition that has these numbers; or None, and every difference from the edition in use.
        """
        differences = {edition: self._differences(edition, found) for edition in self.counts}
        same = next((edition for edition, different in differences.items() if not different), None)
        return same, [] if same else next(iter(differences.values()))

    def _differences(self, edition: str, found: Mapping[str, Mapping[str, int]]) -> list[str]:
        known, sums = self.counts[edition], {domain: sum(classes.values()) for domain, classes in found.items()}
        wanted: dict[str, int] = known if isinstance(known, Mapping) else {}
        if self.by_class and isinstance(self.classes, list):
            found_cells = {f"{domain}/{label}": n for domain, own in found.items() for label, n in own.items()}
            cells = {domain: zip(self.classes, numbers, strict=True) for domain, numbers in self.by_class.items()}
            wanted_cells = {f"{domain}/{label}": n for domain, own in cells.items() for label, n in own}
            return _unequal(found_cells, wanted_cells)
        different = _unequal(sums, wanted or {domain: sums.get(domain, 0) for domain in self.domains})
        if not wanted and sum(sums.values()) != known:
            different.append(f"{sum(sums.values()):,} images in all instead of {known:,}")
        if len(labels := {label for classes in found.values() for label in classes}) != self.num_classes:
            different.append(f"{len(labels)} classes instead of {self.num_classes}")
        return different


def _unequal(found: Mapping[str, int], wanted: Mapping[str, int]) -> list[str]:
    names = dict.fromkeys((*wanted, *found))
    return [
        f"{name}: {found.get(name, 0):,} instead of {wanted.get(name, 0):,}"
        for name in names
        if found.get(name, 0) != wanted.get(name, 0)
    ]


def _total(count: Mapping[str, int] | int) -> int:
    return sum(count.values()) if isinstance(count, Mapping) else count


def _plain(name: str) -> str:
    """A name without what its spellings differ in."""
    return re.sub(r"[\W_]+", "", name).casefold()


@cache
def known_sets() -> dict[str, KnownSet]:
    """The known data sets, by name."""
    entries = tomllib.loads(FILE.read_text("utf-8"))
    return {name: KnownSet(**{"name": name, "by_class": {}} | entry) for name, entry in entries.items()}


def known_set(name: str) -> KnownSet:
    """A known data set by its name, whose case, "-" and "_" don't matter.

    Raises:
        InputError: there is none of that name; the nearest is offered.
    """
    known = {_plain(other): entry for other, entry in known_sets().items()}
    if _plain(name) not in known:
        near = known[difflib.get_close_matches(_plain(name), known, n=1, cutoff=0)[0]]
        raise InputError(
            f"There is no known data set '{name}'; the nearest is {near.name} (images of your own need no command, but "
            "their folder as --data-root)."
        )
    return known[_plain(name)]


def catalogue_rows() -> list[list[str]]:
    """A row for each known data set: name, images, classes, domains, licence, hub, source, paper."""
    return [
        [
            known.name,
            " or ".join(f"{_total(count):,}" for count in known.counts.values()),
            str(known.num_classes),
            ", ".join(known.domains),
            known.licence,
            known.hub or "",
            known.source,
            known.paper,
        ]
        for known in known_sets().values()
    ]


def catalogue_text() -> str:
    """The known data sets, for the terminal."""
    lines = []
    for name, images, classes, domains, licence, hub, source, paper in catalogue_rows():
        lines += [
            f"{name} ({paper}): {images} images, {classes} classes, domains {domains}",
            f"    licence: {licence}",
            f"    from the hub: {hub}, or by hand: {source}" if hub else f"    by hand: {source}, then --from",
        ]
    return "\n".join(lines)

"""The known data sets: what is said of them adds up, and agrees with the images and features that are here."""

from collections import Counter

import pytest

from config import InputError
from dataset import find_dataset
from features import bundled_features, catalogue_rows, catalogue_text, known_sets
from features.catalogue import KnownSet, known_set
from tests.conftest import SHARED

NAMES = ["PACS", "VLCS", "OfficeHome", "TerraIncognita", "DomainNet", "Office31", "DigitsDG"]
TOY = {
    "name": "Toy",
    "paper": "",
    "source": "",
    "licence": "",
    "domains": {"art": ["art_painting"], "Real World": ["real"]},
    "classes": ["dog", "horse"],
    "counts": {"new": {"art": 3, "Real World": 4}, "old": 10},
    "by_class": {},
}
NEW = {"art": {"dog": 1, "horse": 2}, "Real World": {"dog": 2, "horse": 2}}


def test_these_sets_are_known():
    assert [*known_sets()] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_an_entry_agrees_with_itself(name):
    known = known_set(name)
    assert len(known.domains) >= 2
    for count in known.counts.values():
        assert isinstance(count, int) or set(count) == set(known.domains)
    names = [spelling for domain, others in known.domains.items() for spelling in (domain, *others)]
    assert [known.domain_of(spelling) for spelling in names] == [
        domain for domain, others in known.domains.items() for _ in (domain, *others)
    ]
    assert isinstance(known.classes, int) or known.classes == sorted({*known.classes})
    if known.by_class:
        (count,) = known.counts.values()
        assert {domain: sum(numbers) for domain, numbers in known.by_class.items()} == count
    assert known.source.startswith("https://")
    assert known.licence


def test_pacs_is_that_of_the_bundled_features():
    assert known_set("PACS").edition(bundled_features().header["counts"]) == ("complete", [])


@pytest.mark.parametrize(("name", "folder"), [("PACS", "pacs"), ("Office31", "office31")])
def test_sets_that_are_here_have_the_known_numbers(name, folder):
    if not (SHARED / "data" / folder).is_dir():
        pytest.skip(f"no ../shared/data/{folder} here")
    found = find_dataset(SHARED / "data" / folder)
    counts: dict[str, Counter] = {domain: Counter() for domain in found.domain_names}
    for file in found.files:
        domain, label, _ = file.split("/")
        counts[domain][label] += 1
    assert known_set(name).edition(counts) == ("complete", [])


@pytest.mark.parametrize("name", ["office-31", "Office_31", "OFFICE31"])
def test_a_name_has_many_spellings(name):
    assert known_set(name).name == "Office31"


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(InputError, match=r"nearest is PACS.*--data-root"):
        known_set("pcas")


def test_folders_are_known_by_all_their_names():
    toy = KnownSet(**TOY)
    assert [toy.domain_of(name) for name in ("ART", "art-painting", "Real_World", "REAL", "photo")] == [
        "art", "art", "Real World", "Real World", None,
    ]  # fmt: skip
    assert [toy.class_of(name) for name in ("Dog", "horse", "0", "cat")] == ["dog", "horse", None, None]
    assert KnownSet(**TOY | {"numbered": True}).class_of("1") == "horse"
    assert KnownSet(**TOY | {"classes": 2}).class_of("cat") == "cat"


@pytest.mark.parametrize(
    ("changes", "found", "expected"),
    [
        ({}, NEW, ("new", [])),
        ({}, {"art": {"dog": 4, "horse": 2}, "Real World": {"dog": 2, "horse": 2}}, ("old", [])),
        ({}, NEW | {"art": {"dog": 1, "horse": 3}}, (None, ["art: 4 instead of 3"])),
        ({}, NEW | {"photo": {"dog": 1}}, (None, ["photo: 1 instead of 0"])),
        ({}, {"art": {"dog": 3}, "Real World": {"dog": 4}}, (None, ["1 classes instead of 2"])),
        ({"counts": {"only": 8}}, NEW, (None, ["7 images in all instead of 8"])),
        (
            {"by_class": {"art": [1, 2], "Real World": [3, 1]}},
            NEW,
            (None, ["Real World/dog: 2 instead of 3", "Real World/horse: 2 instead of 1"]),
        ),
    ],
)
def test_numbers_are_compared_with_every_edition(changes, found, expected):
    assert KnownSet(**TOY | changes).edition(found) == expected


def test_the_list_says_where_each_set_comes_from():
    text = catalogue_text()
    for name, images, _, domains, licence, hub, source, paper in catalogue_rows():
        assert all(words in text for words in (name, images, domains, licence, hub, source, paper))

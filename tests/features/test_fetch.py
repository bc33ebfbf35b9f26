"""Getting a known data set: from archives and folders as they are distributed, and from what the hub would give."""

import io
import json
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from config import InputError
from dataset import find_dataset
from features import fetch_dataset
from features.catalogue import KnownSet, known_set
from storage import atomic_write
from tests.conftest import make_images, write_image
from tests.factories import dated, everything

TOY = KnownSet(
    name="Toy",
    paper="",
    source="https://example.org",
    licence="",
    domains={"art": ["art_painting"], "photo": []},
    classes=["dog", "horse"],
    counts={"complete": {"art": 6, "photo": 6}},
    by_class={"art": [3, 3], "photo": [3, 3]},
)


@pytest.fixture
def toy(monkeypatch):
    """A known set with the images of `image_root`."""
    monkeypatch.setattr("features.fetch.known_set", lambda name: TOY)


@pytest.fixture
def get(toy, tmp_path):
    """Fetch the toy set from sources into a folder, without a bar."""
    return lambda *sources, **choice: fetch_dataset("toy", tmp_path / "out", sources, progress=False, **choice)


def images(root):
    """File of each image below a folder -> its bytes."""
    return {str(path.relative_to(root)): path.read_bytes() for path in Path(root).rglob("*.png")}


def zipped(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def tarred(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("pack", [zipped, tarred])
@pytest.mark.parametrize("above", ["", "./", "kfold/", "a/b/"])
def test_an_archive_becomes_folders(get, image_root, tmp_path, pack, above):
    wanted = images(image_root)
    extra = {"readme.txt": b"x", "__MACOSX/art/dog/._0.png": b"x", "art/cat/0.png": b"x", "music/dog/0.png": b"x"}
    source = pack(tmp_path / "toy.data", {f"{above}{name}": data for name, data in (wanted | extra).items()})
    found = get(source)
    assert images(tmp_path / "out") == wanted
    assert (found.root, len(found)) == (tmp_path / "out", 12)


def test_a_folder_and_a_domain_at_a_time_do_as_well(get, image_root, tmp_path):
    get(image_root / "art", image_root / "photo")
    assert images(tmp_path / "out") == images(image_root)


def test_a_folder_of_archives_is_opened(get, image_root, tmp_path):
    wanted, folder = images(image_root), tmp_path / "downloads"
    folder.mkdir()
    for domain in ("art", "photo"):  # the archive's own name is that of the domain
        own = {name.partition("/")[2]: data for name, data in wanted.items() if name.startswith(domain)}
        zipped(folder / f"{domain}.zip", own)
    get(folder)
    assert images(tmp_path / "out") == wanted


@pytest.mark.parametrize(
    ("name", "given", "written"),
    [
        ("PACS", "pacs_data/art_painting/dog/pic_001.jpg", "art_painting/dog/pic_001.jpg"),
        ("Office31", "Original_images/amazon/images/back_pack/frame_0001.jpg", "amazon/back_pack/frame_0001.jpg"),
        ("OfficeHome", "OfficeHomeDataset_10072016/Real World/Bed/00001.jpg", "Real World/Bed/00001.jpg"),
        ("OfficeHome", "office_home/RealWorld/Bed/00001.jpg", "Real World/Bed/00001.jpg"),
        ("VLCS", "VLCS/VOC2007/bird/0a.jpg", "VOC2007/bird/0a.jpg"),
        ("VLCS", "VLCS/PASCAL/full/3/0a.jpg", "VOC2007/dog/full_0a.jpg"),
        ("TerraIncognita", "terra_incognita/location_38/empty/a.jpg", "location_38/empty/a.jpg"),
        ("DomainNet", "domain_net/clipart/zigzag/c_1.jpg", "clipart/zigzag/c_1.jpg"),
        ("DigitsDG", "digits_dg/mnist_m/val/7/00001.jpg", "mnist_m/7/val_00001.jpg"),
    ],
)
def test_layouts_of_other_packages_are_known(tmp_path, name, given, written):
    known = known_set(name)
    image = make_images(tmp_path / "one", ("x",), ("y",), 1, ending="jpg") / "x" / "y" / "000.jpg"
    files = {given: image.read_bytes()}
    for domain in known.domains:  # so that what is written is a data set
        for label in {Path(written).parts[1]}:
            files[f"{domain}/{label}/other.jpg"] = b"?"
    source = zipped(tmp_path / "set.zip", files)
    fetch_dataset(name, tmp_path / "out", [source], any_counts=True, progress=False)
    assert (tmp_path / "out" / written).read_bytes() == image.read_bytes()


def test_an_image_in_several_splits_is_written_once(get, image_root, tmp_path):
    files = {}
    for name, data in images(image_root).items():
        domain, label, file = name.split("/")
        split = "test" if file == "002.png" else "train"
        files |= {f"{domain}/{split}/{label}/{file}": data, f"{domain}/full/{label}/1{file}": data}
    get(zipped(tmp_path / "toy.zip", files))
    assert sorted(images(tmp_path / "out" / "art" / "dog")) == ["test_002.png", "train_000.png", "train_001.png"]


@pytest.mark.parametrize(
    "evil", ["../../art/dog/x.png", "/art/dog/../../x.png", "art/dog/..\\..\\x.png", "art/dog/.png", "art/../x.png"]
)
@pytest.mark.parametrize("pack", [zipped, tarred])
def test_no_path_of_an_archive_leads_out_of_the_output(get, image_root, tmp_path, pack, evil):
    source = pack(tmp_path / "toy.data", images(image_root) | {evil: b"evil"})
    before = everything(tmp_path)
    get(source)
    outside = {name: data for name, data in everything(tmp_path).items() if not name.startswith("out/")}
    assert outside == before
    assert images(tmp_path / "out") == images(image_root)


def test_links_in_archives_are_passed_over(get, image_root, tmp_path):
    source = tarred(tmp_path / "toy.tar.gz", images(image_root))
    with tarfile.open(tmp_path / "links.tar", "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo(f"art/dog/{kind.decode()}.png")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    get(source, tmp_path / "links.tar")
    assert images(tmp_path / "out") == images(image_root)


def test_an_interrupted_command_goes_on_where_it_stopped(get, image_root, tmp_path, monkeypatch):
    write, written = atomic_write, []

    def failing(path, durable):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(path)
        return write(path, durable)

    monkeypatch.setattr("features.fetch.atomic_write", failing)
    with pytest.raises(KeyboardInterrupt):
        get(image_root)
    before = dated(tmp_path / "out")
    (tmp_path / "out" / next(iter(before))).write_bytes(b"cut off")
    monkeypatch.setattr("features.fetch.atomic_write", lambda *how, **more: written.append(how) or write(*how, **more))
    get(image_root)
    assert len(written) == 5 + 7 + 1
    assert images(tmp_path / "out") == images(image_root)
    get(image_root)
    assert len(written) == 13


def test_other_numbers_are_refused_by_class_unless_they_are_wanted(get, image_root, tmp_path, caplog):
    (image_root / "art/dog/000.png").unlink()
    write_image(image_root / "photo/horse/more.png")
    with pytest.raises(InputError, match=r"art/dog: 2 instead of 3; photo/horse: 4 instead of 3.*--any-counts"):
        get(image_root)
    assert len(get(image_root, any_counts=True)) == 12
    assert "art/dog: 2 instead of 3" in caplog.text


def test_two_images_for_one_place_are_refused(get, image_root, tmp_path):
    shutil.copytree(image_root, tmp_path / "both" / "a")
    shutil.copytree(image_root, tmp_path / "both" / "b")
    get(tmp_path / "both")  # the same twice
    (tmp_path / "both/b/art/dog/000.png").write_bytes(b"another")
    with pytest.raises(InputError, match=r"two different images 'art/dog/000\.png'"):
        get(tmp_path / "both")


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_a_damaged_archive_is_named(get, image_root, tmp_path, pack):
    source = pack(tmp_path / "toy.data", images(image_root))
    data = source.read_bytes()
    source.write_bytes(data[: len(data) // 2] + (data[-200:] if pack is zipped else b""))
    with pytest.raises(InputError, match=r"toy\.data' (cannot be read to its end|is no folder)"):
        get(source)


def test_what_is_no_source_is_refused(get, image_root, tmp_path):
    (tmp_path / "text.zip").write_text("no archive")
    (tmp_path / "empty").mkdir()
    for source, message in (
        (tmp_path / "nothing", "There is no file or folder"),
        (tmp_path / "text.zip", "is no folder, and no archive"),
        (tmp_path / "empty", "no images of Toy.*art, photo"),
        (tmp_path / "out", "both the source and the output"),
    ):
        (tmp_path / "out").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=message):
            get(source)


def test_annotations_place_the_images_of_camera_traps(tmp_path):
    """TerraIncognita is given as one folder of images, and JSON that says where each was taken and what it shows."""
    folder, taken = tmp_path / "cct", {"a": 38, "b": "38", "c": 43, "d": 100, "e": 46, "f": 7, "g": 38}
    (folder / "eccv_18_all_images_sm").mkdir(parents=True)
    for number, name in enumerate(taken):
        write_image(folder / "eccv_18_all_images_sm" / f"{name}.jpg", seed=number)
    shown = {"a": [1], "b": [1, 2], "c": [1], "d": [1], "e": [1], "f": [1], "g": [3]}
    notes = {
        "categories": [{"id": 1, "name": "bobcat"}, {"id": 2, "name": "empty"}, {"id": 3, "name": "car"}],
        "images": [{"id": name, "file_name": f"{name}.jpg", "location": place} for name, place in taken.items()],
        "annotations": [{"image_id": name, "category_id": kind} for name, kinds in shown.items() for kind in kinds],
    }
    (folder / "caltech_images.json").write_text(json.dumps(notes))
    with pytest.raises(InputError, match="images in all instead of 24,330"):
        fetch_dataset("TerraIncognita", tmp_path / "out", [folder], progress=False)
    assert sorted(name for name in everything(tmp_path / "out")) == [
        "location_100/bobcat/d.jpg", "location_38/bobcat/a.jpg", "location_38/bobcat/b.jpg",
        "location_38/empty/b.jpg", "location_43/bobcat/c.jpg", "location_46/bobcat/e.jpg",
    ]  # fmt: skip
    for content in ({"labels.json": b'{"images": []}'}, {"readme.txt": b"x"}):
        zipped(tmp_path / "labels.json.zip", content)
        with pytest.raises(InputError, match=r"labels\.json\.zip' does not hold annotations"):
            fetch_dataset("TerraIncognita", tmp_path / "other", [folder, tmp_path / "labels.json.zip"], progress=False)


def test_lists_say_which_images_belong_to_domainnet(tmp_path):
    domains = tuple(known_set("DomainNet").domains)
    make_images(tmp_path / "net", domains, ("ant", "bee"), per_class=2)
    (tmp_path / "net" / "real_train.txt").write_text("real/ant/000.png 0\nreal/bee/001.png 1\n")
    (tmp_path / "net" / "real_test.txt").write_text("real/ant/001.png 0\n")
    fetch_dataset("DomainNet", tmp_path / "out", [tmp_path / "net"], any_counts=True, progress=False)
    assert sorted(images(tmp_path / "out" / "real")) == ["ant/000.png", "ant/001.png", "bee/001.png"]
    assert len(images(tmp_path / "out" / "sketch")) == 4
    (tmp_path / "net" / "real_test.txt").write_text("nonsense\n")
    with pytest.raises(InputError, match=r"real_test\.txt' has the line 'nonsense'"):
        fetch_dataset("DomainNet", tmp_path / "out", [tmp_path / "net"], any_counts=True, progress=False)


def test_rows_of_several_parquet_files_do_not_take_one_anothers_place(get, image_root, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pip install pyarrow to read Parquet files")
    import pyarrow

    found = find_dataset(image_root)
    for part, rows in (("train", range(0, 12, 2)), ("test", range(1, 12, 2))):
        table = pyarrow.table({
            "image": [found.read(row) for row in rows],
            "domain": [found.files[row].split("/")[0] for row in rows],
            "label": [found.files[row].split("/")[1] for row in rows],
        })  # fmt: skip
        parquet.write_table(table, tmp_path / f"{part}.parquet")
    get(tmp_path / "train.parquet", tmp_path / "test.parquet")
    assert sorted(images(tmp_path / "out").values()) == sorted(images(image_root).values())


def test_the_hub_gives_parquet_files(get, image_root, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pip install pyarrow to read Parquet files")
    import pyarrow

    found = find_dataset(image_root)
    table = pyarrow.table({
        "image": [{"bytes": found.read(row), "path": None} for row in range(12)],
        "domain": [{"art": "art_painting", "photo": "Photo"}[file.split("/")[0]] for file in found.files],
        "label": [file.split("/")[1] for file in found.files],
    })  # fmt: skip
    (tmp_path / "snapshot" / "data").mkdir(parents=True)
    parquet.write_table(table[:9], tmp_path / "snapshot" / "data" / "train-00000.parquet")
    asked = []
    monkeypatch.setattr("features.fetch.known_set", lambda name: KnownSet(**{**vars(TOY), "hub": "some/toy"}))
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *name, **how: asked.append((name, how)) or tmp_path / "snapshot"
    )
    with pytest.raises(InputError, match="photo/horse: 0 instead of 3"):  # not that a domain lacks a class
        get()
    shutil.rmtree(tmp_path / "out")
    parquet.write_table(table, tmp_path / "snapshot" / "data" / "train-00000.parquet", row_group_size=5)
    get()
    asked.pop()
    assert asked == [(("some/toy",), {"repo_type": "dataset", "allow_patterns": ["*.parquet"]})]
    assert sorted(images(tmp_path / "out").values()) == sorted(images(image_root).values())
    assert "photo/horse/00000011.png" in images(tmp_path / "out")


def test_without_hub_network_or_pyarrow_a_sentence_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"VLCS is not on the hub: .* https://.* --from"):
        fetch_dataset("VLCS", tmp_path / "out")

    def unreachable(*name, **how):
        raise RuntimeError("no route to host\nmore")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"pip install pyarrow\.$"):
        fetch_dataset("PACS", tmp_path / "out")
    monkeypatch.setattr("features.fetch.import_pyarrow", lambda: None)
    with pytest.raises(InputError, match=r"from the hub \(no route to host\): .* --from"):
        fetch_dataset("PACS", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_lists_the_sets_and_gets_one(command, tmp_path):
    code, printed, _ = command("data")
    assert code == 0
    assert "flwrlabs/pacs" in printed
    assert command("data", "pacs")[::2] == (2, ["data NAME needs --output DIR."])
    assert command("data", "--output", tmp_path)[::2] == (2, ["data NAME needs --output DIR."])
    root = make_images(tmp_path / ".office", ("amazon", "dslr", "webcam"), ("bike", "mug"))
    options = ("data", "office-31", "--from", root, "--output", tmp_path / "out")
    code, _, (*_, sentence) = command(*options)
    assert code == 2
    assert "amazon/back_pack: 0 instead of 92" in sentence
    assert " and 85 more" in sentence
    code, printed, _ = command(*options, "--any-counts")
    sentence = f"18 images in 3 domains and 2 classes are in {tmp_path}/out: give it as --data-root.\n"
    assert (code, printed) == (0, sentence)

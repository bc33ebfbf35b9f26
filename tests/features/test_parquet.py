"""Images in the rows of Parquet files, as on the Hugging Face hub, are found and read like those in folders."""

import json
import os
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

import dataset
from config import InputError
from dataset import find_dataset
from features import check_images
from study.figures import sample_figure
from tests.conftest import write_image


@pytest.fixture
def parquet():
    """pyarrow's module, which requirements.txt doesn't install."""
    return pytest.importorskip("pyarrow.parquet", reason="pip install pyarrow to read Parquet files")


@pytest.fixture
def write(parquet, image_root, tmp_path):
    """Writes the images of a tree as `datasets` would, shuffled, in two files: keyword arguments replace columns."""
    import pyarrow

    found = find_dataset(image_root)
    order = [7, 0, 11, 3, 5, 1, 9, 10, 2, 8, 4, 6]
    noted = {"label": {"_type": "ClassLabel", "names": [*found.class_names]}, "domain": {"_type": "Value"}}

    def write(folder="hub", split=8, rows_per_group=3, names=noted, **columns):
        images = [{"bytes": found.read(row), "path": f"{row}.png"} for row in order]
        domains = [found.domain_names[found.domains[row]] for row in order]
        usual = {"image": images, "domain": domains, "label": [int(found.labels[row]) for row in order]}
        table = pyarrow.table({name: column for name, column in (usual | columns).items() if column is not None})
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": names}})})
        (tmp_path / folder / "data").mkdir(parents=True)
        for number, part in enumerate((table[:split], table[split:])):
            path = tmp_path / folder / "data" / f"train-{number:05d}-of-00002.parquet"
            parquet.write_table(part, path, row_group_size=rows_per_group)
        return tmp_path / folder

    write.found, write.order = found, order
    return write


def test_rows_are_those_of_the_folders_in_the_order_of_the_files(write):
    rows, folders = find_dataset(write()), write.found
    assert (rows.name, rows.domain_names, rows.class_names) == ("hub", folders.domain_names, folders.class_names)
    assert rows.labels.tolist() == folders.labels[write.order].tolist()
    assert rows.domains.tolist() == folders.domains[write.order].tolist()
    assert [rows.read(row) for row in range(12)] == [folders.read(row) for row in write.order]
    assert rows.files[:2] == ("photo/dog/00000000", "art/dog/00000001")
    assert len({*rows.files}) == 12
    assert {rows.path(row).name for row in range(8)} == {"train-00000-of-00002.parquet"}


@pytest.mark.parametrize("where", ["data", "data/train-00000-of-00002.parquet"])
def test_a_folder_of_files_and_a_single_file_are_data_sets(write, where):
    assert len(find_dataset(write(split=12) / where)) == 12


def test_bytes_and_words_do_as_well_as_structures_and_numbers(write):
    folders, order = write.found, write.order
    labels = [folders.class_names[folders.labels[row]] for row in order]
    rows = find_dataset(write(image=[folders.read(row) for row in order], label=labels))
    assert rows.class_names == folders.class_names
    assert rows.read(3) == folders.read(order[3])


def test_numbers_without_names_are_names(write):
    numbers = {"domain": [0, 1] * 6, "label": [0, 0, 1, 1] * 3}
    rows = find_dataset(write(**numbers, names={}))
    assert (rows.domain_names, rows.class_names) == (("0", "1"), ("0", "1"))


def test_each_row_group_is_read_once_by_many_threads(write, parquet, monkeypatch):
    rows, read, whole = find_dataset(write(split=6, rows_per_group=6)), [], parquet.ParquetFile.read_row_group

    def counted(file, group, **how):
        read.append(group)
        return whole(file, group, **how)

    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", counted)
    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(rows.read, range(12))] == [write.found.read(row) for row in write.order]
    assert read == [0, 0]  # of both files


def test_a_file_that_is_written_anew_is_read_anew(write, image_root):
    rows = find_dataset(write(split=12))
    first = rows.read(0)
    write_image(image_root / write.found.files[write.order[0]], seed=5)
    find_dataset(write("other", split=12)).path(0).replace(rows.path(0))
    assert rows.read(0) == write.found.read(write.order[0]) != first


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"domain": None}, "no column 'domain' among image, label"),
        ({"image": ["x"] * 12}, "'image' of .* is string"),
        ({"label": [-1] * 12}, "label of row 0 of .* is -1"),
        ({"domain": ["a/b"] * 12}, "domain of row 0 of .* is 'a/b'"),
        ({"domain": [".."] * 12}, "is '..'"),
        ({"domain": [None] * 12}, "is None"),
        ({"domain": ["art"] * 12}, "only the domain 'art'"),
        ({"label": [*range(12)], "names": {}}, "lacks the class"),
    ],
)
def test_what_is_no_data_set_is_refused(write, columns, message):
    with pytest.raises(InputError, match=message):
        find_dataset(write(**columns))


def test_a_damaged_file_is_named(write):
    (damaged, _) = sorted(write().glob("data/*"))
    damaged.write_bytes(damaged.read_bytes()[:-20])
    with pytest.raises(InputError, match=f"'{damaged}' cannot be read"):
        find_dataset(damaged.parent)


def test_unreadable_images_are_listed_all_at_once(write, tmp_path):
    images = [{"bytes": write.found.read(row), "path": ""} for row in write.order]
    images[2]["bytes"], images[5]["bytes"] = b"no image", None
    with pytest.raises(InputError, match="2 of 12 images") as caught:
        check_images(find_dataset(write(image=images)), tmp_path, progress=False)
    assert "00000002" in str(caught.value)
    assert "00000005 (row 5 holds no bytes of an image)" in str(caught.value)


def test_a_changed_file_is_read_again_and_another_is_not(write, tmp_path, monkeypatch):
    rows = find_dataset(write())
    for path, _ in rows.groups:
        os.utime(path, (1e9, 1e9))
    first = check_images(rows, tmp_path)
    os.utime(rows.groups[-1][0], (1e9, 2e9))
    read = []
    monkeypatch.setattr(dataset.ParquetDataset, "read", lambda self, row: read.append(row) or write.found.read(0))
    check_images(rows, tmp_path)
    assert sorted(read) == [8, 9, 10, 11]
    assert first != check_images(rows, tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_features_are_those_of_the_folders(write, run, workers):
    folders = run(dataset=write.found)
    rows = run(dataset=find_dataset(write()), workers=workers)
    assert torch.equal(rows.features, folders.features[write.order])
    assert rows.header["counts"] == folders.header["counts"]


def test_it_travels_to_other_processes_and_into_figures(write):
    root = write()
    copy = pickle.loads(pickle.dumps(find_dataset(root)))
    assert copy.read(4) == write.found.read(write.order[4])
    assert sample_figure(root).axes


def test_without_pyarrow_a_sentence_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "some.parquet").write_bytes(b"PAR1")
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"pip install pyarrow\.$"):
        find_dataset(tmp_path)


def test_rows_and_images_of_the_same_name_are_told_apart(image_root):
    """A folder stays a folder of images, whatever else lies deeper in it."""
    Image.new("RGB", (4, 4)).save(image_root / "art" / "dog" / "x.png")
    (image_root / "art" / "dog" / "x.parquet").write_bytes(b"")
    assert "art/dog/x.png" in find_dataset(image_root).files

"""Results directories of every kind of command, copied from the committed ones or written small."""

import shutil

import pytest

from storage import Results
from tests.factories import FEATURES, MACHINE, ROOT, SMALL, stored_record

COMMITTED = {  # kind of results -> folder below results/reference/
    "run": ".",
    "study": "study",
    "study of blocks": "blocks",
    "forms": "forms/width_10",
    "confirm": "confirmation",
    "compare": "compare",
    "transfer": "transfer/digits",
}
KINDS = (*COMMITTED, "columns")


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """Kind of results -> a directory of them, to write a page into."""
    made = {}
    for kind, folder in COMMITTED.items():
        origin = ROOT / "results" / "reference" / folder
        inner = ("plots",) if kind in ("run", "compare") else None  # of a run alone, not what is below
        made[kind] = tmp_path_factory.mktemp("results") / kind.replace(" ", "_")
        made[kind].mkdir()
        for path in origin.iterdir():
            if path.is_dir() and (inner is None or path.name in inner):
                shutil.copytree(path, made[kind] / path.name)
            elif path.is_file():
                shutil.copy(path, made[kind])
    made["columns"] = tmp_path_factory.mktemp("results") / "columns"
    write_columns(made["columns"])
    return made


REPORT = """\
Importance of features: which columns of the ViT's layers carry over to a new domain?

blobs features: 54 × 60-d of all layers, unknown model, 3 domains, 3 classes (all.safetensors); 2 seeds.
Headline: all images of the held-out domain, mean over the holdouts, paired by seed. Each arm has the C that
is best for it on the sources' `out` part, per held-out domain, on the first 2 seeds, from
0.1, 1, 10, 100, 1000; Phase 1 has C = 1.

min 5 % − min random_layer 5 %: +18.52 [+16.67, +20.37] points, too few seeds (2; a verdict needs 10).
min 20 % − all: +0.00 [+0.00, +0.00] points, too few seeds (2; a verdict needs 10).

Confirmatory family
-------------------
                                  difference (points) corrected p  seeds                                verdict
contrast
min 5 % − min random_layer 5 %  +18.52 [+16.67, +20.37]         1      2  too few seeds (2; a verdict needs 10)
min 20 % − all                     +0.00 [+0.00, +0.00]         1      2  too few seeds (2; a verdict needs 10)
"""
CONTRASTS = """\
contrast,n,mean,low,high,p,p_holm,verdict
min 5 % − min random_layer 5 %,2,0.185185,0.166667,0.203704,0.5,1,too few seeds (2; a verdict needs 10)
min 20 % − all,2,0,0,0,1,1,too few seeds (2; a verdict needs 10)
"""
LAYERS = "criterion,density,layer,share\nsum,60,block 1 cls,0.466667\nmin,60,block 1 cls,0.65\n"


def write_columns(directory):
    """What a study of columns leaves; training one takes ten times as long as all tests of its page."""
    results = Results(directory)
    results.claim(SMALL, FEATURES, MACHINE)
    results.append([stored_record(algorithm="all[C=0.1]") | {"columns": 60, "C": 0.1}])
    for name, text in (("report.txt", REPORT), ("contrasts.csv", CONTRASTS), ("layers.csv", LAYERS)):
        results.write_text(name, text)
    shutil.copy(ROOT / "results" / "reference" / "blocks" / "density.png", directory)  # of the same kind


@pytest.fixture
def small(tmp_path):
    """A directory as a run leaves it that was interrupted before its report: settings and a record."""
    directory = tmp_path / "small"
    results = Results(directory)
    results.claim(SMALL, FEATURES, MACHINE)
    results.append([stored_record()])
    return directory

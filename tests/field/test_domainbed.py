"""Runs in DomainBed's layout, read independently of `field`; and what is refused, skipped and left alone."""

import hashlib
import itertools
import json
import logging
import math
import random
from collections import defaultdict

import pandas as pd
import pytest

from config import InputError
from field import as_text, comparison_table, curves_of, domainbed_tables, export_runs, import_runs, select
from storage import atomic_write

DOMAINS = ("art_painting", "cartoon", "photo", "sketch")
HOLDOUTS = [(d,) for d in DOMAINS] + list(itertools.combinations(DOMAINS, 2))
FACTS = {"holdout_fraction": 0.2, "features": "abc"}
HPARAMS = {(a, t): {"lr": 10**-t, "name": a} for a in ("ERM", "IRM") for t in range(2)}
NAN = float("nan")


def make_curves(seed=0, failed=(), algorithms=("ERM", "IRM"), trials=2, holdouts=HOLDOUTS, seeds=(0, 4)):
    """Three epochs, of more updates the more domains are trained on; the runs in `failed` are NaN."""
    draw, rows = random.Random(seed), []
    for run in itertools.product(algorithms, range(trials), holdouts, seeds):
        about = dict(zip(("algorithm", "trial", "holdouts", "seed"), run, strict=True))
        for epoch, domain in itertools.product((1, 2, 3), DOMAINS):
            shares = {part: NAN if run in failed else draw.random() for part in ("in", "out", "full")}
            rows.append({**about, "epoch": epoch, "step": updates(run[2]) * epoch, "domain": domain, **shares})
    return curves_of(rows)


def updates(holdouts):
    """In an epoch: a different number for each choice of holdouts."""
    return 100 - 11 * len(holdouts) - sum(4 ** DOMAINS.index(name) for name in holdouts) % 10


def export(curves, directory, **changes):
    given = {"hyperparameters": HPARAMS, "dataset": "pacs", "domain_names": DOMAINS, "facts": FACTS, **changes}
    return export_runs(curves, directory=directory, **given)


def read_lines(directory):
    """Folder name -> its lines, as plain JSON; the last character of a line is cut off unseen, as DomainBed does."""
    found = {}
    for folder in directory.iterdir():
        with (folder / "results.jsonl").open() as file:
            found[folder.name] = [json.loads(line[:-1]) for line in file]
    return found


def state(directory):
    """Every file below, with content and time."""
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in directory.rglob("*") if p.is_file()}


# --- export -------------------------------------------------------------------------------------------------


def test_files_say_what_the_curves_say(tmp_path):
    curves = make_curves()
    assert export(curves.sample(frac=1, random_state=0), tmp_path) == 2 * 2 * 10 * 2
    seen = set()
    for name, lines in read_lines(tmp_path).items():
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == ["done", "results.jsonl"]
        assert (tmp_path / name / "done").read_text() == "done"
        assert [(line["epoch"], line["step"]) for line in lines] == [(1, 0), (2, 1), (3, 2)]  # its tools join by step
        args = lines[0]["args"]
        swept = {key: value for key, value in args.items() if key != "output_dir"}
        assert name == hashlib.md5(json.dumps(swept, sort_keys=True).encode()).hexdigest() == args["output_dir"]
        assert args["dataset"] == "PACS"
        assert (args["steps"], args["checkpoint_freq"]) == (3, 1)
        assert FACTS.items() <= args.items()
        run = (
            args["algorithm"],
            args["hparams_seed"],
            tuple(DOMAINS[i] for i in args["test_envs"]),
            args["trial_seed"],
        )
        seen.add(run)
        assert [line["updates"] for line in lines] == [updates(run[2]) * epoch for epoch in (1, 2, 3)]
        for line in lines:
            assert line["args"] == args
            assert line["hparams"] == HPARAMS[run[:2]] == json.loads(args["hparams"])
            accuracies = {key: value for key, value in line.items() if key.startswith("env")}
            of_run = (curves[["algorithm", "trial", "holdouts", "seed"]].apply(tuple, axis=1) == run) & (
                curves["epoch"] == line["epoch"]
            )
            rows = curves[of_run].set_index("domain")
            assert accuracies == {
                f"env{i}_{part}_acc": rows.loc[d, part] for i, d in enumerate(DOMAINS) for part in ("in", "out")
            }
    assert seen == set(itertools.product(("ERM", "IRM"), range(2), HOLDOUTS, (0, 4)))


def best_of(lines, target, rule):
    """`in` accuracy on an environment that a rule chooses among lines of one algorithm and seed: files alone."""
    found = defaultdict(dict)  # (trial, step) -> left out -> line
    for line in lines:
        found[line["args"]["hparams_seed"], line["step"]][frozenset(line["args"]["test_envs"])] = line
    options = []
    for (_, step), runs in found.items():
        alone = runs.get(frozenset([target]))
        others = [i for i in range(4) if i != target]
        pairs = [runs.get(frozenset([target, i])) for i in others]
        if alone is None or (rule == "leave-one-domain-out" and None in pairs) or (rule == "oracle" and step != 2):
            continue
        value = {
            "training-domain": lambda a=alone, o=others: sum(a[f"env{i}_out_acc"] for i in o),
            "leave-one-domain-out": lambda p=pairs, o=others: sum(
                r[f"env{i}_in_acc"] for i, r in zip(o, p, strict=True)
            ),
            "oracle": lambda a=alone: a[f"env{target}_out_acc"],
        }[rule]()
        options.append((value, alone[f"env{target}_in_acc"]))
    return max(options)[1] if options else None


@pytest.mark.parametrize("rule", ["training-domain", "leave-one-domain-out", "oracle"])
def test_the_files_select_what_the_curves_select(tmp_path, rule):
    # A trial that lacks a pair, and one that lacks the run itself, leave the other trial to choose from.
    failed = {("ERM", 0, ("cartoon", "photo"), 0), ("ERM", 1, ("sketch",), 4)}
    curves = make_curves(1, failed)
    export(curves, tmp_path)
    lines = [line for of_run in read_lines(tmp_path).values() for line in of_run]
    for given in (curves, import_runs(tmp_path)[0]):
        chosen = select(given, rule)
        assert len(chosen) == 2 * 4 * 2
        for row in chosen.to_dict("records"):
            mine = [
                line
                for line in lines
                if (line["args"]["algorithm"], line["args"]["trial_seed"]) == (row["algorithm"], row["seed"])
            ]
            assert row["in"] == best_of(mine, DOMAINS.index(row["holdout"]), rule)


def test_hyperparameters_may_differ_by_seed(tmp_path):
    values = {("ERM", 0): {"lr": 1}, ("ERM", 0, 4): {"lr": 2}}
    export(make_curves(algorithms=["ERM"], trials=1), tmp_path, hyperparameters=values)
    assert import_runs(tmp_path)[1] == {("ERM", 0, 0): {"lr": 1}, ("ERM", 0, 4): {"lr": 2}}
    with pytest.raises(InputError, match="IRM, trial 1"):
        export(make_curves(algorithms=["IRM"]), tmp_path, hyperparameters={("IRM", 0): {}})


def test_what_is_there_is_left_alone(tmp_path):
    curves = make_curves(algorithms=["ERM"], holdouts=HOLDOUTS[:4])
    (tmp_path / "results").mkdir()
    for name in ("notes.txt", "results/results.jsonl", "records.jsonl"):
        (tmp_path / name).write_text("not a run\n")
    others = state(tmp_path)
    assert export(curves, tmp_path) == 16
    assert others.items() <= state(tmp_path).items()
    before = state(tmp_path)
    assert export(curves, tmp_path) == 0
    assert state(tmp_path) == before
    # an interrupted run is written again, and more runs join
    done = sorted(tmp_path.glob("*/done"))[0]
    done.unlink()
    (done.parent / "results.jsonl").write_text('{"args"')
    assert export(curves, tmp_path) == 1
    assert {p: content for p, (content, _) in state(tmp_path).items()} == {p: c for p, (c, _) in before.items()}
    assert export(make_curves(holdouts=HOLDOUTS[:4]), tmp_path) == 16


def test_done_comes_last(tmp_path, monkeypatch):
    written = []

    def interrupting(path):
        if path.name == "done":
            assert (path.parent / "results.jsonl").read_text().count("\n") == 3
        written.append(path.name)
        if len(written) == 4:
            raise KeyboardInterrupt
        return atomic_write(path)

    monkeypatch.setattr("field.domainbed.atomic_write", interrupting)
    curves = make_curves(algorithms=["ERM"], trials=1, holdouts=[("photo",)])
    with pytest.raises(KeyboardInterrupt):
        export(curves, tmp_path)
    assert written == ["results.jsonl", "done"] * 2
    monkeypatch.undo()
    assert len(import_runs(tmp_path)[0]) == 3 * 4  # of the first run alone
    assert export(curves, tmp_path) == 1


def test_failed_networks_are_not_exported(tmp_path, caplog):
    failed = {("ERM", 0, ("photo",), 0), ("IRM", 1, ("art_painting", "sketch"), 4)}
    assert export(make_curves(failed=failed), tmp_path) == 78
    assert [r.getMessage() for r in caplog.records] == ["2 failed networks are not exported."]
    curves, _ = import_runs(tmp_path)
    there = set(curves[["algorithm", "trial", "holdouts", "seed"]].itertuples(index=False, name=None))
    assert not failed & there
    assert len(there) == 78


@pytest.mark.parametrize(
    "change", [{"facts": {**FACTS, "features": "xyz"}}, {"hyperparameters": {("ERM", 0): {"lr": 9}}}]
)
def test_runs_that_would_be_mixed_are_refused(tmp_path, change):
    curves = make_curves(algorithms=["ERM"], trials=1)
    export(curves, tmp_path)
    before = state(tmp_path)
    more = make_curves(algorithms=["ERM"], trials=1, seeds=(4, 5))
    with pytest.raises(InputError, match="another run of the same algorithm"):
        export(more, tmp_path, **change)
    assert state(tmp_path) == before
    assert export(make_curves(algorithms=["ERM"], trials=1, seeds=(5,)), tmp_path, **change) == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "mine"}, "'mine'.* PACS, VLCS"),
        ({"domain_names": ("photo", "art_painting", "cartoon", "sketch")}, "art_painting, cartoon, photo, sketch, not"),
        ({"domain_names": DOMAINS[:3]}, "not art_painting, cartoon, photo"),
        ({"dataset": "VLCS", "domain_names": ("Caltech101", "LabelMe", "SUN09", "VOC2007")}, "art_painting, cartoon"),
    ],
)
def test_what_domainbed_does_not_have_is_refused(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        export(make_curves(algorithms=["ERM"]), tmp_path / "runs", **change)
    assert not (tmp_path / "runs").exists()


def test_a_file_in_the_way_is_told(tmp_path):
    curves = make_curves(algorithms=["ERM"], trials=1, holdouts=[("photo",)], seeds=[0])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="not a directory"):
        export(curves, tmp_path / "file")
    export(curves, tmp_path / "runs")
    (folder,) = (tmp_path / "runs").iterdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / folder.name).write_text("mine")
    with pytest.raises(InputError, match=f"{folder.name}' cannot be written to"):
        export(curves, tmp_path / "other")
    assert (tmp_path / "other" / folder.name).read_text() == "mine"


# --- import -------------------------------------------------------------------------------------------------


def foreign(folder, accuracies, done=True, dataset="VLCS", **changes):
    """A run as DomainBed's training script leaves it: accuracies[checkpoint][environment] = (in, out)."""
    args = {"algorithm": "ERM", "dataset": dataset, "hparams_seed": 0, "trial_seed": 1, "test_envs": [2], "seed": 729}
    args |= {"data_dir": "/data", "holdout_fraction": 0.2, "hparams": None, **changes}
    folder.mkdir(parents=True)
    with (folder / "results.jsonl").open("w") as file:
        for k, of_env in enumerate(accuracies):
            line = {
                "args": args,
                "epoch": 8.48 * k,
                "step": 300 * k,
                "loss": 0.3,
                "mem_gb": 1.2,
                "hparams": {"lr": 5e-5},
            }
            for i, (in_part, out_part) in enumerate(of_env):
                line |= {f"env{i}_in_acc": in_part, f"env{i}_out_acc": out_part}
            file.write(json.dumps(line, sort_keys=True) + "\n")
    if done:
        (folder / "done").write_text("done")
    return folder / "results.jsonl"


TWO = [[(0.7, 0.6), (0.5, 0.4), (0.3, 0.2), (1, 0)], [(0.8, 0.7), (0.6, 0.5), (0.4, 0.3), (0.2, 0.1)]]


def test_its_own_runs_are_read(tmp_path, caplog):
    path = foreign(tmp_path / "a", TWO)
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))  # steps have an order, lines none
    foreign(tmp_path / "b", TWO[:1], test_envs=[3, 0], algorithm="IRM", hparams_seed=5)
    for name in "cd":
        foreign(tmp_path / name, TWO, done=False, test_envs=[0])
    with caplog.at_level(logging.WARNING):
        curves, hyperparameters = import_runs(tmp_path)
    assert len(caplog.records) == 1
    assert "2 runs" in caplog.text
    assert hyperparameters == {("ERM", 0, 1): {"lr": 5e-5}, ("IRM", 5, 1): {"lr": 5e-5}}
    assert curves["full"].isna().all()
    rows = curves.drop(columns="full").to_numpy().tolist()
    names = ("Caltech101", "LabelMe", "SUN09", "VOC2007")
    runs = [("ERM", 0, ("SUN09",), TWO), ("IRM", 5, ("Caltech101", "VOC2007"), TWO[:1])]
    assert rows == [
        [algorithm, trial, holdouts, 1, k + 1, 300 * k + 1, name, *shares]
        for algorithm, trial, holdouts, checkpoints in runs
        for k, of_env in enumerate(checkpoints)
        for name, shares in zip(names, of_env, strict=True)
    ]


def test_what_was_exported_comes_back(tmp_path):
    curves = make_curves()
    export(curves, tmp_path)
    back, hyperparameters = import_runs(tmp_path)
    key = ["algorithm", "trial", "holdouts", "seed", "epoch", "domain"]
    expected = curves.assign(full=NAN).set_index(key).sort_index()
    pd.testing.assert_frame_equal(back.set_index(key).sort_index(), expected, check_exact=True)
    assert hyperparameters == {(a, t, s): HPARAMS[a, t] for (a, t), s in itertools.product(HPARAMS, (0, 4))}


def test_environments_of_unknown_data_sets_are_numbered_and_data_sets_kept_apart(tmp_path):
    foreign(tmp_path / "a", TWO)
    foreign(tmp_path / "b", [[(0.1, 0.2)] * 12], dataset="Other", test_envs=[10])
    with pytest.raises(InputError, match="Other, VLCS: say which"):
        import_runs(tmp_path)
    assert import_runs(tmp_path, "VLCS")[0]["holdouts"].unique().tolist() == [("SUN09",)]
    curves, _ = import_runs(tmp_path, "Other")
    assert curves["domain"].tolist() == [f"env{i}" for i in range(12)]
    assert curves["holdouts"].unique().tolist() == [("env10",)]
    with pytest.raises(InputError, match="no finished runs of PACS"):
        import_runs(tmp_path, "PACS")


def change(function):
    """A damage to the last line of a file."""

    def damage(text):
        *before, last = text.splitlines()
        line = json.loads(last)
        function(line)
        return "\n".join([*before, json.dumps(line)]) + "\n"

    return damage


DAMAGE = {
    "last line is torn": lambda text: text[:-40],
    "empty or": lambda text: "",
    "line 2, is not JSON": lambda text: text[:-40] + "\n",
    "line 2: it has no 'args'": change(lambda line: line.pop("args")),
    "'hparams'": change(lambda line: line.pop("hparams")),
    "line 2: it has no 'step'": change(lambda line: line.pop("step")),
    "no 'env3_out_acc'": change(lambda line: line.pop("env3_out_acc")),
    "no 'env0_in_acc', or none in": change(lambda line: line.update(env0_in_acc=math.nan)),
    "no 'env1_in_acc', or none in": change(lambda line: line.update(env1_in_acc=70.2)),
    "no 'trial_seed'": change(lambda line: line["args"].pop("trial_seed")),
    r"test_envs are \[4\]": change(lambda line: line["args"].update(test_envs=[4])),
    r"test_envs are \[0, 1, 2\]": change(lambda line: line["args"].update(test_envs=[0, 1, 2])),
    "several runs": change(lambda line: line["args"].update(trial_seed=2)),
    "step twice": lambda text: text * 2,
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_file_is_named(tmp_path, message):
    path = foreign(tmp_path / "run", TWO)
    import_runs(tmp_path)
    path.write_text(DAMAGE[message](path.read_text()))
    with pytest.raises(InputError, match=message) as caught:
        import_runs(tmp_path)
    assert str(path) in str(caught.value)


def test_directories_without_runs_and_with_duplicated_runs_are_refused(tmp_path):
    with pytest.raises(InputError, match="no directory"):
        import_runs(tmp_path / "none")
    with pytest.raises(InputError, match="no finished runs of DomainBed"):
        import_runs(tmp_path)
    foreign(tmp_path / "a", TWO, test_envs=[0, 1])
    foreign(tmp_path / "b", TWO, test_envs=[1, 0])
    with pytest.raises(InputError, match="are the same run"):
        import_runs(tmp_path)


# --- tables -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "baselines"),
    [
        (("ERM", "VREx", "MyMethod"), {"ERM": "ERM", "VREx": "ERM", "MyMethod": "ERM"}),  # of DomainBed itself
        (
            ("ERM", "ERMBalanced", "VREx", "SD", "MyMethod"),  # of this project: each on its own kind of batches
            {"ERM": "ERM", "ERMBalanced": "ERMBalanced", "VREx": "ERMBalanced", "SD": "ERM", "MyMethod": "ERM"},
        ),
        (("VREx", "IRM"), {}),  # no baseline among them
    ],
)
def test_tables_of_its_runs_stand_beside_the_right_erm(names, baselines, tmp_path):
    for number, (name, seed) in enumerate(itertools.product(names, (0, 1))):
        scale = 1 - number / 40
        accuracies = [[(scale * a, scale * b) for a, b in of_env] for of_env in TWO]
        for env in range(4):
            changes = {"algorithm": name, "trial_seed": seed, "test_envs": [env]}
            foreign(tmp_path / f"{name}{seed}{env}", accuracies, **changes)
    text, (curves, _) = domainbed_tables(tmp_path), import_runs(tmp_path)
    for rule in ("training-domain", "last", "oracle"):
        assert f"Selection: {rule}\n{as_text(comparison_table(select(curves, rule), baselines, 'in'))}\n" in text
    assert "leave-one-domain-out" not in text

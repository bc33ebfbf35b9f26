"""Runs in DomainBed's layout, read independently of `field`; and what is refused, skipped and left alone."""

import hashlib
import itertools
import json
import math
import random

import pandas as pd
import pytest

from config import InputError, Settings
from field import (
    RULES,
    as_text,
    comparison_table,
    curves_of,
    domainbed_tables,
    export_domainbed,
    export_runs,
    import_runs,
    select,
)
from storage import atomic_write
from study import ERM, IMPORTANCE, Arm, Study
from tests.factories import SMALL, dated, everything, make_run, save_blobs, token_blobs

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


def test_files_say_what_the_curves_say(tmp_path):
    curves, seen = make_curves(), set()
    key = ["algorithm", "trial", "holdouts", "seed", "epoch", "domain"]
    accuracy = curves.set_index(key)[["in", "out"]].to_dict("index")
    assert export(curves.sample(frac=1, random_state=0), tmp_path) == 2 * 2 * 10 * 2
    for folder in tmp_path.iterdir():
        assert sorted(path.name for path in folder.iterdir()) == ["done", "results.jsonl"]
        assert (folder / "done").read_text() == "done"
        with (folder / "results.jsonl").open() as file:
            lines = [json.loads(line[:-1]) for line in file]  # the last character is cut off unseen, as DomainBed does
        assert [(line["epoch"], line["step"]) for line in lines] == [(1, 0), (2, 1), (3, 2)]  # its tools join by step
        args = lines[0]["args"]
        swept = {key: value for key, value in args.items() if key != "output_dir"}
        assert folder.name == hashlib.md5(json.dumps(swept, sort_keys=True).encode()).hexdigest() == args["output_dir"]
        assert args["dataset"] == "PACS"
        assert (args["steps"], args["checkpoint_freq"]) == (3, 1)
        assert FACTS.items() <= args.items()
        holdouts = tuple(DOMAINS[i] for i in args["test_envs"])
        run = (args["algorithm"], args["hparams_seed"], holdouts, args["trial_seed"])
        seen.add(run)
        assert [line["updates"] for line in lines] == [updates(run[2]) * epoch for epoch in (1, 2, 3)]
        for line in lines:
            assert line["args"] == args
            assert line["hparams"] == HPARAMS[run[:2]] == json.loads(args["hparams"])
            assert {name: value for name, value in line.items() if name.startswith("env")} == {
                f"env{i}_{part}_acc": accuracy[*run, line["epoch"], domain][part]
                for i, domain in enumerate(DOMAINS)
                for part in ("in", "out")
            }
    assert seen == set(itertools.product(("ERM", "IRM"), range(2), HOLDOUTS, (0, 4)))


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
    others = dated(tmp_path)
    assert export(curves, tmp_path) == 16
    assert others.items() <= dated(tmp_path).items()
    before, content = dated(tmp_path), everything(tmp_path)
    assert export(curves, tmp_path) == 0
    assert dated(tmp_path) == before
    # an interrupted run is written again, and more runs join
    done = sorted(tmp_path.glob("*/done"))[0]
    done.unlink()
    (done.parent / "results.jsonl").write_text('{"args"')
    assert export(curves, tmp_path) == 1
    assert everything(tmp_path) == content
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
    # A trial that lacks a pair, and one that lacks the run itself, leave the other trial to choose from.
    failed = {("ERM", 0, ("cartoon", "photo"), 0), ("ERM", 1, ("sketch",), 4)}
    curves = make_curves(1, failed)
    assert export(curves, tmp_path) == 78
    assert [r.getMessage() for r in caplog.records] == ["2 failed networks are not exported."]
    back, _ = import_runs(tmp_path)
    there = set(back[["algorithm", "trial", "holdouts", "seed"]].itertuples(index=False, name=None))
    assert not failed & there
    assert len(there) == 78
    key = ["algorithm", "holdout", "seed"]
    for rule in RULES:  # the same networks are chosen
        mine, theirs = (select(c, rule).drop(columns="full").set_index(key).sort_index() for c in (curves, back))
        assert len(mine) == 2 * 4 * 2
        pd.testing.assert_frame_equal(mine, theirs, check_exact=True)


@pytest.mark.parametrize(
    "change", [{"facts": {**FACTS, "features": "xyz"}}, {"hyperparameters": {("ERM", 0): {"lr": 9}}}]
)
def test_runs_that_would_be_mixed_are_refused(tmp_path, change):
    curves = make_curves(algorithms=["ERM"], trials=1)
    export(curves, tmp_path)
    before = dated(tmp_path)
    more = make_curves(algorithms=["ERM"], trials=1, seeds=(4, 5))
    with pytest.raises(InputError, match="another run of the same algorithm"):
        export(more, tmp_path, **change)
    assert dated(tmp_path) == before
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
    with pytest.raises(InputError, match=folder.name):
        export(curves, tmp_path / "other")
    assert (tmp_path / "other" / folder.name).read_text() == "mine"


def foreign(folder, accuracies, done=True, dataset="VLCS", **changes):
    """A run as DomainBed's training script leaves it: accuracies[checkpoint][environment] = (in, out)."""
    args = {"algorithm": "ERM", "dataset": dataset, "hparams_seed": 0, "trial_seed": 1, "test_envs": [2], "seed": 729}
    args |= {"data_dir": "/data", "holdout_fraction": 0.2, "hparams": None, **changes}
    folder.mkdir(parents=True)
    with (folder / "results.jsonl").open("w") as file:
        for k, of_env in enumerate(accuracies):
            line = {"args": args, "epoch": 8.48 * k, "step": 300 * k, "loss": 0.3, "hparams": {"lr": 5e-5}}
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
    curves, hyperparameters = import_runs(tmp_path)
    assert ["2 runs" in record.getMessage() for record in caplog.records] == [True]
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
    "no 'env4_in_acc', or none": change(
        lambda line: line.update(env1000000000_in_acc=0.5) or line["args"].update(dataset="Other")
    ),
    "'algorithm', or one of": change(lambda line: line["args"].update(algorithm="\ud800")),
    "'hparams_seed', or one of": change(lambda line: line["args"].update(hparams_seed=10**30)),
    "'updates'": change(lambda line: line.update(updates="5")),
    "line 2, is not": lambda text: text.splitlines()[0] + "\n" + "[" * 100_000 + "\n",
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
    for folder, message in (("none", "no directory"), ("", "no finished runs of DomainBed")):
        with pytest.raises(InputError, match=message):
            import_runs(tmp_path / folder)
    foreign(tmp_path / "a", TWO, test_envs=[0, 1])
    foreign(tmp_path / "b", TWO, test_envs=[1, 0])
    with pytest.raises(InputError, match="are the same run"):
        import_runs(tmp_path)


@pytest.mark.parametrize(
    "baselines",
    [
        {"ERM": "ERM", "VREx": "ERM", "MyMethod": "ERM"},  # of DomainBed itself
        # of this project: each on its own kind of batches
        {"ERM": "ERM", "ERMBalanced": "ERMBalanced", "VREx": "ERMBalanced", "SD": "ERM", "MyMethod": "ERM"},
        {"VREx": None, "IRM": None},  # no baseline among them
    ],
)
def test_tables_of_its_runs_stand_beside_the_right_erm(baselines, tmp_path):
    for number, (name, seed) in enumerate(itertools.product(baselines, (0, 1))):
        scale = 1 - number / 40
        accuracies = [[(scale * a, scale * b) for a, b in of_env] for of_env in TWO]
        for env in range(4):
            changes = {"algorithm": name, "trial_seed": seed, "test_envs": [env]}
            foreign(tmp_path / f"{name}{seed}{env}", accuracies, **changes)
    text, (curves, _) = domainbed_tables(tmp_path), import_runs(tmp_path)
    for rule in ("training-domain", "last", "oracle"):
        assert f"Selection: {rule}\n{as_text(comparison_table(select(curves, rule), baselines, 'in'))}\n" in text
    assert "leave-one-domain-out" not in text


ARMS = (ERM, IMPORTANCE, Arm("importance", "phase1", {"IMPORTANCE_THRESHOLD_PERCENTILE": 30}))
OF_BLOCKS = Settings.current(trained_blocks=1, batch_size=16, ph1_num_epochs=2, ph2_num_epochs=2)


def of_pacs(features):
    """The same features under the name of a data set that DomainBed has."""
    features.header["dataset"] = "pacs"
    return features


@pytest.fixture(scope="module", params=["features", "blocks"])
def trained(request, tmp_path_factory):
    """A study of all PACS domains, on features or on the last block: three arms, two seeds."""
    if request.param == "blocks":
        data, settings = of_pacs(token_blobs(DOMAINS)), OF_BLOCKS
    else:
        data = save_blobs(tmp_path_factory.mktemp("data") / "f.safetensors", dataset="pacs", domains=DOMAINS)
        settings = SMALL
    study = Study(make_run(data, tmp_path_factory.mktemp("study"), 2, settings), ARMS, keep_weights=False)
    study.train()
    return study


def export_study(study, directory, **options):
    return export_domainbed(study.run.results.directory, directory, lambda blocks=0: study.run.features, **options)


def test_a_run_on_features_or_blocks_is_exported_as_its_records_say(trained, tmp_path):
    run, names = trained.run, ["ERM", *(arm.name for arm in ARMS[1:])]
    assert export_study(trained, tmp_path) == 3 * 4 * 2
    curves, hyperparameters = import_runs(tmp_path)
    assert sorted(curves["algorithm"].unique()) == sorted(names)
    for (name, _, _), values in hyperparameters.items():
        arm = ARMS[names.index(name)]
        assert values == arm.settings(run.settings).as_dict()
    key = ["algorithm", "holdouts", "seed", "epoch", "domain"]
    accuracy = curves.set_index(key)[["in", "out"]].to_dict("index")
    for record in trained.records():
        name = names[trained.arm_names.index(record["algorithm"])]
        shares = {d: accuracy[name, (record["holdout"],), record["seed"], record["epoch"], d] for d in DOMAINS}
        assert shares[record["holdout"]] == pytest.approx({part: record["accuracy"][part] for part in ("in", "out")})
        validation = [shares[source]["out"] for source in record["sources"]]
        assert sum(validation) / len(validation) == pytest.approx(record["validation"])
    steps = {run.data.rows(run.data.sources([h]), "in", [0]).shape[1] / run.settings.batch_size for h in run.holdouts}
    (images,) = steps  # of all domains the same
    assert sorted(curves["step"].unique()) == [math.ceil(images) * (e + 1) for e in range(run.settings.ph2_num_epochs)]
    assert "importance" in domainbed_tables(tmp_path)


def test_arms_of_a_run_can_be_chosen(trained, tmp_path):
    assert export_study(trained, tmp_path / "some", methods=["importance"]) == 4 * 2
    with pytest.raises(InputError, match="ERM; it has erm, importance"):
        export_study(trained, tmp_path / "none", methods=["ERM"])
    assert not (tmp_path / "none").exists()


def test_records_alone_are_not_enough_to_export(tmp_path):
    study = Study(
        make_run(of_pacs(token_blobs(DOMAINS)), tmp_path / "grid", 2, OF_BLOCKS, ["photo"]), records_only=True
    )
    study.train()
    with pytest.raises(InputError, match="'erm' on photo the records alone"):
        export_study(study, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()

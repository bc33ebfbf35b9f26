"""What a study and a comparison share: seeds, holdouts, the results directory, and what `config` says."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import config
from config import InputError, Settings
from storage import Results
from study import Execution, Run, check_holdouts, check_seeds
from tests.conftest import make_images
from tests.factories import FEATURES, QUIET, SMALL, everything, make_run, save_blobs, stored_record, token_blobs


@pytest.mark.parametrize("seeds", [[], [-1, 2], [0.5], ["0"], "01", 3, None], ids=str)
def test_seeds_are_whole_numbers_from_0(data, tmp_path, seeds):
    with pytest.raises(InputError, match="Seeds"):
        Run(data, SMALL, tmp_path, seeds, execution=QUIET)


def test_seeds_are_sorted_and_holdouts_domains_each_once(data, tmp_path):
    run = make_run(data, tmp_path, np.array([3, 1, 3]), holdouts=["sketch", "art", "sketch"])
    assert (run.seeds, run.holdouts) == ((1, 3), ("sketch", "art"))
    with pytest.raises(InputError, match=r"'foto'.* art, photo, sketch"):
        make_run(data, tmp_path, holdouts=["photo", "foto"])
    assert check_holdouts(None, ["a", "b"]) == ("a", "b")


@pytest.mark.parametrize(
    ("holdouts", "domains"),
    [(None, ("art", "photo", "sketch")), ("photo", ("art", "sketch")), (("photo", "art"), ("art", "photo", "sketch"))],
)
def test_phase_1_is_needed_for_the_sources(data, tmp_path, holdouts, domains):
    run = make_run(data, tmp_path, holdouts=holdouts)
    assert run.domains == domains
    assert run.holdouts == {None: data.domain_names, "photo": ("photo",)}.get(holdouts, holdouts)


def test_chunks_depend_on_the_numbers_of_the_seeds_alone(data, tmp_path):
    run = make_run(data, tmp_path, 9, execution=replace(QUIET, seeds_per_chunk=4))
    assert run.chunks(run.seeds) == [(0, 1, 2, 3), (4, 5, 6, 7), (8,)]
    assert run.chunks([9, 5, 6, 0]) == [(0,), (5, 6), (9,)]
    assert run.chunks([]) == []
    with pytest.raises(InputError, match="SEEDS_PER_CHUNK"):
        Execution(seeds_per_chunk=0)


def test_what_a_run_says_of_itself_without_paths(data, tmp_path):
    one, two = make_run(data, tmp_path, 1), make_run(data, tmp_path, 2)
    assert (one.strict, two.strict) == (True, False)  # nothing is left if the only seed fails
    assert make_run(data, tmp_path, 2, execution=replace(QUIET, strict=True)).strict
    assert (one.title, two.title) == ("unknown model, 8-d, 1 seed", "unknown model, 8-d, 2 seeds")
    facts = one.facts
    assert (facts["dataset"], facts["fingerprint"], facts["feature_size"]) == ("blobs", data.fingerprint, 8)
    assert facts["counts"]["photo"] == {"cat": 30, "dog": 30, "owl": 30}
    assert "/" not in json.dumps(facts)


def test_an_unfit_directory_is_refused_before_anything_is_trained(data, tmp_path):
    make_run(data, tmp_path)
    with pytest.raises(InputError, match="BATCH_SIZE"):
        make_run(data, tmp_path, settings=replace(SMALL, batch_size=7))
    with pytest.raises(InputError, match=data.fingerprint):
        make_run(save_blobs(tmp_path / "other.safetensors", seed=1), tmp_path)
    with Results(tmp_path), pytest.raises(InputError, match=str(tmp_path)):
        make_run(data, tmp_path)


def test_the_machine_is_noted_when_something_is_trained(data, tmp_path):
    run = make_run(data, tmp_path)
    assert run.results.read_settings()["environments"] == []
    with run.writing(units=["anything"]):
        pass
    assert run.results.read_settings()["environments"] == [run.environment]
    assert (run.environment["device"], run.environment["threads"]) == ("cpu", 1)


def test_a_run_beside_another(data, tmp_path):
    run = make_run(data, tmp_path / "a", holdouts=["photo"])
    other = run.beside(tmp_path / "b", replace(SMALL, batch_size=7), [5])
    assert (other.features, other.holdouts, other.execution) == (data, ("photo",), QUIET)
    assert (other.seeds, other.settings.batch_size, other.results.directory) == ((5,), 7, tmp_path / "b")
    same = run.beside(tmp_path / "c")
    assert (same.seeds, same.settings) == (run.seeds, run.settings)


def test_records_are_of_these_seeds_and_holdouts(tmp_path):
    features = save_blobs(tmp_path / "f.safetensors", domains=("art+craft", "photo", "sketch", "comic"))
    run = make_run(features, tmp_path / "r", 2, holdouts=["photo", "art+craft"])
    wanted = {"art+craft", "sketch+photo", "photo+art+craft"}  # a domain, also with a plus in its name, or a pair
    places = {*wanted, "sketch", "sketch+comic"}
    run.results.append(stored_record(seed=seed, holdout=holdout) for seed in range(4) for holdout in places)
    found = {(r["seed"], r["holdout"]) for r in run.records()}
    assert found == {(seed, holdout) for seed in (0, 1) for holdout in wanted}


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_shown_where_it_is_wanted(data, tmp_path, capsys, monkeypatch, progress):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    run = make_run(data, tmp_path, execution=replace(QUIET, progress=progress))

    def train(unit, tick):
        tick()
        return unit

    units = [("a", (0,)), ("b", (0, 1))]
    assert list(run.side_by_side("Phase 1", units, train, epochs=1, floats_per_seed=100)) == units
    assert ("Phase 1" in capsys.readouterr().err) == progress


@pytest.fixture
def constants(monkeypatch, tmp_path):
    """Constants of `config`, as they were afterwards."""

    def set_to(**values):
        for name, value in values.items():
            monkeypatch.setattr(config, name, value)

    set_to(DEVICE="cpu", THREADS=1, RESULTS_DIR=str(tmp_path / "r"))
    threads = torch.get_num_threads()
    yield set_to
    torch.set_num_threads(threads)


def test_the_constants_describe_a_run(data, tmp_path, monkeypatch, constants):
    asked = []
    monkeypatch.setattr("study.run.get_features", lambda *given, **options: asked.append((given, options)) or data)
    constants(NUM_SEEDS=3, BATCH_SIZE=7, SEEDS_PER_CHUNK=2, FEATURES_FILE="mine.safetensors")
    run = Run.from_config()
    assert (run.seeds, run.settings, run.results.directory) == (
        (0, 1, 2), Settings.current(batch_size=7), tmp_path / "r",
    )  # fmt: skip
    assert run.execution == Execution("cpu", 1, 2)
    (given, options), *_ = asked
    assert given == (None, "mine.safetensors")
    assert options.items() >= {"device": "cpu", "verify": False}.items()
    run = Run.from_config([5, 6], "art", directory=tmp_path / "other", verify=True, strict=True)
    assert (run.seeds, run.holdouts, run.results.directory, run.strict) == ((5, 6), ("art",), tmp_path / "other", True)
    assert asked[1][1]["verify"]
    constants(THREADS=None)
    assert Run.from_config(directory=tmp_path / "third").execution.threads == 1


def test_overwrite_deletes_what_a_run_wrote(data, tmp_path, monkeypatch, constants):
    monkeypatch.setattr("study.run.get_features", lambda *_, **__: data)
    Run.from_config([0]).results.append([stored_record()])
    (tmp_path / "r" / "notes.md").write_text("mine")
    constants(BATCH_SIZE=7)
    with pytest.raises(InputError, match="BATCH_SIZE"):
        Run.from_config([0])
    run = Run.from_config([0], overwrite=True)
    assert run.results.records() == []
    assert everything(tmp_path / "r").keys() == {"settings.json", "notes.md"}


@pytest.mark.parametrize(
    "refused", [{"holdouts": "foto"}, {"check": lambda _: check_seeds([])}, {}], ids=["holdout", "check", "split"]
)
def test_a_run_that_cannot_be_made_deletes_nothing(data, tmp_path, monkeypatch, constants, refused):
    features = data if refused else save_blobs(tmp_path / "few.safetensors", per_cell=1)  # too few for a split
    monkeypatch.setattr("study.run.get_features", lambda *_, **__: features)
    with Results(tmp_path / "r") as results:
        results.claim(Settings.current(batch_size=7), FEATURES)
        results.append([stored_record()])
    before = everything(tmp_path / "r")
    with pytest.raises(InputError):
        Run.from_config([0, 1], overwrite=True, **refused)
    assert everything(tmp_path / "r") == before


def test_what_can_be_known_is_told_before_an_extraction(tmp_path, monkeypatch, constants):
    def refuse(*_, **__):
        raise AssertionError("extracted")

    monkeypatch.setattr("study.run.get_features", refuse)
    constants(DATA_ROOT=str(make_images(tmp_path / "images", per_class=1)))
    with pytest.raises(InputError, match=r"'foto'.* art, photo"):
        Run.from_config([0, 1], ["foto"])
    with pytest.raises(InputError, match="Seeds"):
        Run.from_config([])
    with monkeypatch.context() as patched:
        patched.setattr(config, "DATA_ROOT", None)
        patched.setattr(config, "VIT_MODEL", "another")
        with pytest.raises(InputError, match="VIT_MODEL"):
            Run.from_config([0, 1])
    with Results(tmp_path / "r") as results:
        results.claim(Settings.current(batch_size=7), FEATURES)
    with pytest.raises(InputError, match="BATCH_SIZE"):
        Run.from_config([0, 1])
    for options in ({"overwrite": True}, {"holdouts": "art", "overwrite": True}):
        with pytest.raises(AssertionError, match="extracted"):
            Run.from_config([0, 1], **options)


@pytest.mark.parametrize(
    ("features", "blocks", "has"),
    [("tokens", 0, "the tokens before 1 blocks"), ("tokens", 2, "before 1 blocks"), ("none", 1, "no tokens")],
)
def test_features_and_settings_agree_on_the_blocks_that_are_trained(tmp_path, features, blocks, has):
    made = token_blobs() if features == "tokens" else save_blobs(tmp_path / "f.safetensors")
    with pytest.raises(InputError, match=f"TRAINED_BLOCKS is {blocks} .* {has}"):
        make_run(made, tmp_path, settings=Settings.current(trained_blocks=blocks) if blocks else SMALL)
    assert not (tmp_path / "settings.json").exists()


def test_a_run_of_blocks_asks_for_its_tokens_when_it_is_read_again(tmp_path):
    settings, asked = Settings.current(trained_blocks=1, ph1_num_epochs=2, ph2_num_epochs=2), []
    make_run(token_blobs(), tmp_path, settings=settings)
    records = [stored_record()]
    again = Run.of(Results(tmp_path), lambda **options: asked.append(options) or token_blobs(), records, "run")
    assert (asked, again.settings) == ([{"blocks": 1}], settings)


def test_what_a_seed_keeps_of_every_image_counts_as_memory(tmp_path, monkeypatch):
    needs, stacks, sizes = [], [], (10, 30)
    monkeypatch.setattr("study.run.check_memory", lambda need, *_: needs.append(need))
    monkeypatch.setattr("study.run.stacks_at_a_time", lambda seeds, floats, _: stacks.append(floats) or 1)
    for per_cell in sizes:
        run = make_run(save_blobs(tmp_path / f"{per_cell}.safetensors", per_cell=per_cell), tmp_path / str(per_cell))
        units = [("art", (0, 1, 2))]
        run.check_memory(units, 2)
        list(run.side_by_side("Phase 1", units, lambda unit, tick: tick(), 1, 100))
    images = 9 * (sizes[1] - sizes[0])  # of three domains and three classes
    assert needs[1] - needs[0] == 3 * images * 5 * 8  # three seeds, five int64
    assert stacks == [100 + 9 * per_cell for per_cell in sizes]

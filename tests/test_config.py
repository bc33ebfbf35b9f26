"""The settings: parsing, validation, when they take effect, and their hash."""

import ast
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import config
import importance
from config import InputError, Settings, parse
from tests.factories import ROOT

DOCUMENTED = {
    *("DATA_ROOT", "VIT_MODEL", "BATCH_SIZE", "HIDDEN_SIZES", "SPLIT_SEED", "RESULTS_DIR"),
    *("PH1_NUM_EPOCHS", "PH1_LEARNING_RATE", "IMPORTANCE_THRESHOLD_PERCENTILE", "PH2_NUM_EPOCHS", "PH2_LR_IMPORTANT"),
    *("PH2_LR_UNIMPORTANT_START", "PH2_LR_DECAY_RATE", "PH2_FREEZE_EPOCH", "PH2_INIT"),
}

# Another valid value than the default, for each field of Settings.
OTHERS = {
    "split_seed": 1,
    "out_fraction": 0.25,
    "hidden_sizes": (10, 10),
    "batch_size": 16,
    "ph1_num_epochs": 3,
    "ph1_learning_rate": 0.01,
    "ph1_data": "in",
    "importance_threshold_percentile": 40.0,
    "importance_aggregation": "max",
    "ph2_num_epochs": 3,
    "ph2_lr_important": 0.01,
    "ph2_lr_unimportant_start": 0.0,
    "ph2_lr_decay_rate": 1.0,
    "ph2_freeze_epoch": 0,
    "ph2_init": "phase1",
    "importance_criterion": "path",
    "mask_scope": "row",
}


@pytest.fixture(autouse=True)
def constants():
    """Put every constant back after the test."""
    before = {name: value for name, value in vars(config).items() if name.isupper()}
    yield before
    vars(config).update(before)


def constant_assignments() -> list[ast.stmt]:
    """Top-level statements of config.py that give a name in capitals a value."""
    found = []
    for node in ast.parse((ROOT / "config.py").read_text("utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and all(t.id.isupper() for t in targets):
            found.append(node)
    return found


# The constants


def test_every_constant_is_annotated():
    bare = [node.targets[0].id for node in constant_assignments() if isinstance(node, ast.Assign)]
    known = [
        "AGGREGATIONS",
        "CRITERIA",
        "AGGREGATED",
        "WITHOUT_GRADIENTS",
        "POOLINGS",
        "SCOPES",
        "STARTS",
        "ADDED_LATER",
        "LIMITS",
        "MOST_LAYERS",
        "RULES",
    ]
    assert bare == known  # what is known and allowed, not settings
    annotated = {node.target.id for node in constant_assignments() if isinstance(node, ast.AnnAssign)}
    assert set(config.names()) == annotated
    assert annotated >= DOCUMENTED


def test_defaults_are_of_their_declared_types_and_those_of_the_method():
    for name, kind in config.names().items():
        options = kind.__args__ if isinstance(kind, types.UnionType) else (kind,)
        classes = tuple(getattr(option, "__origin__", option) for option in options)
        assert type(getattr(config, name)) in classes, name
    assert config.DATA_ROOT is None
    assert (config.HIDDEN_SIZES, config.BATCH_SIZE) == ((10,) * 5, 32)
    assert (config.PH1_NUM_EPOCHS, config.PH1_LEARNING_RATE, config.PH1_DATA) == (10, 1e-3, "all")
    assert (config.PH2_NUM_EPOCHS, config.PH2_LR_IMPORTANT, config.PH2_LR_UNIMPORTANT_START) == (10, 1e-3, 1e-4)
    assert (config.PH2_LR_DECAY_RATE, config.PH2_FREEZE_EPOCH, config.PH2_INIT) == (0.5, 7, "fresh")
    assert (config.IMPORTANCE_THRESHOLD_PERCENTILE, config.IMPORTANCE_AGGREGATION) == (60, "sum")
    assert (config.OUT_FRACTION, config.NUM_SEEDS) == (0.2, 10)


def test_choices_are_those_of_the_importance_module():
    assert tuple(importance.AGGREGATIONS) == config.AGGREGATIONS
    assert sorted(importance.CRITERIA) == sorted(config.CRITERIA)
    assert {name for name, criterion in importance.CRITERIA.items() if not criterion.compares} == {*config.AGGREGATED}
    assert importance.SCOPES == config.SCOPES


@pytest.mark.parametrize("name", sorted(config.names()))
def test_every_constant_can_be_given_its_own_default(name):
    default = getattr(config, name)
    parsed = parse(f"{name}={default}")
    assert parsed == (name, default)
    assert type(parsed[1]) is type(default)


# Parse


PARSED = {
    "BATCH_SIZE": {"64": 64, " 64 ": 64},
    "PH1_LEARNING_RATE": {"1": 1.0, "3e-4": 0.0003},
    "HIDDEN_SIZES": {"10,20": (10, 20), "[10, 20]": (10, 20), "(1, 2, 3)": (1, 2, 3), "10": (10,), "(7,) * 2": (7, 7)},
    "PH2_INIT": {"phase1": "phase1", "'phase1'": "phase1"},
    "DATA_ROOT": {"None": None, "/data/pacs=new": "/data/pacs=new"},
    "THREADS": {"2": 2, "None": None},
    "SPLIT_SEED": {"seed": "seed", "3": 3},
    "EXTRACTION_WORKERS": {"0": 0},
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, values in PARSED.items() for text in values])
def test_parse(name, text):
    known, parsed = parse(f" {name} ={text}")
    assert (known, parsed) == (name, PARSED[name][text])
    assert type(parsed) is type(PARSED[name][text])


@pytest.mark.parametrize("text", ["1e3", "007", "1_0", "0x10", "2024", "1.50", "run-1", "results/a b", "[a]", "True"])
def test_a_name_that_looks_like_a_number_stays_as_it_was_written(text):
    assert parse(f"RESULTS_DIR={text}") == ("RESULTS_DIR", text)


WRONG = {
    "BATCH_SIZE": ["many", "1.5", "32.0", "True", "None", "", "{[]: 1}"],
    "PH1_LEARNING_RATE": ["fast", "True", "nan", "None"],
    "HIDDEN_SIZES": ["10.5,10", "True", "ten", "None"],
    "VIT_MODEL": ["None"],
    "THREADS": ["two"],
}


@pytest.mark.parametrize("assignment", [f"{name}={value}" for name, values in WRONG.items() for value in values])
def test_values_of_another_type_are_refused(assignment):
    name = assignment.partition("=")[0]
    with pytest.raises(InputError, match=name):
        parse(assignment)


NEAREST = {
    "BATCHSIZE": "BATCH_SIZE",
    "batch_size": "BATCH_SIZE",
    "PH2_FREEZE_EPOCHS": "PH2_FREEZE_EPOCH",
    "hidden_size": "HIDDEN_SIZES",
    "IMPORTANCE_AGREGATION": "IMPORTANCE_AGGREGATION",
}


@pytest.mark.parametrize("name", [*NEAREST, "", "AGGREGATIONS", "InputError", "json", "__name__"])
def test_what_is_not_a_setting_is_refused_with_the_nearest_name(name):
    for function, argument in ((parse, f"{name}=1"), (config.apply, {name: 1})):
        with pytest.raises(InputError, match=f"'{name}'.* {NEAREST.get(name, '.*')}\\.$"):
            function(argument)


def test_an_assignment_needs_an_equals_sign():
    with pytest.raises(InputError, match="BATCH_SIZE"):
        parse("BATCH_SIZE")


@settings(deadline=None)
@given(st.text(max_size=30))
def test_parse_never_raises_anything_else(text):
    for name in ("BATCH_SIZE", "PH1_LEARNING_RATE", "HIDDEN_SIZES", "DATA_ROOT"):
        try:
            known, value = parse(f"{name}={text}")
        except InputError:
            continue
        assert known == name
        assert isinstance(
            value, {"BATCH_SIZE": int, "PH1_LEARNING_RATE": float, "HIDDEN_SIZES": tuple}.get(name, object)
        )


def test_a_setting_given_twice_is_refused(constants):
    with pytest.raises(InputError, match="BATCH_SIZE"):
        config.apply({"BATCH_SIZE": 5}, {"PH1_NUM_EPOCHS": 3, "BATCH_SIZE": 6})
    assert (config.BATCH_SIZE, config.PH1_NUM_EPOCHS) == (32, 10)


def test_apply_sets_constants_and_checks_their_types_and_reset_undoes_it(constants):
    config.apply({"BATCH_SIZE": 5, "PH1_LEARNING_RATE": 1, "HIDDEN_SIZES": [4, 4], "THREADS": None, "DATA_ROOT": "x"})
    assert (config.BATCH_SIZE, config.PH1_LEARNING_RATE, config.HIDDEN_SIZES) == (5, 1.0, (4, 4))
    assert type(config.PH1_LEARNING_RATE) is float
    with pytest.raises(InputError, match="BATCH_SIZE"):
        config.apply({"DATA_ROOT": "y", "BATCH_SIZE": "5"})
    assert (config.BATCH_SIZE, config.DATA_ROOT) == (5, "x")
    with pytest.raises(InputError, match="NUM_SEEDS"):
        config.apply({"NUM_SEEDS": -1})
    assert config.changed("BATCH_SIZE")
    config.reset()
    assert not config.changed("BATCH_SIZE")
    assert {name: getattr(config, name) for name in config.names()} == {n: constants[n] for n in config.names()}


# Settings


def test_settings_are_the_constants_as_they_are_now():
    assert {f.name for f in dataclasses.fields(Settings)} == set(OTHERS)
    before = Settings.current()
    for field, value in OTHERS.items():
        assert getattr(before, field) == getattr(config, field.upper()) != value
        setattr(config, field.upper(), value)
    assert Settings.current() == Settings(**OTHERS)
    assert before != Settings.current()  # made earlier, stays as it was


def test_constants_set_in_a_notebook_are_coerced_and_checked_and_overrides_go_before_them():
    config.HIDDEN_SIZES, config.PH1_LEARNING_RATE, config.BATCH_SIZE = [8, 8], 1, 8
    settings = Settings.current(batch_size=4)
    assert (settings.hidden_sizes, settings.batch_size, config.BATCH_SIZE) == ((8, 8), 4, 8)
    assert type(settings.ph1_learning_rate) is float
    assert Settings.current(hidden_sizes=[3, 3]).hidden_sizes == (3, 3)
    with pytest.raises(InputError, match="'BATCHSIZE'"):
        Settings.current(batchsize=4)
    config.BATCH_SIZE = "32"
    with pytest.raises(InputError, match="BATCH_SIZE"):
        Settings.current()


NAN, INF = float("nan"), float("inf")


BAD = {
    "hidden_sizes": [(), (10,), (10, 0), (10, -1, 10), (10.0, 10.0), (10**9, 10**9), (10,) * 999],
    "out_fraction": [0.0, 1.0, -0.2, NAN],
    "batch_size": [0, -1, 2.0, 10**30],
    "ph1_num_epochs": [0, 10**9],
    "ph2_num_epochs": [0, 10**9],
    "ph1_learning_rate": [0.0, -1e-3, INF, NAN, 10**500],
    "ph2_lr_important": [0.0, INF, NAN],
    "ph2_lr_unimportant_start": [-1e-9, INF, NAN],
    "ph2_lr_decay_rate": [-0.5, INF, NAN],
    "ph2_freeze_epoch": [-1, 7.0],
    "ph1_data": ["out"],
    "ph2_init": ["random"],
    "importance_threshold_percentile": [-0.1, 100.1, NAN],
    "importance_aggregation": ["median"],
    "importance_criterion": ["moved"],
    "mask_scope": ["column"],
    "split_seed": [0.5, None, "seeds", 10**18, -(10**18)],
}
GOOD = {
    "split_seed": ["seed", 0, 7],
    "hidden_sizes": [(1, 1), (3, 7, 5)],
    "batch_size": [1],
    "ph2_lr_unimportant_start": [0],
    "ph2_lr_decay_rate": [0, 1.5],
    "ph2_freeze_epoch": [10**6],
    "importance_threshold_percentile": [0, 100],
    "importance_aggregation": config.AGGREGATIONS,
    "importance_criterion": config.CRITERIA,
    "mask_scope": config.SCOPES,
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD.items() for value in values])
def test_bad_values_are_refused_by_the_constant_s_name(field, value):
    with pytest.raises(ValueError, match=field.upper()) as caught:
        Settings.current(**{field: value})
    assert isinstance(caught.value, InputError)
    assert str(caught.value).endswith(".")
    assert len(str(caught.value)) < 200
    setattr(config, field.upper(), value)
    with pytest.raises(InputError, match=field.upper()):
        Settings.current()


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in GOOD.items() for value in values])
def test_values_at_the_edge_are_good(field, value):
    assert getattr(Settings.current(**{field: value}), field) == value


# Hash


def test_hash_changes_with_each_field_and_with_nothing_else():
    settings = Settings.current()
    hashes = {settings.hash, *(Settings.current(**{name: value}).hash for name, value in OTHERS.items())}
    assert len(hashes) == len(OTHERS) + 1
    other = dataclasses.replace(settings, importance_threshold_percentile=60)  # an int, as one types it
    assert (other, other.hash) == (settings, settings.hash)
    config.apply({"NUM_SEEDS": 3, "SEEDS_PER_CHUNK": 2, "DEVICE": "cpu", "RESULTS_DIR": "x", "DATA_ROOT": "y"})
    assert Settings.current().hash == settings.hash


def test_hash_is_of_the_settings_as_sorted_json():
    settings = Settings(**OTHERS)
    by_hand = {name.upper(): list(value) if name == "hidden_sizes" else value for name, value in OTHERS.items()}
    assert settings.as_dict() == by_hand == json.loads(json.dumps(settings.as_dict()))
    text = json.dumps(dict(sorted(by_hand.items())))
    assert settings.hash == hashlib.sha256(text.encode()).hexdigest()[:12]
    assert Settings(**dict(reversed(OTHERS.items()))).hash == settings.hash


def test_settings_that_were_added_later_leave_the_hash_of_what_was_done_before():
    assert {field.upper() for field in OTHERS} >= config.ADDED_LATER.keys()
    assert not config.ADDED_LATER.keys() & Settings.current().as_dict().keys()
    before = Settings.current().as_dict()
    config.apply({"IMPORTANCE_CRITERION": "agree", "MASK_SCOPE": "layer"})
    assert Settings.from_dict(before).importance_criterion == "movement"  # whatever the constants say today
    assert Settings.from_dict(Settings.current().as_dict()) == Settings.current()


def test_an_aggregation_is_refused_where_the_criterion_compares_the_domains():
    with pytest.raises(InputError, match="IMPORTANCE_AGGREGATION has no effect"):
        Settings.current(importance_criterion="agree", importance_aggregation="max")


# Import

IMPORT = """
import ast, dataclasses, difflib, hashlib, json, random, socket, sys, time, types, typing
def refuse(*args, **kwargs): raise AssertionError("config did more than define names")
socket.socket = time.time = time.time_ns = random.seed = refuse
sys.path.insert(0, sys.argv[1])
state, before = random.getstate(), set(sys.modules)
import config
assert random.getstate() == state
heavy = {"torch", "numpy", "matplotlib", "transformers"} & set(sys.modules)
assert not heavy, heavy
sys.stderr.write(config.Settings.current().hash)
"""


def test_import_has_no_side_effects_and_the_hash_is_the_same_in_every_process(tmp_path):
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", IMPORT, str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", Settings.current().hash)
    assert list(tmp_path.iterdir()) == []


def test_settings_of_blocks_are_read_again_as_they_were_saved():
    """BLOCK_EPOCHS is the number of epochs of both phases."""
    made = Settings.current(trained_blocks=1, ph1_num_epochs=7, ph2_num_epochs=7, head_start="random")
    assert Settings.from_dict(json.loads(json.dumps(made.as_dict()))) == made
    with pytest.raises(InputError, match="NO_SUCH"):
        Settings.from_dict(made.as_dict() | {"NO_SUCH": 1})


def test_a_probe_starts_a_linear_classifier_only():
    made = Settings.current(trained_blocks=1, hidden_sizes=(5,), head_start="random")
    with pytest.raises(InputError, match=r"HEAD_START.*BLOCK_HIDDEN_SIZES"):
        dataclasses.replace(made, head_start="probe")


@pytest.mark.parametrize(
    ("blocks", "idle", "used"),
    [
        (0, ["BLOCK_EPOCHS", "HEAD_START", "BLOCK_SEEDS_PER_CHUNK"], ["BATCH_SIZE", "PH2_INIT", "TRAINED_BLOCKS"]),
        (1, ["BATCH_SIZE", "PH1_NUM_EPOCHS", "SEEDS_PER_CHUNK"], ["BLOCK_EPOCHS", "PH2_INIT", "TRAINED_BLOCKS"]),
    ],
)
def test_settings_that_trained_blocks_leave_without_effect_are_told(blocks, idle, used):
    assert all(config.without_effect(name, blocks).startswith(f"{name} has no effect") for name in idle)
    assert [config.without_effect(name, blocks) for name in used] == [None] * len(used)

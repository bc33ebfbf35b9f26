"""Methods with a mask are arms of the study, trained by the other engine."""

from functools import partial

import pytest
import torch

from config import Settings
from engine import Batch
from field.algorithms import ALGORITHMS
from field.train import train_method
from study import CONTROLS, Arm, MaskSource
from tests.factories import split_blobs
from trainer_phase1 import train_domain
from trainer_phase2 import masks_for, train_holdout

MASKED = sorted(name for name, cls in ALGORITHMS.items() if cls.control)
SETTINGS = Settings.current(
    hidden_sizes=(6, 5, 4),
    ph1_num_epochs=2,
    ph2_num_epochs=3,
    ph2_freeze_epoch=1,
    ph2_lr_decay_rate=0.3,
    importance_threshold_percentile=40.0,
    batch_size=16,
)
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def data():
    return split_blobs(settings=SETTINGS)


@pytest.fixture(scope="module")
def source(data):
    """Masks of Phase 1 for the holdout "art": of these seeds, and of each next seed."""

    def masks_of(seeds):
        networks = [train_domain(data, domain, seeds, SETTINGS) for domain in data.sources("art")]
        evidence = {n.domain: n.evidence for n in networks}
        masks = masks_for(evidence, {n.domain: n.failed for n in networks}, SETTINGS)
        return lambda settings: masks

    masks = masks_of(SEEDS), masks_of([seed + 1 for seed in SEEDS])
    return MaskSource("art", SEEDS, *masks, data.network(SETTINGS.hidden_sizes))


def test_there_is_a_method_for_every_control():
    controls = [ALGORITHMS[name].control for name in MASKED]
    random_start = [name for name, control in CONTROLS.items() if not control.pretrained]
    assert sorted([*controls, "erm"]) == sorted(random_start)


@pytest.mark.parametrize("name", MASKED)
def test_a_masked_method_is_the_arm_of_the_study(name, data, source):
    """In float64 the same networks as Phase 2 trains, whatever the settings are."""
    cls = ALGORITHMS[name]
    masking = Arm(cls.control).masking(source, SETTINGS)
    theirs = train_holdout(data, "art", SEEDS, [masking])
    mask = dict(zip(data.network(SETTINGS.hidden_sizes).tracked_names, masking.mask, strict=True))
    method = partial(cls, **cls.from_settings(SETTINGS))
    ours = train_method(data, ["art"], SEEDS, method, SETTINGS, given={"mask": mask})
    for key, value in ours.params.items():
        assert torch.allclose(value, theirs.final[key][:, 0], rtol=0, atol=1e-9), key
    assert torch.equal(ours.correct, theirs.correct[:, 0])


@pytest.mark.parametrize("name", ["FrozenMask", "PruneMask"])
def test_unmarked_weights_keep_their_exact_bits(methods, name):
    engine = methods.run(name, learning_rate=0.05, weight_decay=0.1)
    start = methods.start()
    for key, mask in engine.state["mask"].items():
        unmarked = engine.params[key][~mask]
        assert torch.equal(unmarked, start[key][~mask] if name == "FrozenMask" else torch.zeros_like(unmarked))
        assert not torch.isclose(engine.params[key][mask], start[key][mask]).any()


def test_unmarked_weights_slow_down_from_epoch_to_epoch_and_stop(methods):
    knobs = {"low_rate": 0.25, "decay": 0.5, "freeze_after": 0.75}
    of = methods.setup(steps_per_epoch=1, epochs=4)
    engine = methods.engine(methods.make("ImportanceMask", of, **knobs))
    erm = methods.make("ERM", of)
    for epoch, (x, labels, domains) in enumerate(methods.batches(4, of, balanced=False)):
        before = engine.params
        state = {key: engine.state[key] for key in ("step", "adam")}
        full, _, _ = torch.func.vmap(erm.update)(before, Batch(x, labels, domains), state, {})
        engine.step(x, labels, {}, domains)
        rate = [0.25, 0.125, 0.0625, 0.0][epoch]
        for key, value in engine.params.items():
            marked = engine.state["mask"].get(key, torch.ones(1, dtype=torch.bool))
            wanted = before[key] + torch.where(marked, 1.0, rate) * (full[key] - before[key])
            assert torch.allclose(value, wanted, rtol=0, atol=1e-15), key


def test_the_schedule_and_the_mask_are_those_of_the_settings():
    settings = Settings.current(
        ph2_lr_important=2e-3, ph2_lr_unimportant_start=1e-3, ph2_num_epochs=4, ph2_freeze_epoch=2
    )
    values = ALGORITHMS["ImportanceMask"].from_settings(settings)
    assert values == {"learning_rate": 2e-3, "kept": 60.0, "low_rate": 0.5, "decay": 0.5, "freeze_after": 0.5}


def test_a_mask_must_be_given(data):
    with pytest.raises(ValueError, match="ImportanceMask"):
        train_method(data, ["art"], SEEDS, ALGORITHMS["ImportanceMask"], SETTINGS)

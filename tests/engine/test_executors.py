"""Units in any executor: what travels, what comes back, and what a process at the other end needs to know."""

import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from operator import itemgetter

import pytest
import torch
from torch import nn

from config import InputError, Settings
from engine import executors, side_by_side
from engine.executors import Place, in_executor
from field import Comparison
from field.algorithms import ALGORITHMS
from study import ERM, IMPORTANCE, Arm, Execution, Study
from tests.factories import LEARNING, everything, make_run, save_blobs, token_blobs

SMOOTHING = """
from torch.nn import functional as F

from amount_of_smoothing import AMOUNT
from field import Algorithm, Hyperparameter


class Smoothing(Algorithm):
    '''Label smoothing.'''

    hyperparameters = {"smoothing": Hyperparameter(AMOUNT, "weight of the uniform distribution")}

    def loss(self, params, batch, state, noise):
        logits = self.forward(params, batch.features)
        return F.cross_entropy(logits, batch.labels, label_smoothing=self.smoothing), {}
"""


class Bar:
    n = 0

    def update(self, by=1):
        self.n += by


class Sent(Place):
    """A place that notes what is sent."""

    def __init__(self, executor):
        super().__init__(executor)
        self.contents = []

    def send(self, contents):
        self.contents.append(contents)
        return super().send(contents)


@pytest.fixture
def threads():
    with ThreadPoolExecutor(2) as executor:
        yield executor


def test_results_come_in_order_and_the_bar_counts_ticks(threads):
    def work(unit, tick):
        for _ in range(unit):
            tick()
        return unit, torch.get_num_threads()

    bar = Bar()
    assert list(side_by_side(work, range(5), 1, bar, threads)) == [(unit, 1) for unit in range(5)]
    assert bar.n == sum(range(5))
    assert list(side_by_side(work, (), 1, bar, threads)) == []


def test_an_error_cancels_what_waits_and_says_where_it_was_raised(threads, tmp_path):
    def work(unit, tick):
        (tmp_path / str(unit)).touch()
        if unit == 1:
            raise InputError("unit 1")
        time.sleep(0.2)

    with pytest.raises(InputError, match="unit 1") as caught:
        list(side_by_side(work, range(1, 100), 1, Bar(), threads))
    assert str(caught.value) == "unit 1"
    assert "in work" in caught.value.__notes__[0]
    threads.shutdown()
    assert len(list(tmp_path.iterdir())) < 50


def test_a_large_tensor_travels_once_by_itself_and_small_and_strided_ones_stay_as_they_are(threads):
    large, small = torch.randn(600, 600), torch.randn(3)
    same, turned = large.clone(), torch.randn(600, 600).T

    def work(unit, tick):
        own, number = unit
        return torch.equal(own, same), own is large, turned.stride(), small[number].item()

    place = Sent(threads)
    found = list(in_executor(place, work, [(large, 0), (same, 1)], Bar()))
    assert found == [(True, True, (1, 600), small[number].item()) for number in range(2)]
    (contents,) = place.contents
    assert sorted(map(type, contents.values()), key=str) == [bytes, type(large.numpy())]
    assert len([content for content in contents.values() if not isinstance(content, bytes)]) == 1


def test_parameters_and_other_types_arrive_as_they_were(threads):
    tensors = [nn.Parameter(torch.ones(600, 600)), *(torch.ones(2**20).to(t) for t in (torch.bfloat16, torch.bool))]
    (found,) = side_by_side(lambda unit, tick: tensors, [0], 1, Bar(), threads)
    for before, after in zip(tensors, found, strict=True):
        assert (after.dtype, after.requires_grad, type(after)) == (before.dtype, before.requires_grad, type(before))
        assert torch.equal(after, before)


def test_what_cannot_be_pickled_is_refused_in_a_sentence(threads):
    lock = threading.Lock()
    with pytest.raises(InputError, match=r"cannot be sent to another process: .*lock.*\.$"):
        list(side_by_side(lambda unit, tick: lock, [0], 1, Bar(), threads))


def test_an_executor_that_was_shut_down_is_a_sentence(threads):
    class Closed(Place):
        def watch(self):
            threads.shutdown(wait=False, cancel_futures=True)

    def work(unit, tick):
        time.sleep(0.3)

    with pytest.raises(InputError, match="shut down"):
        list(in_executor(Closed(threads), work, range(9), Bar()))


def test_another_version_at_the_other_end_is_a_sentence_that_names_both(threads, monkeypatch):
    true = executors.facts()
    monkeypatch.setattr(executors, "facts", iter([true | {"torch": "1.0"}, true]).__next__)
    with pytest.raises(
        InputError, match=rf"has torch {torch.__version__.split('+')[0]}.*, and the calling process 1\.0"
    ):
        list(side_by_side(lambda unit, tick: unit, [0], 1, Bar(), threads))


def test_facts_tell_versions_and_code():
    found = executors.facts()
    assert found["torch"].startswith(torch.__version__.split("+")[0])
    assert executors.difference(found, found) is None
    changed = found | {"this project": "0" * 12}
    words = executors.difference(changed, found)
    assert words.startswith(f"has this project {'0' * 12}, and the calling process {found['this project']}: ")


BLOCKS = Settings.current(trained_blocks=1, batch_size=32, ph1_num_epochs=1, ph2_num_epochs=1)
FORMS = [
    Arm("importance", start="merged_mean"),
    Arm("importance", changes={"IMPORTANCE_CRITERION": "path"}),
    Arm("permuted", start="phase1"),
    Arm("other_seed"),
]


@pytest.mark.parametrize(
    ("settings", "arms"), [(LEARNING, FORMS), (BLOCKS, [ERM, IMPORTANCE])], ids=["forms", "blocks"]
)
def test_whatever_is_read_of_phase_1_is_there_without_the_results_directory(settings, arms, threads, tmp_path):
    features = save_blobs(tmp_path / "blobs.safetensors") if settings is LEARNING else token_blobs()
    for name, executor in (("here", None), ("there", threads)):
        execution = Execution(progress=False, seeds_per_chunk=1, executor=executor)
        Study(make_run(features, tmp_path / name, 2, settings, ["photo"], execution), arms).train()
    assert everything(tmp_path / "here") == everything(tmp_path / "there")


def test_a_comparison_with_a_method_of_a_users_file_and_a_module_beside_it_in_new_processes(tmp_path, monkeypatch):
    """The other processes are new ones: they know this project, and nothing of the user's folder."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "amount_of_smoothing.py").write_text("AMOUNT = 0.2\n")
    (tmp_path / "mine" / "smoothing.py").write_text(SMOOTHING)
    features, place = save_blobs(tmp_path / "blobs.safetensors"), f"{tmp_path / 'mine' / 'smoothing.py'}:Smoothing"
    found = {}
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        for name in (None, executor):
            monkeypatch.setitem(ALGORITHMS, "Smoothing", None)
            monkeypatch.delitem(ALGORITHMS, "Smoothing")
            execution = Execution(progress=False, seeds_per_chunk=1, executor=name)
            directory = tmp_path / ("here" if name is None else "there")
            run = make_run(features, directory, 2, LEARNING, ["art"], execution)
            Study(run).train()
            Comparison(run, [place, "ImportanceMask"]).train()
            found[name] = everything(directory)
    assert found[None] == found[executor]
    assert itemgetter("records.jsonl")(found[None]).count(b"Smoothing") == 4

"""The machine: which device, how many threads, and what is refused by name."""

import pytest
import torch

from config import InputError
from engine import choose_device, default_workers, prepare_machine, rank, training_threads

WITHOUT_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")


@pytest.fixture(autouse=True)
def threads():
    """Put the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_device_is_the_one_asked_for_or_cuda_where_there_is_one_and_cores_are_counted():
    assert choose_device("cpu") == prepare_machine("cpu") == "cpu"
    assert choose_device() == prepare_machine() == ("cuda" if torch.cuda.is_available() else "cpu")
    assert 1 <= default_workers() <= 16


@pytest.mark.parametrize("device", ["gpu", "cpu:0", "", pytest.param("cuda", marks=WITHOUT_CUDA)])
def test_another_device_is_refused(device):
    for function in (choose_device, prepare_machine):
        with pytest.raises(InputError, match="DEVICE"):
            function(device)


def test_threads_are_set_where_they_are_given():
    prepare_machine("cpu", 2)
    assert torch.get_num_threads() == 2
    prepare_machine("cpu")
    assert torch.get_num_threads() == 2
    for wrong in (0, 10**6):
        with pytest.raises(InputError, match="THREADS"):
            prepare_machine("cpu", wrong)


def test_processes_of_torchrun_know_their_number_and_take_a_gpu_and_cores_each(monkeypatch):
    assert rank() == (0, 1)
    alone, taken = default_workers(), []
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert rank() == (5, 8)
    assert 1 <= default_workers() <= max(1, alone)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(12), raising=False)
    assert default_workers() == 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert (prepare_machine(), prepare_machine("cpu")) == ("cuda", "cpu")
    assert taken == [3]


@pytest.mark.parametrize(("number", "of"), [("2", "2"), ("-1", "2"), ("one", "2"), ("0", "")])
def test_a_number_that_no_process_of_torchrun_has_is_refused(monkeypatch, number, of):
    monkeypatch.setenv("RANK", number)
    monkeypatch.setenv("WORLD_SIZE", of)
    with pytest.raises(InputError, match=r"RANK.*WORLD_SIZE"):
        rank()


def test_training_threads_last_for_the_block():
    def fail():
        with training_threads(1):
            assert torch.get_num_threads() == 1
            raise KeyboardInterrupt

    torch.set_num_threads(2)
    with pytest.raises(KeyboardInterrupt):
        fail()
    assert torch.get_num_threads() == 2

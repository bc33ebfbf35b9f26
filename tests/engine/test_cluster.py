"""A real scheduler and real workers on this machine: the same bytes, nothing lost, and sentences for what is wrong."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

import config
import experiment
from config import InputError
from engine import check_cluster, cluster, executors, side_by_side
from study import Execution, Study, current_execution
from tests.factories import LEARNING, ROOT, everything, make_run, save_blobs, wait_until

distributed = pytest.importorskip("distributed", reason="Dask is not installed: pip install distributed")

OLD_SCHEDULER = """
from dask.__main__ import main
from distributed import versions
known = versions.version
versions.version = lambda package: "2020.1.0" if package == "distributed" else known(package)
main()
"""


class Bar:
    n = 0

    def update(self, by=1):
        self.n += by


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts `dask` with some arguments in an empty folder, as from a shell; everything ends with the module."""
    folder, begun = tmp_path_factory.mktemp("dask"), []

    def start(*arguments, code="from dask.__main__ import main; main()"):
        log = (folder / f"{len(begun)}.log").open("wb")
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", code, *map(str, arguments)]
        begun.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log))
        return begun[-1]

    yield start
    for process in reversed(begun):
        process.terminate()
    for process in begun:
        process.wait(60)


@pytest.fixture(scope="module")
def start_scheduler(start):
    """Starts a scheduler; returns its address and process."""

    def start_scheduler(**options):
        address = f"tcp://127.0.0.1:{free_port()}"
        process = start("scheduler", "--host", address, "--no-dashboard", **options)
        wait_until(lambda: answers(address))
        return address, process

    return start_scheduler


@pytest.fixture(scope="module")
def scheduler(start, start_scheduler):
    """Address of a scheduler with two workers."""
    address, _ = start_scheduler()
    for _ in range(2):
        start("worker", address, "--nthreads", 1, "--no-dashboard")
    yield address
    cluster.connect(address).client.close()


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def answers(address):
    with socket.socket() as tried:
        host, port = address.removeprefix("tcp://").split(":")
        return tried.connect_ex((host, int(port))) == 0


def run(work, units, address, bar=None):
    return list(side_by_side(work, units, 1, bar or Bar(), address))


def test_a_study_writes_the_same_bytes_as_on_this_machine(scheduler, tmp_path):
    features = save_blobs(tmp_path / "blobs.safetensors")
    for name, executor in (("here", None), ("there", scheduler)):
        execution = Execution(progress=False, seeds_per_chunk=2, executor=executor)
        Study(make_run(features, tmp_path / name, 4, LEARNING, execution=execution)).train()
    assert everything(tmp_path / "here") == everything(tmp_path / "there")
    assert len(everything(tmp_path / "there")) > 10


def test_units_are_worked_on_in_two_processes_that_are_not_this_one_one_at_a_time(scheduler):
    def work(unit, tick):
        tick()
        time.sleep(0.2)
        return unit, os.getpid()

    bar = Bar()
    found = run(work, range(8), scheduler, bar)
    assert [unit for unit, _ in found] == list(range(8))
    assert len({process for _, process in found} - {os.getpid()}) == 2
    assert bar.n == 8


def test_a_worker_that_is_killed_in_the_middle_loses_nothing(scheduler, tmp_path):
    def work(unit, tick):
        mark = tmp_path / "killed"
        if unit == 3 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        tick()
        return unit

    bar = Bar()
    assert run(work, range(6), scheduler, bar) == list(range(6))
    assert bar.n == 6
    assert (tmp_path / "killed").exists()


def test_data_that_is_gone_with_all_workers_is_there_again(scheduler, tmp_path):
    def work(unit, tick):
        mark = tmp_path / str(os.getppid())  # the process that starts a worker again
        if not mark.exists():
            mark.touch()
            wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
            os.kill(os.getpid(), signal.SIGKILL)
        tick()
        return unit

    bar = Bar()
    assert run(work, range(4), scheduler, bar) == list(range(4))
    assert bar.n == 4


def test_a_unit_that_no_worker_survives_is_a_sentence(scheduler):
    def work(unit, tick):
        if unit == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return unit

    with pytest.raises(InputError, match="ended by the same unit, most likely for lack of memory"):
        run(work, range(3), scheduler)


def begun_of(folder):
    """How many units have left a file in a folder, once no more do."""

    def still():
        begun = len(list(folder.iterdir()))
        time.sleep(1.5)  # a unit takes half a second
        return len(list(folder.iterdir())) == begun

    wait_until(still)
    return len(list(folder.iterdir()))


def test_an_error_ends_the_command_and_cancels_what_waits(scheduler, tmp_path):
    def work(unit, tick):
        (tmp_path / str(unit)).touch()
        if unit == 0:
            raise InputError("unit 0")
        time.sleep(0.5)

    with pytest.raises(InputError, match="unit 0"):
        run(work, range(300), scheduler)
    assert begun_of(tmp_path) < 300


def test_ctrl_c_cancels_what_waits(scheduler, tmp_path):
    class Interrupted(Bar):
        def update(self, by=1):
            raise KeyboardInterrupt

    def work(unit, tick):
        (tmp_path / str(unit)).touch()
        time.sleep(0.5)
        tick()

    with pytest.raises(KeyboardInterrupt):
        run(work, range(300), scheduler, Interrupted())
    assert begun_of(tmp_path) < 300


def test_another_version_of_the_project_on_a_worker_is_a_sentence_that_names_both(scheduler, monkeypatch):
    true = executors.facts()
    monkeypatch.setattr(executors, "facts", lambda: true | {"this project": "0" * 12})
    with pytest.raises(InputError, match=f"worker tcp.* has this project {true['this project']}, and .* {'0' * 12}: "):
        check_cluster(scheduler)


def test_the_constant_says_where_to_train_and_is_checked_at_once(scheduler, monkeypatch):
    monkeypatch.setattr(config, "SCHEDULER", scheduler)
    assert current_execution().executor == scheduler


def test_a_scheduler_without_workers_is_a_sentence_after_a_while(start_scheduler, monkeypatch):
    monkeypatch.setattr(cluster, "WAITING", 0.5)
    address, _ = start_scheduler()
    with pytest.raises(InputError, match=f"no worker for .* seconds: .*`dask worker {address} --nthreads 1`"):
        check_cluster(address)


def test_a_scheduler_or_workers_that_go_while_units_wait_are_a_sentence(start, start_scheduler, tmp_path, monkeypatch):
    address, scheduler = start_scheduler()
    worker = start("worker", address, "--nthreads", 1, "--no-dashboard", "--no-nanny")

    class Ending(Bar):
        def update(self, by=1):
            process.kill()

    def work(unit, tick):
        tick()
        time.sleep(0.3)

    process = worker
    cluster.connect(address)
    monkeypatch.setattr(cluster, "WAITING", 2)
    with pytest.raises(InputError, match="no worker for 2 seconds"):
        run(work, range(20), address, Ending())
    monkeypatch.undo()
    start("worker", address, "--nthreads", 1, "--no-dashboard", "--no-nanny")
    process = scheduler
    with pytest.raises(InputError, match=r"is gone: .* the same command goes on"):
        run(work, range(20), address, Ending())


def test_a_scheduler_of_another_version_is_a_sentence_that_names_both(start_scheduler):
    address, _ = start_scheduler(code=OLD_SCHEDULER)
    with pytest.raises(InputError, match=rf"distributed 2020\.1\.0, and .* {distributed.__version__}"):
        check_cluster(address)


def test_a_worker_with_threads_is_a_sentence():
    options = {"n_workers": 1, "threads_per_worker": 2, "processes": False, "dashboard_address": None}
    with distributed.LocalCluster(**options) as local, pytest.raises(InputError, match=r"2 threads.*--nthreads 1"):
        check_cluster(local.scheduler_address)


@pytest.mark.usefixtures("restored")
def test_no_scheduler_is_a_sentence_before_anything_else_is_done(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cluster, "CONNECTING", 0.5)
    address, features = f"tcp://127.0.0.1:{free_port()}", tmp_path / "blobs.safetensors"
    save_blobs(features)
    arguments = ["run", "--scheduler", address, "--features", str(features), "--results-dir", str(tmp_path / "new")]
    assert experiment.main(arguments) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith(f"No Dask scheduler answers at '{address}': start one with `dask scheduler`")
    assert not (tmp_path / "new").exists()


def test_another_kind_of_server_is_a_sentence(monkeypatch):
    monkeypatch.setattr(cluster, "CONNECTING", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(InputError, match=address):
            check_cluster(address)


def test_without_dask_the_command_to_install_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(InputError, match="`pip install distributed`"):
        check_cluster("tcp://127.0.0.1:8786")

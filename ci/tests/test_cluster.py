"""Ray: the same images with one worker, two, or none; dead actors; and refusals."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ci.tests.test_distill import assert_same_pixels, latents, pixels, victim
from igd_lib.config import STANDARD
from igd_lib.evaluation import evaluate_all, evaluate_sets
from igd_lib.experiment import measures
from igd_lib.experiment.experiment import prepare
from igd_lib.experiment.methods import Method
from igd_lib.experiment.scales import small_scale
from igd_lib.experiment.surrogates import Surrogates
from igd_lib.protocols import IGD_HARD
from igd_lib.sets.store import DistilledSet
from igd_lib.tools import cluster, machine

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def two_processors():
    """A local cluster of two processors, whatever the machine has; workers find the tests' modules."""
    paths = os.pathsep.join([os.getcwd(), os.path.join(os.getcwd(), "ci", "tests")])
    environment = {"env_vars": {"PYTHONPATH": paths, "IGD_QUIET": "1", "OMP_NUM_THREADS": "1"}}
    ray.init(
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env=environment,
        logging_level="warning",
    )
    yield
    ray.shutdown()


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as every worker has
    yield
    torch.set_num_threads(before)


@pytest.fixture
def whole(tmp_path, one_thread) -> DistilledSet:
    return victim(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_give_the_images_of_a_run_without_them(two_processors, tmp_path, whole, workers):
    found = victim(tmp_path / "set", ray=True, workers=workers)
    assert found.verify() == []
    assert torch.equal(pixels(found), pixels(whole)) and torch.equal(latents(found), latents(whole))


@pytest.mark.slow
def test_a_dead_worker_s_chunk_is_taken_up_again(two_processors, tmp_path, whole):
    """kill -9 of the processes that hold the actors, as soon as the first images are there."""
    killed = []

    def kill():
        while not list((tmp_path / "set").rglob("*.png")):
            time.sleep(0.002)
        for process in _workers():
            os.kill(process, signal.SIGKILL)
            killed.append(process)

    killer = threading.Thread(target=kill)
    killer.start()
    found = victim(tmp_path / "set", ray=True, workers=2)
    killer.join()
    assert killed and found.verify() == []
    assert torch.equal(pixels(found), pixels(whole))


def _workers() -> list[int]:
    """The processes of this cluster's actors: descendants of this one, named by Ray after their class."""
    parents, named = {}, []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if (entry / "cmdline").read_bytes().startswith(b"ray::_Worker"):
                named.append(int(entry.name))
        except (OSError, ValueError):  # it has ended meanwhile
            continue

    def is_ours(process: int) -> bool:
        return process == os.getpid() or (process in parents and is_ours(parents[process]))

    return [process for process in named if is_ours(process)]


def test_a_set_s_chunks_go_to_workers_that_find_their_own_batch(tmp_path, whole, monkeypatch):
    """Workers that are copies in this process: the driver holds the locks, the first one notes a batch."""
    chunks, held = [], []

    def run_all(_, work, shared, items, **options):
        for item in items:
            held.append(len(list((tmp_path / "set").rglob(".lock"))))
            worker = ray.cloudpickle.loads(ray.cloudpickle.dumps(shared))
            work(worker, item)
            chunks.append((item, worker.pace.images, DistilledSet(tmp_path / "set").manifest["batch"]))
        assert options["done"]().split(" of ")[0] == str(4 * sum(map(len, items)))

    monkeypatch.setattr(cluster, "cluster", lambda where: nullcontext(where))
    monkeypatch.setattr(cluster, "workers_of", lambda *_: (2, {}))
    monkeypatch.setattr(cluster, "run_all", run_all)
    found = victim(tmp_path / "set", ray=True, workers=2)
    assert chunks == [([0, 1, 2, 3, 4], 50, 50), ([5, 6, 7, 8, 9], 50, 50)] and held == [10, 10]
    assert found.verify() == [] and torch.equal(latents(found), latents(whole))
    again = victim(tmp_path / "part", ray=True, only=[7], batch_classes=None)
    assert again.lacking() == 36 and chunks[2:] == [([7], 50, 50)]


@pytest.mark.slow
def test_evaluation_cells_as_tasks(two_processors, one_thread, tmp_path, toy_data):
    options = dict(
        networks=["convnet1", "convnet2"],
        seeds=[0, 1],
        protocol=replace(IGD_HARD, image_size=16, epochs=2),
        device="cpu",
    )
    alone = evaluate_all(toy_data, toy_data, **options)
    spread = evaluate_all(toy_data, toy_data, ray=True, workers=2, folder=tmp_path, **options)
    assert [replace(score, seconds=0) for score in spread] == [replace(score, seconds=0) for score in alone]
    assert len(list(tmp_path.glob("*/score.json"))) == 4


@pytest.mark.slow
def test_notebooks_sample_on_a_cluster_where_one_is_named(
    two_processors, only_fashion, tmp_path, one_thread, monkeypatch
):
    """`IGD_RAY`: the same images, and they were made by workers."""
    found, chunks = {}, []
    run_all = cluster.run_all

    def seen(*given, label, **options):
        if label.startswith("distil"):
            chunks.append(given[3])
        return run_all(*given, label=label, **options)

    monkeypatch.setattr(cluster, "run_all", seen)
    for where in ("0", "1"):
        monkeypatch.setenv("IGD_RAY", where)
        monkeypatch.setenv("IGD_CACHE", str(tmp_path / where))
        made = prepare("01_nette_woof", "fashion-mnist", "smoke")
        found[where] = made.set(Method(guidance=made.scale.guidance), 0, 1)
    assert len(chunks) == 1 and sum(map(len, chunks[0])) == len(found["1"].selected)
    assert_same_pixels(found["0"], found["1"])


@pytest.mark.slow
def test_what_comes_before_and_after_sampling_are_tasks_too(
    two_processors, only_fashion, tmp_path, one_thread, monkeypatch
):
    """Surrogate, class gradients, Algorithm 2, methods by class or expert, all evaluation cells at once: the
    same results.
    """
    tasks, found, run_all = {}, {}, cluster.run_all

    def counted(*given, label, **options):
        tasks[label] = len(given[3])
        return run_all(*given, label=label, **options)

    monkeypatch.setattr(cluster, "run_all", counted)
    for where in ("0", "1"):
        monkeypatch.setenv("IGD_RAY", where)
        monkeypatch.setenv("IGD_CACHE", str(tmp_path / where))
        made = prepare("01_nette_woof", "fashion-mnist", "smoke")
        checkpoints, gradients = made.retained
        families = ("random", "rded", "dm", "d4m", "datm-plain")
        sets = made.sets([Method(family) for family in families], 1, 1)
        rows = measures.accuracy_rows(made, sets, ["convnet1", "convnet2"])
        again = measures.accuracy_rows(made, sets, ["convnet1", "convnet2"])  # read by the driver
        assert rows.equals(again)
        found[where] = (
            [value for state in checkpoints.states for value in state.values()],
            [gradients(label) for label in range(10)],
            list(made.surrogates.similarity_matrices().values()),
            [images.fetch(torch.arange(10)) for _, _, images in sets],
            [torch.tensor(rows.value.tolist())],
        )
    for alone, spread in zip(*found.values(), strict=True):
        assert len(alone) == len(spread) > 0
        assert all(torch.equal(one, other) for one, other in zip(alone, spread, strict=True))
    assert tasks == {
        "surrogate": 1,
        "Algorithm 2, class, chunk": 1,
        "class gradients, class, chunk": 2,
        "RDED, class": 10,
        "DM, class": 10,
        "D4M, class": 10,
        "DATM, expert": 2,
        "evaluate, cell": 10,
    }


def double(shared: int, item: int) -> int:
    if item < 0:
        raise ValueError(f"{item} is negative")
    return shared * item


@pytest.mark.slow
def test_results_keep_their_order_and_errors_are_the_task_s_own(two_processors):
    assert cluster.run_all(ray, double, 3, list(range(7)), workers=2) == [0, 3, 6, 9, 12, 15, 18]
    with pytest.raises(ValueError, match="-1 is negative"):
        cluster.run_all(ray, double, 3, [1, -1])


@pytest.mark.slow
def test_a_worker_without_a_place_holds_nothing_up(two_processors):
    """Another job holds one of the two processors: the worker that finds one does all."""

    @ray.remote(num_cpus=1)
    class Other:
        def here(self):
            return True

    other = Other.remote()
    assert ray.get(other.here.remote())
    try:
        assert cluster.run_all(ray, double, 3, list(range(5)), workers=2) == [0, 3, 6, 9, 12]
    finally:
        ray.kill(other)


@pytest.mark.parametrize(
    ("machines", "count", "share"),
    [([2], 2, 1), ([16], 4, 4), ([3, 3], 3, 1), ([8, 8], 3, 4), ([7, 2], 2, 3), ([2, 2, 2], 3, 2)],
)
def test_a_worker_s_processors_are_of_one_machine(machines, count, share):
    assert cluster.share_of(machines, count) == share


@pytest.mark.slow
def test_more_workers_than_processors_are_refused(two_processors):
    with pytest.raises(ValueError, match="3 workers, but the cluster has 0 GPUs and 2 processors"):
        cluster.workers_of(ray, 3)


def test_without_ray_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ImportError, match=r"the extra \[cluster\]"):
        victim(tmp_path / "set", ray=True)


def test_work_is_named_after_the_cluster_s_device(monkeypatch, toy_data):
    """A driver without a GPU finds what workers with one have made."""
    there = {"CPU": 4.0, "GPU": 2.0}
    fake = SimpleNamespace(cluster_resources=lambda: there)
    monkeypatch.setattr(cluster, "connect", lambda where: (fake, False))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    own = Surrogates(
        small_scale("fashion-mnist", "fashion-mnist", fidelity=STANDARD, ipc=10, labels="hard"),
        toy_data,
        "cpu",
    )
    own = replace(own, scale=replace(own.scale, train_images=None))
    monkeypatch.setenv("IGD_RAY", "1")
    assert cluster.device("auto", "cpu") == own._settings(None)["device"] == "cuda"
    there["GPU"] = 0.0
    assert cluster.device("auto", "cuda:0") == own._settings(None)["device"] == "cpu"
    monkeypatch.setenv("IGD_RAY", "0")
    assert cluster.device(False, "cuda:0") == "cuda" and own._settings(None)["device"] == "cpu"


def test_finished_cells_are_sent_where_the_driver_cannot_tell(monkeypatch, tmp_path, toy_data):
    """A cell's key holds a device, and its precision that device's."""
    options = dict(protocol=replace(IGD_HARD, image_size=16, epochs=1), folder=tmp_path)
    cells, sent = [(0, "convnet1", 0), (0, "convnet1", 1)], []
    first = evaluate_sets([toy_data], toy_data, cells[:1], device="cpu", **options)
    monkeypatch.setattr(cluster, "cluster", lambda where: nullcontext())
    monkeypatch.setattr(
        cluster, "run_all", lambda ray, work, shared, items, **_: sent.append(items) or ["score"] * len(items)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert evaluate_sets([toy_data], toy_data, cells, device="cpu", ray=True, **options) == [*first, "score"]
    assert evaluate_sets([toy_data], toy_data, cells, device="cuda", ray=True, **options) == ["score"] * 2
    assert sent == [cells[1:], cells]


# --- where the cluster is


@pytest.mark.parametrize(
    ("given", "found"),
    [
        *((text, False) for text in ("", "0", "false", "FALSE", "no", "off", " 0 ")),
        *((text, True) for text in ("1", "true", "True", "yes", "on")),
        *(
            (text, text)
            for text in ("auto", "local", "10.0.0.1:6379", "head:6379", "ray://head:10001", "[::1]:6379")
        ),
    ],
)
def test_igd_ray_is_read_as_it_is_meant(monkeypatch, given, found):
    monkeypatch.setenv("IGD_RAY", given)
    assert machine.ray_cluster() == found and type(machine.ray_cluster()) is type(found)


@pytest.mark.parametrize("given", ["ture", "2", "head", "http://head:6379", "head:port"])
def test_what_is_no_address_is_named(monkeypatch, given):
    monkeypatch.setenv("IGD_RAY", given)
    with pytest.raises(ValueError, match=f"HOST:PORT, got '{given}'"):
        machine.ray_cluster()


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_head_that_does_not_answer_is_named_at_once(scheme, monkeypatch):
    """Ray alone tries for minutes."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was asked"))
    with socket.socket() as closed:  # bound, so nobody else's, and not listening
        closed.bind(("127.0.0.1", 0))
        address = f"{scheme}127.0.0.1:{closed.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(ConnectionError, match=f"no Ray cluster answers at '{address}' .*IGD_RAY"):
            cluster.connect(address)
    assert time.monotonic() - began < 2


def test_a_head_that_is_silent_is_waited_for_a_few_seconds(monkeypatch):
    monkeypatch.setattr(cluster, "TIMEOUT", 0.2)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def silent(address, timeout):
        time.sleep(timeout)
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", silent)
    with pytest.raises(ConnectionError, match="no Ray cluster answers at 'head:6379' \\(timed out"):
        cluster.connect("head:6379")


@pytest.mark.parametrize(("length", "short"), [(39, False), (40, True), (90, True)])
def test_a_long_tmpdir_is_left_to_others(monkeypatch, length, short):
    """A socket's path has at most 107 bytes, 68 of them Ray's own."""
    asked = {}
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/" + "x" * (length - 1))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: asked.update(options))
    cluster.connect(True)
    assert asked.get("_temp_dir") == ("/tmp/ray" if short else None)


@pytest.mark.slow
def test_ray_starts_under_a_long_tmpdir(tmp_path):
    folder = tmp_path / ("long" * 25)
    folder.mkdir()
    source = (
        "from igd_lib.tools import cluster\nwith cluster.cluster(True) as ray: print(ray.is_initialized())"
    )
    found = subprocess.run(
        [sys.executable, "-c", source],
        env=os.environ | {"TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout.splitlines()[-1:] == ["True"], found.stderr[-2000:]

"""Many machines: chunks of work as Ray tasks on actors that hold the models (extra [cluster]).

Results are files on storage that every machine sees, so a dead actor's chunk is started again and resumes
from disk.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from igd_lib.tools import machine
from igd_lib.tools.locks import say_once
from igd_lib.tools.machine import reuse_memory

RETRIES = 5  # of an actor, and of a task on it
SAY_EVERY = 10.0  # seconds between lines of progress
TIMEOUT = 5.0  # seconds for a cluster's head to answer
USUAL = "/tmp"  # where Ray puts its files by default
MOST = 107 if sys.platform == "linux" else 103  # bytes of a socket's path
# Of what Ray adds to it.
SESSION = len("/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")


def connect(where: bool | str) -> tuple[Any, bool]:
    """Ray, on a local cluster (True) or at an address, unless connected; and whether this call did it."""
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            "Ray is not installed: it is the extra [cluster], pip install -e '.[cluster]' in a checkout"
        ) from error
    new = not ray.is_initialized()
    if new:
        # Workers import the library from wherever this program has it.
        environment = {
            "env_vars": {
                "PYTHONPATH": os.pathsep.join(
                    path for path in map(os.path.abspath, _paths()) if os.path.isdir(path)
                )
            }
        }
        address = where if isinstance(where, str) else "local"
        _check_answers(address)
        short = _short_folder() if address == "local" else None
        where_files_go: dict[str, Any] = {"_temp_dir": short} if short else {}
        try:
            ray.init(
                address=address,
                include_dashboard=False,
                log_to_driver=False,
                runtime_env=environment,
                logging_level=logging.WARNING,
                **where_files_go,
            )
        except (ConnectionError, TimeoutError) as error:
            raise ConnectionError(_NO_CLUSTER.format(address=address, error=error)) from error
    return ray, new


_NO_CLUSTER = (
    "no Ray cluster answers at {address!r} ({error}); start its head there (ray start --head), correct "
    "IGD_RAY, or set it to 1 for a cluster on this machine"
)


def _check_answers(address: str) -> None:
    """Raise ConnectionError where nothing answers at HOST:PORT within TIMEOUT: Ray would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():  # "auto", "local"
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=TIMEOUT).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(_NO_CLUSTER.format(address=address, error=error)) from error


def _short_folder() -> str | None:
    """Ray's usual folder where the temporary one's path is too long for its sockets, else None."""
    base = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or USUAL
    if len(os.fsencode(base)) + SESSION <= MOST:
        return None
    say_once(f"TMPDIR ({base}) is too long a path for Ray's sockets: its files are in {USUAL}/ray")
    return f"{USUAL}/ray"


@contextmanager
def cluster(where: bool | str):
    """Ray as `connect` gives it; where it connected, for this block alone."""
    ray, new = connect(where)
    try:
        yield ray
    finally:
        if new:
            ray.shutdown()


def _paths() -> list[str]:
    return [path or "." for path in sys.path]


def workers_of(ray: Any, workers: int | None) -> tuple[int, dict[str, float]]:
    """How many actors, and what each asks for: a GPU if there are some, else an equal share of processors.

    workers: so many; None: one a GPU, or one for every two processors. Raises ValueError for more than there
    are GPUs or processors.
    """
    there = ray.cluster_resources()
    gpus, cpus = int(there.get("GPU", 0)), int(there.get("CPU", 1))
    count = workers or gpus or max(1, cpus // 2)
    if count < 1 or count > (gpus or cpus):
        raise ValueError(f"{count} workers, but the cluster has {gpus} GPUs and {cpus} processors")
    if gpus:
        return count, {"num_gpus": 1, "num_cpus": 1}
    machines = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return count, {"num_cpus": share_of(machines, count)}


def device(where: bool | str, here: str) -> str:
    """The kind of device that work is done on: the cluster's where there is one, whatever the driver has."""
    if not where:
        return torch.device(here).type
    with cluster(where) as ray:
        return "cuda" if ray.cluster_resources().get("GPU") else "cpu"


def share_of(machines: Sequence[int], count: int) -> int:
    """The most processors for each of `count` workers, none on two of the `machines`; at least 1."""
    return next(
        (
            share
            for share in range(sum(machines) // count, 1, -1)
            if sum(own // share for own in machines) >= count
        ),
        1,
    )


def run_all(
    ray: Any,
    work: Callable[..., Any],
    shared: Any,
    items: Sequence[Any],
    *,
    workers: int | None = None,
    label: str = "chunks",
    done: Callable[[], str] | None = None,
) -> list[Any]:
    """`work(shared, item)` for every item on actors that hold `shared`; the results in the items' order.

    done: says how far the whole job is, for the driver's lines of progress. Only workers that have started
    get work, so one that finds no place (another job holds the GPU) holds nothing up. A task whose actor died
    is run again, up to RETRIES times; what a task itself raises is raised here.
    """
    count, share = workers_of(ray, workers)
    held = ray.put((work, shared))
    # No more than here: sums depend on it, in their last bits.
    threads = min(int(share["num_cpus"]), torch.get_num_threads())
    remote = ray.remote(max_restarts=RETRIES, max_task_retries=RETRIES, **share)(_Worker)
    count = min(count, len(items))
    actors = [remote.remote([held], threads, count) for _ in range(count)]
    results: dict[int, Any] = {}
    waiting = list(enumerate(items))
    free: list[Any] = []
    starting, running = {actor.started.remote(): actor for actor in actors}, {}
    began = said = time.monotonic()
    try:
        while len(results) < len(items):
            while waiting and free:
                (number, item), actor = waiting.pop(0), free.pop()
                running[actor.run.remote(item)] = (number, actor)
            ready, _ = ray.wait([*running, *starting], timeout=1.0)
            for reference in ready:
                if reference in starting:
                    _result(ray, reference)  # raises what the worker's start did
                    free.append(starting.pop(reference))
                    continue
                number, actor = running.pop(reference)
                results[number] = _result(ray, reference)
                free.append(actor)
            if time.monotonic() - said >= SAY_EVERY and not os.environ.get("IGD_QUIET"):
                said = time.monotonic()
                there = f"{len(actors) - len(starting)} of {len(actors)} workers"
                print(
                    f"{label}: {len(results)}/{len(items)}{', ' + done() if done else ''}, "
                    f"{said - began:.0f} s, {there}",
                    flush=True,
                )
    finally:
        for actor in actors:
            ray.kill(actor)
    return [results[number] for number in range(len(items))]


def _result(ray: Any, reference: Any) -> Any:
    """A task's result; its own error rather than Ray's wrapping of it."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error


class _Worker:
    """An actor: the work and what it needs, on its GPU where it has one."""

    def __init__(self, held: list[Any], threads: int, workers: int):
        import ray

        torch.set_num_threads(threads)
        machine.SHARED_BY = workers
        self.work, self.shared = ray.get(held[0])
        if torch.cuda.is_available() and hasattr(self.shared, "to"):
            self.shared = self.shared.to("cuda")
        elif not torch.cuda.is_available():
            reuse_memory()

    def started(self) -> None:
        """Answers once there is a worker."""

    def run(self, item: Any) -> Any:
        return self.work(self.shared, item)

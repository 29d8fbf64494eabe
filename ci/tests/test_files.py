"""Files are whole or absent, and training states bring a run back exactly."""

import copy
import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from igd_lib.tools import files, locks


def everything_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


@pytest.mark.parametrize(
    "content", [b"new", "new", lambda path: path.write_text("new")], ids=["bytes", "text", "function"]
)
def test_write_replaces_the_old_content(tmp_path, content):
    target = tmp_path / "folder" / "file.txt"
    target.parent.mkdir()
    target.write_text("old, and longer")
    assert files.write(target, content) == target
    assert target.read_text() == "new"
    assert everything_in(tmp_path) == ["file.txt", "folder"]
    assert target.stat().st_mode & 0o777 == 0o644  # mkstemp's 0600 would lock out a group


def test_write_makes_the_folders(tmp_path):
    assert files.write(tmp_path / "a" / "b" / "c", "x").read_text() == "x"


@pytest.mark.parametrize(
    "error", [RuntimeError("half way"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")]
)
def test_a_failing_writer_keeps_the_old_content(tmp_path, error):
    target = tmp_path / "file"
    target.write_text("old")

    def writer(path):
        path.write_text("ne")
        raise error

    with pytest.raises(type(error)):
        files.write(target, writer)
    assert target.read_text() == "old"
    assert everything_in(tmp_path) == ["file"]


@pytest.mark.parametrize("where", ["fsync", "write_bytes"])
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch, where):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full) if where == "fsync" else monkeypatch.setattr(
        Path, "write_bytes", full
    )
    with pytest.raises(OSError, match=r"cannot write .*file: No space left") as caught:
        files.write(tmp_path / "file", b"content")
    assert caught.value.errno == errno.ENOSPC
    assert everything_in(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="cannot write .*choose another folder"):
        files.write(tmp_path / "file" / "inside", "x")


def test_tensors_round_trip_with_metadata(tmp_path):
    tensors = {
        "a": torch.randn(2, 3).half(),
        "b/c": torch.arange(6).reshape(2, 3).T,  # not contiguous
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "grad": torch.ones(2, requires_grad=True),
    }
    tensors |= {f"more{number}": torch.zeros(1) for number in range(9, 0, -1)}  # enough to have an order
    path = files.save_tensors(tmp_path / "x.safetensors", tensors, step=3, note=["é", None])
    found, metadata = files.load_tensors(path)
    assert metadata == {"step": 3, "note": ["é", None]}
    assert found.keys() == tensors.keys() and list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor.detach())


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_a_damaged_file_is_named(tmp_path, damage):
    path = files.save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(100)})
    raw = path.read_bytes()
    path.write_bytes({"cut": raw[:-50], "garbage": b"\xff" * 100, "empty": b""}[damage])
    with pytest.raises(ValueError, match=r"x\.safetensors is damaged.*run again"):
        files.load_tensors(path)


# --- training states


def parts(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    average = copy.deepcopy(model)
    return model, average, torch.optim.AdamW(model.parameters(), lr=0.01)


def train(model, average, optimizer, steps):
    for step in steps:
        inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        loss = model(inputs).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for ours, theirs in zip(average.parameters(), model.parameters(), strict=True):
            ours.data.lerp_(theirs.data, 0.1)


def test_resumed_training_equals_uninterrupted_training(tmp_path):
    model, average, optimizer = parts()
    train(model, average, optimizer, range(6))

    first = parts()
    train(*first, range(3))
    files.save_training(tmp_path / "state", 3, first[2], model=first[0], average=first[1])
    second = parts(seed=1)  # other weights, all of which must be replaced
    step = files.load_training(tmp_path / "state", second[2], model=second[0], average=second[1])["step"]
    assert step == 3
    train(*second, range(step, 6))
    for ours, theirs in ((second[0], model), (second[1], average)):
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name


def test_no_training_state_starts_at_zero(tmp_path):
    model, _, optimizer = parts()
    assert files.load_training(tmp_path / "none", optimizer, model=model) == {"step": 0}


def test_a_digest_sees_the_smallest_change_in_any_type():
    state = {"a": torch.ones(3, 2), "b": torch.tensor(5), "c": torch.ones(2, dtype=torch.bfloat16)}
    digests = {files.digest(state)}
    for name in state:
        changed = {key: value.clone() for key, value in state.items()}
        changed[name].view(-1)[-1] += 1e-2 if name != "b" else 1
        digests.add(files.digest(changed))
    assert len(digests) == 4 and files.digest({key: value.clone() for key, value in state.items()}) in digests
    assert files.digest({**state, "a": state["a"] + 1e-7}) not in digests


def test_the_first_difference_is_named():
    old = {"a": {"b": [1, 2]}, "c": 3, "more": 0}
    assert files.difference(old, {"c": 3}) is None  # keys that only the old has do not count at the top
    assert files.difference(old, {"a": {"b": [1, 5]}}) == "a.b[1] = 2, wanted 5"
    assert files.difference(old, {"a": {}}) == "a.b = [1, 2], wanted None"
    assert files.difference(old, {"a": {"b": [1]}}) == "a.b = [1, 2], wanted [1]"


# --- locks

HOLDER = """
import sys, time
from igd_lib.tools import files
with files.locked(sys.argv[1], "a run", name=sys.argv[2]):
    print("held", flush=True)
    time.sleep(float(sys.argv[3]))
"""


def test_waiting_for_another_process_is_said(tmp_path, capsys, monkeypatch):
    """And a lock of another name in the folder is another lock."""
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    command = [sys.executable, "-c", HOLDER, str(tmp_path), ".part.lock", "1.0"]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with (
        files.locked(tmp_path, "a run"),
        pytest.raises(BlockingIOError, match=f"a run .process {holder.pid}"),
    ):
        files.locked(tmp_path, "a run", name=".part.lock").__enter__()
    assert capsys.readouterr().out == ""
    began = time.monotonic()
    with files.locked(tmp_path, "a run", wait=True, name=".part.lock"):
        assert time.monotonic() - began > 0.1
    said = capsys.readouterr().out
    assert said.startswith(f"waiting for a run (process {holder.pid} on ") and str(tmp_path) in said
    assert holder.wait() == 0 and list(tmp_path.iterdir()) == []


# --- locks where there is no flock

KILLED = """
import errno, fcntl, os, signal, sys
def flock(*_):
    raise OSError({number}, "no flock")
fcntl.flock = flock
from igd_lib.tools import files
with files.locked(sys.argv[1], "a run"):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(params=[errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK], ids=errno.errorcode.get)
def no_flock(request, monkeypatch) -> int:
    def flock(file, operation):
        if not str(os.readlink(f"/proc/self/fd/{getattr(file, 'fileno', lambda: file)()}")).startswith(LOCAL):
            raise OSError(request.param, os.strerror(request.param))
        return real(file, operation)

    real = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(locks, "_said", set())
    return request.param


LOCAL = str(Path(tempfile.gettempdir()) / "igd-")  # a disk of this machine has flock


def test_without_flock_a_killed_run_s_lock_is_taken_over(tmp_path, no_flock, capsys):
    """A soft lock of a process that was killed would be there for ever."""
    killed = subprocess.run(
        [sys.executable, "-c", KILLED.format(number=no_flock), str(tmp_path)], env=os.environ, check=False
    )
    left = tmp_path / files.LOCK
    assert killed.returncode == -signal.SIGKILL and "process " in left.read_text()
    for _ in range(2):
        held = rf"a run \(process {os.getpid()} on .*delete .*\.lock"
        with files.locked(tmp_path, "a run"), pytest.raises(BlockingIOError, match=held):
            files.locked(tmp_path, "a run").__enter__()
        assert not left.exists()
    assert capsys.readouterr().out.count("no flock") == 1


@pytest.mark.parametrize("holder", ["process 999999999 on another machine\n1 pid:[1]\n", ""])
def test_without_flock_another_machine_s_lock_says_what_to_delete(tmp_path, no_flock, holder):
    """Whether it has ended cannot be known here."""
    left = tmp_path / files.LOCK
    left.write_text(holder)
    with pytest.raises(BlockingIOError, match=r"if that has ended, delete .*/\.lock \(its file system"):
        files.locked(tmp_path, "a run").__enter__()
    assert left.read_text() == holder
    left.unlink()
    with files.locked(tmp_path, "a run"):
        assert locks.has_ended(left.read_text()) is False
    assert not left.exists()


def test_without_flock_a_number_that_is_another_process_s_by_now_is_no_holder(tmp_path, no_flock):
    first, second = locks.me().splitlines()
    (tmp_path / files.LOCK).write_text(f"{first}\n1{second}\n")  # started at another time
    with files.locked(tmp_path, "a run"):
        pass


def test_without_flock_a_run_can_wait_for_another(tmp_path, no_flock):
    order = []

    def second():
        with files.locked(tmp_path, "a run", wait=True):
            order.append("second")

    with files.locked(tmp_path, "a run"):
        other = threading.Thread(target=second)
        other.start()
        time.sleep(0.3)
        order.append("first")
    other.join(10)
    assert order == ["first", "second"]


# --- text of other systems


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_is_read_as_its_mark_says(tmp_path, encoding):
    (tmp_path / "names").write_bytes("chien\nbébé\r\n".encode(encoding))
    assert files.text(tmp_path / "names") == "chien\nbébé\r\n"


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16-le"])
def test_text_of_an_unknown_encoding_is_named_with_its_line(tmp_path, encoding):
    content = "chien\nbébé\n" if encoding == "latin-1" else "bébé\n"
    (tmp_path / "names").write_bytes(content.encode(encoding))
    line = 2 if encoding == "latin-1" else 1
    with pytest.raises(ValueError, match=f"names, line {line} .*save the file as UTF-8"):
        files.text(tmp_path / "names")

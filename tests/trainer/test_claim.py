"""One process at a time writes into a folder, with real processes: two at once, a killed one, a suspended one, another
host's.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from typer.testing import CliRunner

from ipadapter_trainer.cli import app
from ipadapter_trainer.errors import ConfigError, DiskError, InUseError
from ipadapter_trainer.evaluation.evaluate import evaluate
from ipadapter_trainer.runtime import folder_lock
from ipadapter_trainer.runtime.folder_lock import LOCK, NOTE, lock_folder
from ipadapter_trainer.settings.eval_config import EvalConfig

from .warm_python import WarmPython, process_environment

LIFETIME, HEARTBEAT = 2.0, 0.2

HOLDER = f"""
import os, sys
from pathlib import Path
from ipadapter_trainer.runtime import folder_lock
folder_lock.LIFETIME, folder_lock.HEARTBEAT = {LIFETIME}, {HEARTBEAT}
with folder_lock.lock_folder(Path(sys.argv[1])) as check:
    print("claimed", os.getpid(), flush=True)
    for line in sys.stdin:
        check()
"""


class Owner:
    """A process that holds a folder until its input ends. `pid` is its own, not that of who started it."""

    def __init__(self, started: subprocess.Popen[str]) -> None:
        self.started = started
        assert started.stdout is not None
        word, pid = started.stdout.readline().split()
        assert word == "claimed"
        self.pid = int(pid)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


Holder = Callable[[Path], Owner]


@pytest.fixture(autouse=True)
def _short_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "LIFETIME", LIFETIME)
    monkeypatch.setattr(folder_lock, "HEARTBEAT", HEARTBEAT)


@pytest.fixture
def holder(warm_python: WarmPython) -> Iterator[Holder]:
    """Starts owners."""
    started: list[subprocess.Popen[str]] = []

    def start(folder: Path) -> Owner:
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [warm_python.executable, "-c", HOLDER, str(folder)],
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            text=True,
            env=process_environment(),
        )
        started.append(process)
        return Owner(process)

    yield start
    for process in started:
        process.kill()
        process.communicate()


def left_by(folder: Path, **changes: str) -> None:
    """The lock of an owner that did not release it, with lines of it changed."""
    with lock_folder(folder):
        text, note = (folder / LOCK).read_text(), (folder / NOTE).read_text()
    lines = dict(line.partition("=")[::2] for line in text.splitlines())
    lines |= changes
    (folder / LOCK).write_text("".join(f"{k}={v}\n" if v else f"{k}\n" for k, v in lines.items()))
    (folder / NOTE).write_text(note)


def test_the_second_of_two_is_refused_until_the_first_ends(tmp_path: Path, holder: Holder) -> None:
    folder = tmp_path / "runs" / "mine"
    first = holder(folder)
    with pytest.raises(InUseError) as refused, lock_folder(folder):
        pass
    owner = f"process {first.pid} on {socket.gethostname()} since 20"
    assert str(refused.value).startswith(f"{folder} is in use by {owner}")
    assert "choose another folder" in str(refused.value)
    assert first.started.poll() is None
    first.started.communicate()  # its input ends
    assert first.started.returncode == 0
    assert not folder.exists()  # it was made for the claim, and nothing was written
    said: list[str] = []
    with lock_folder(folder, said.append):
        pass
    assert said == []


def test_a_killed_owner_is_replaced_at_once(tmp_path: Path, holder: Holder) -> None:
    first = holder(tmp_path)
    first.send_signal(signal.SIGKILL)
    first.started.wait()
    said: list[str] = []
    start = time.monotonic()
    with lock_folder(tmp_path, said.append):
        assert time.monotonic() - start < LIFETIME
        assert f"process {os.getpid()} on" in (tmp_path / NOTE).read_text()
    assert len(said) == 1
    assert f"was claimed by process {first.pid} on" in said[0]
    assert said[0].endswith("did not end properly: taking over.")
    assert list(tmp_path.iterdir()) == []


def test_a_process_id_that_belongs_to_another_process_by_now_is_no_owner(tmp_path: Path) -> None:
    left_by(tmp_path, pid=str(os.getpid()), start="12345")
    start = time.monotonic()
    with lock_folder(tmp_path):
        assert time.monotonic() - start < LIFETIME


def test_an_owner_on_another_host_that_stopped_is_replaced_after_its_lifetime(tmp_path: Path) -> None:
    left_by(tmp_path, host="a-node-that-died", pid="1")
    said: list[str] = []
    start = time.monotonic()
    with lock_folder(tmp_path, said.append):
        assert time.monotonic() - start >= LIFETIME
    assert "Checking whether it still runs (at most 2 seconds)" in said[0]
    assert said[1].endswith("taking over.")


def test_an_owner_on_another_host_that_lives_is_left_alone(tmp_path: Path) -> None:
    left_by(tmp_path, host="a-node-at-work", pid="1")
    (tmp_path / NOTE).write_text("process 1 on a-node-at-work since 2026-01-01 12:03\n")
    done = Event()

    def live() -> None:
        while not done.wait(HEARTBEAT):
            os.utime(tmp_path / LOCK)

    thread = Thread(target=live)
    thread.start()
    try:
        with (
            pytest.raises(InUseError, match="by process 1 on a-node-at-work since 2026-01-01 12:03"),
            lock_folder(tmp_path),
        ):
            pass
    finally:
        done.set()
        thread.join()
    assert "a-node-at-work" in (tmp_path / LOCK).read_text()


def test_a_suspended_owner_learns_that_it_was_replaced(tmp_path: Path, holder: Holder) -> None:
    first = holder(tmp_path)
    first.send_signal(signal.SIGSTOP)
    with lock_folder(tmp_path) as check:
        first.send_signal(signal.SIGCONT)
        time.sleep(5 * HEARTBEAT)  # it notices with its next touches
        _, err = first.started.communicate("a step\n", timeout=60)
        assert first.started.returncode == 1
        assert f"{tmp_path} was taken over by process {os.getpid()} on" in err
        check()
        assert (tmp_path / LOCK).exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_it_is_released_however_the_work_ends(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), lock_folder(tmp_path / "output"):
        (tmp_path / "output" / "a file").touch()
        raise error
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["a file"]


def test_a_place_where_nothing_can_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is a file"), lock_folder(tmp_path / "file"):
        pass
    with pytest.raises(DiskError, match=r"inside: Not a directory\. Check the disk and the path\."):  # noqa: SIM117
        with lock_folder(tmp_path / "file" / "inside"):
            pass


@pytest.mark.parametrize("command", [("train",), ("train", "--dry-run"), ("cache",)], ids=" ".join)
def test_every_command_that_writes_is_refused(
    command: tuple[str, ...], settings: dict[str, Any], tmp_path: Path
) -> None:
    held = tmp_path / "held"
    name = "cache" if command == ("cache",) else "output"
    arguments = [f"{key}={value}" for key, value in {**settings, name: held}.items()]
    with lock_folder(held):
        result = CliRunner().invoke(app, [command[0], *arguments, *command[1:]])
    assert result.exit_code == 2
    assert f"ipadapter: {held} is in use by process {os.getpid()} on" in result.stderr
    assert not held.exists()


def test_an_evaluation_is_refused(tmp_path: Path) -> None:
    held, nothing = tmp_path / "held", tmp_path / "nothing"
    with lock_folder(held), pytest.raises(InUseError, match=f"{held} is in use by process {os.getpid()} on"):
        evaluate(EvalConfig(base_model=nothing, adapter=nothing, data=nothing, clip=nothing, output=held))


def test_the_processes_of_one_launch_share_a_claim_and_a_refusal(
    tmp_path: Path, holder: Holder, warm_python: WarmPython
) -> None:
    """The main process takes it; a refusal ends them all, and none waits for the others."""
    script = tmp_path / "launched.py"
    script.write_text(
        HOLDER.replace('"claimed", os.getpid()', '"worked"').replace("for line in sys.stdin:", "if True:")
    )
    python = str(warm_python.executable)
    # PYTHON_EXEC is the Python of the workers.
    environment = {**process_environment(), "CUDA_VISIBLE_DEVICES": "", "PYTHON_EXEC": python}
    launch = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]

    def launched(folder: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*launch, str(folder)], env=environment, capture_output=True, text=True, check=False)

    worked = launched(tmp_path / "free")
    assert (worked.returncode, worked.stdout.count("worked")) == (0, 2), worked.stderr[-2000:]
    assert not (tmp_path / "free").exists()
    first = holder(tmp_path / "held")
    refused = launched(tmp_path / "held")
    assert refused.returncode != 0
    assert "worked" not in refused.stdout
    assert f"is in use by process {first.pid} on" in refused.stderr

"""A lock, so that only one process at a time writes into a folder: the output of a training, a cache, an evaluation.

The lock is filelock's lease: a file that its owner touches every few seconds. It does not need the file system's own
locks, so it works on NFS and Lustre. If the owner ran on this machine and has ended, the lock is taken over at once. An
owner on another machine or in another container counts as ended when its file has not changed for `LIFETIME`; so a
requeued job can start after its node died.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import LeaseSettingsMismatch, SoftFileLease, Timeout

from ..errors import ConfigError, InUseError, TrainerError
from .disk import disk_errors
from .processes import disconnect_at_exit, launched_on_cpu

LOCK, NOTE = ".in-use.lock", ".in-use.txt"  # the note describes the owner, for messages
LIFETIME = 120.0  # seconds; longer than usual pauses of a file server
HEARTBEAT = 5.0  # seconds between two touches; so long does it take to see that an owner is alive

Say = Callable[[str], None]


@contextmanager
def lock_folder(folder: Path, say: Say = lambda line: None) -> Iterator[Callable[[], None]]:
    """Lock `folder`. It is created if missing, and removed again if it stays empty. The main process of a launch holds
    the lock for all its processes.

    Yields a function that raises InUseError if another process took over the folder, which happens if this one was
    suspended for longer than `LIFETIME`.

    Raises ConfigError if `folder` is a file, DiskError if it cannot be written, InUseError if another process uses it.
    """
    state = PartialState(cpu=launched_on_cpu())
    if state.num_processes > 1:
        disconnect_at_exit()
    created = [path for path in (folder, *folder.parents) if not path.exists()] if state.is_main_process else []
    lease, problems = None, list[Exception | None]([None])
    try:
        if state.is_main_process:
            try:
                lease = _acquire(folder, say)
            except TrainerError as error:
                problems = [error]
        broadcast_object_list(problems)
        if problems[0] is not None:
            raise problems[0]
        yield lambda: None if lease is None else _check(folder, lease)
    finally:
        if lease is not None:
            if lease.compromise is None:
                (folder / NOTE).unlink(missing_ok=True)
            lease.release()
        for path in created:
            with suppress(OSError):  # not empty
                path.rmdir()


def _acquire(folder: Path, say: Say) -> SoftFileLease:
    lock, note = folder / LOCK, folder / NOTE
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file. Choose a folder.")
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lease = SoftFileLease(lock, lease_duration=LIFETIME, heartbeat_interval=HEARTBEAT, thread_local=False)
        before, owner, looks = _mark(lock), _owner(folder), 0

        def owner_lives() -> bool:
            nonlocal looks
            looks += 1
            if looks == 2:
                say(f"{folder} is claimed by {owner}. Checking whether it still runs (at most {LIFETIME:.0f} seconds).")
            return _mark(lock) not in (None, before)

        try:
            lease.acquire(timeout=LIFETIME + 2 * HEARTBEAT, poll_interval=HEARTBEAT / 10, cancel_check=owner_lives)
        except (Timeout, LeaseSettingsMismatch) as error:  # mismatch: a version with another lifetime
            raise InUseError(
                f"{folder} is in use by {_owner(folder)}. Wait until it ends, stop it, or choose another folder."
            ) from error
        broken = note.exists()  # an owner that ends properly deletes it
        try:
            note.write_text(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M}\n")
        except OSError:
            lease.release()
            raise
    if before is not None and broken:
        say(f"{folder} was claimed by {owner}, which did not end properly: taking over.")
    return lease


def _check(folder: Path, lease: SoftFileLease) -> None:
    if lease.compromise is not None and lease.owner is not None and not lease.is_lock_held_by_us:
        raise InUseError(
            f"{folder} was taken over by {_owner(folder)}, because this process was suspended, or cut off from the "
            f"disk, for more than {LIFETIME:.0f} seconds. It stops without saving."
        )


def _mark(lock: Path) -> tuple[int, int] | None:
    """Modification time and inode: they change when the owner touches its lock, and with the owner."""
    try:
        status = lock.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_ino


def _owner(folder: Path) -> str:
    try:
        return (folder / NOTE).read_text().strip() or "another process"
    except OSError:
        return "another process"

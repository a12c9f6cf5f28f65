"""Python processes that have everything imported already.

A command in a process of its own imports PyTorch, diffusers and transformers for several seconds. Here one process
imports them, and every command is a fork of it. The fork is a process like any other: it has its own process group,
signals, standard streams and exit of the interpreter.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

# Importing them imports everything that the commands load.
IMPORTS = """
import matplotlib.backends.backend_svg
import matplotlib.figure
import ipadapter_trainer.cache.write
import ipadapter_trainer.cli
import ipadapter_trainer.demo.run
import ipadapter_trainer.evaluation.evaluate
import ipadapter_trainer.evaluation.generate_images
import ipadapter_trainer.files.diffusers_loader
import ipadapter_trainer.training.train
"""
# For each line of its input: a fork that forks the command, prints its process id, and writes its exit status.
SERVER = f"""
import gc, json, os, sys
{IMPORTS}
gc.freeze()  # a fork would copy these objects only to look for garbage
keepers = []
for line in sys.stdin:
    request = json.loads(line)
    keepers.append(os.fork())
    if keepers[-1]:
        continue
    command = os.fork()
    if command == 0:
        break
    os.write(1, f"{{command}}\\n".encode())
    status = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
    with open(request["status"] + ".new", "w") as stream:
        stream.write(str(status))
    os.rename(request["status"] + ".new", request["status"])
    os._exit(0)
else:
    for keeper in keepers:
        os.waitpid(keeper, 0)
    sys.exit()

os.setsid()
os.chdir(request["folder"])
os.environ.clear()
os.environ.update(request["environment"])
for number, file in enumerate((os.devnull, request["stdout"], request["stderr"])):
    opened = os.open(file, os.O_RDWR)
    os.dup2(opened, number)
    os.close(opened)
sys.argv = ["-c", *request["arguments"]]
exec(compile(request["code"], "<command>", "exec"), {{"__name__": "__main__"}})
"""


def process_environment() -> dict[str, str]:
    """The environment of a Python process that imports what this one imports."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


class WarmPython:
    """The process that is forked. It starts with the first command."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder  # for the output of the commands
        self._server: subprocess.Popen[str] | None = None
        self._started: list[WarmProcess] = []

    def start(
        self, code: str, arguments: Sequence[str | Path], environment: Mapping[str, str] | None = None
    ) -> WarmProcess:
        """`python -c code arguments`, in a process group of its own, with these variables besides those of pytest."""
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-c", SERVER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=process_environment(),
                start_new_session=True,
            )
        assert self._server.stdin is not None and self._server.stdout is not None
        name = self._folder / str(len(self._started))
        files = {of: name.with_suffix(f".{of}") for of in ("stdout", "stderr", "status")}
        for of in ("stdout", "stderr"):
            files[of].touch()
        request = {
            "code": code,
            "arguments": [str(argument) for argument in arguments],
            "environment": {**process_environment(), **(environment or {})},
            "folder": str(Path.cwd()),
            **{of: str(file) for of, file in files.items()},
        }
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        process = WarmProcess(int(self._server.stdout.readline()), **files)
        self._started.append(process)
        return process

    def launch(self, processes: int, code: str, arguments: Sequence[str | Path]) -> list[WarmProcess]:
        """Processes on the CPU that find each other by the variables that torchrun and `accelerate launch` set."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        world = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        world |= {"LOCAL_WORLD_SIZE": str(processes), "ACCELERATE_USE_CPU": "true"}
        ranks = map(str, range(processes))
        return [self.start(code, arguments, {**world, "RANK": rank, "LOCAL_RANK": rank}) for rank in ranks]

    def close(self) -> None:
        """End what still runs."""
        for process in self._started:
            process.kill()
        if self._server is not None:
            self._server.communicate()


class WarmProcess:
    """A fork, used as a `subprocess.Popen` whose output is text."""

    def __init__(self, pid: int, stdout: Path, stderr: Path, status: Path) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._stdout, self._stderr, self._status = stdout, stderr, status

    def poll(self) -> int | None:
        """The exit status; None while the process runs. That of a signal is negative."""
        if self.returncode is None and self._status.exists():
            self.returncode = int(self._status.read_text())
        return self.returncode

    def said(self) -> tuple[str, str]:
        """What it wrote to stdout and stderr so far."""
        return self._stdout.read_text(), self._stderr.read_text()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end of the process. Raises TimeoutExpired after `timeout` seconds."""
        began = time.monotonic()
        while self.poll() is None:
            if timeout is not None and time.monotonic() - began > timeout:
                raise subprocess.TimeoutExpired(str(self.pid), timeout, *self.said())
            time.sleep(0.02)
        return self.said()

    def send_signal(self, number: int) -> None:
        """Send a signal to the process alone, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process and what it has started."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)

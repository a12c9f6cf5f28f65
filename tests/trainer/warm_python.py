"""Python processes that have everything imported already.

A command in a process of its own imports PyTorch, diffusers and transformers for several seconds. Here one process
imports them, and every command is a fork of it. The fork is a process like any other: it has its own process group,
signals, standard streams and exit of the interpreter.
"""

from __future__ import annotations

import json
import os
import select
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
# Each connection asks for one command and brings the command's standard streams: the server forks a keeper, which forks
# the command, answers with its process id and, in the end, with its exit status. Who closes the connection ends it.
SERVER = f"""
import contextlib, gc, json, os, runpy, select, signal, socket, sys
{IMPORTS}
gc.freeze()  # a fork would copy these objects only to look for garbage
listener = socket.socket(fileno=int(sys.argv[1]))
while select.select([listener, sys.stdin], [], [])[0] == [listener]:
    connection, _ = listener.accept()
    if os.fork() == 0:
        break
    connection.close()
else:
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    sys.exit()

listener.close()
message, streams, _, _ = socket.recv_fds(connection, 1 << 16, 3)
while not message.endswith(b"\\n"):
    message += connection.recv(1 << 16)
command = os.fork()
if command:
    for stream in streams:
        os.close(stream)
    connection.sendall(f"{{command}}\\n".encode())
    while not (ended := os.waitpid(command, os.WNOHANG))[0]:
        if select.select([connection], [], [], 0.02)[0]:
            with contextlib.suppress(ProcessLookupError):  # before its setsid
                os.killpg(command, signal.SIGKILL)
    with contextlib.suppress(OSError):
        connection.sendall(f"{{os.waitstatus_to_exitcode(ended[1])}}\\n".encode())
    os._exit(0)

os.setsid()
connection.close()
for number, stream in enumerate(streams):
    os.dup2(stream, number)
    os.close(stream)
request = json.loads(message)
os.chdir(request["folder"])
os.environ.clear()
os.environ.update(request["environment"])
arguments = request["arguments"]
if arguments[0] == "-u":
    sys.stdout.reconfigure(write_through=True)
    del arguments[0]
if arguments[0] == "-c":
    sys.argv = ["-c", *arguments[2:]]
    exec(compile(arguments[1], "<command>", "exec"), {{"__name__": "__main__"}})
elif arguments[0] == "-m":
    sys.argv = arguments[1:]
    runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
else:
    sys.argv = arguments
    sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
    runpy.run_path(arguments[0], run_name="__main__")
"""
# What `python` is to those who start processes themselves. It hands everything on to a fork, signals as well.
EXECUTABLE = """#!{python} -IS
import json, os, signal, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
request = {{"arguments": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd()}}
socket.send_fds(connection, [json.dumps(request).encode() + b"\\n"], [0, 1, 2])
answers = connection.makefile()
command = int(answers.readline())
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: os.kill(command, number))
status = int(answers.readline())
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


def process_environment() -> dict[str, str]:
    """The environment of a Python process that imports what this one imports."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


class WarmPython:
    """The process that is forked. It starts with the first command. `environment` is what it has in its environment
    beyond `process_environment`.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self._folder = folder  # for the output of the commands
        self._address = str(folder / "socket")
        self._server: subprocess.Popen[bytes] | None = None
        self._started: list[WarmProcess] = []

    def _start_server(self) -> None:
        if self._server is not None:
            return
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self._address)
            listener.listen()
            self._server = subprocess.Popen(
                [sys.executable, "-c", SERVER, str(listener.fileno())],
                stdin=subprocess.PIPE,
                cwd=self._folder,  # else what it imports would come from the folder of pytest first
                env={**process_environment(), **self.environment},
                pass_fds=[listener.fileno()],
                start_new_session=True,
            )

    @property
    def executable(self) -> Path:
        """A file to start in place of `sys.executable`: python -c CODE, -m MODULE or a script, with -u or without."""
        self._start_server()
        file = self._folder / "python"
        if not file.exists():
            file.write_text(EXECUTABLE.format(python=sys.executable, address=self._address))
            file.chmod(0o755)
        return file

    def start(self, code: str, arguments: Sequence[str | Path], folder: Path | None = None) -> WarmProcess:
        """`python -c code arguments` in a folder, that of this process unless given; in a process group of its own."""
        self._start_server()
        request = {
            "arguments": ["-c", code, *map(str, arguments)],
            "environment": {**process_environment(), **self.environment},
            "folder": str(Path.cwd() if folder is None else folder),
        }
        name = self._folder / str(len(self._started))
        files = [name.with_suffix(f".{of}") for of in ("stdout", "stderr")]
        with Path(os.devnull).open() as nothing, files[0].open("w") as stdout, files[1].open("w") as stderr:
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(self._address)
            streams = [stream.fileno() for stream in (nothing, stdout, stderr)]
            socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], streams)
        self._started.append(WarmProcess(connection, *files))
        return self._started[-1]

    def close(self) -> None:
        """End what still runs."""
        for process in self._started:
            process.kill()
            process.communicate()
        if self._server is not None:
            self._server.communicate()


class WarmProcess:
    """A fork, used as a `subprocess.Popen` whose output is text."""

    def __init__(self, connection: socket.socket, stdout: Path, stderr: Path) -> None:
        self._connection, self._answers = connection, connection.makefile()
        self._stdout, self._stderr = stdout, stderr
        self.pid = int(self._answers.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status; None while the process runs. That of a signal is negative."""
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self.returncode = int(self._answers.readline())
            self._answers.close()
            self._connection.close()
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

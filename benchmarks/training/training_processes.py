"""A new process for every contender, in which the libraries are imported already: that takes longer than the steps that
are measured.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PRELOADED = (
    "training_preload",
    "torch",
    "diffusers",
    "diffusers.pipelines.controlnet",
    "transformers",
    "transformers.models.clip.modeling_clip",
    "accelerate",
    "torch.utils.tensorboard",
    "torchvision.transforms",
    "ipadapter_trainer.cli",
    "ipadapter_trainer.cache.write",
    "ipadapter_trainer.training.train",
    "training_child",
)
BAD_FORK = 77  # exit code: something preloaded has touched CUDA, which no forked process may use then
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asking whether there is a GPU must not touch CUDA
}
_TAIL = 25  # lines of a failed process's output that are shown
_method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


class ChildError(RuntimeError):
    """A process that failed, or was ended at its time limit; the message has the end of its output."""


def start_server() -> None:
    """Begin to import the libraries in the process that all others are forked from, without waiting for it."""
    if _method != "forkserver":
        return
    from multiprocessing import forkserver  # noqa: PLC0415 - not on Windows

    with _environment({**_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(path or os.curdir for path in sys.path)}):
        multiprocessing.get_context("forkserver").set_forkserver_preload(list(PRELOADED))
        forkserver.ensure_running()


def run_process(
    target: Callable[..., None], arguments: tuple[Any, ...], *, name: str, log: Path, device: str, threads: int = 0,
    limit: float | None = None,
) -> float:  # fmt: skip
    """Call a function of an importable module in a process of its own; returns the seconds that it took.

    What it prints goes to `log`. `threads` are torch's; 0 leaves them to PyTorch. Raises ChildError when it fails or
    takes longer than `limit` seconds; it is ended then, with the processes that it started.
    """
    global _method  # noqa: PLW0603 - once for all processes
    start_server()
    begin = time.perf_counter()
    with _environment(_ENVIRONMENT):
        context: Any = multiprocessing.get_context(_method)
        process = context.Process(
            target=_work, args=(target, arguments, str(log), device, threads, multiprocessing.get_start_method())
        )
        process.start()
    process.join(limit)
    late = process.is_alive()
    if late:
        assert process.pid is not None
        _end(process.pid)
        process.join()
    if process.exitcode == BAD_FORK and _method == "forkserver":
        print("CUDA is in use before the fork: from here on every process imports the libraries.", file=sys.stderr)
        _method = "spawn"
        return run_process(target, arguments, name=name, log=log, device=device, threads=threads, limit=limit)
    if late or process.exitcode:
        how = f"was ended after {limit:.0f} s" if late else f"ended with code {process.exitcode}"
        printed = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
        tail = "\n".join(printed.splitlines()[-_TAIL:])
        raise ChildError(f"{name} {how}:\n{tail}")
    return time.perf_counter() - begin


def _work(
    target: Callable[..., None], arguments: tuple[Any, ...], log: str, device: str, threads: int, method: str
) -> None:
    if sys.modules.get("bitsandbytes", ...) is None:
        del sys.modules["bitsandbytes"]  # see training_preload: for those who use it
    multiprocessing.set_start_method(method, force=True)  # for loaders: the usual one, not this process's own
    os.setsid()  # so that the processes it starts end with it
    with Path(log).open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", closefd=False)
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch  # noqa: PLC0415

    if device == "cuda" and torch.cuda._is_in_bad_fork():
        os._exit(BAD_FORK)
    if threads:
        torch.set_num_threads(threads)
    target(*arguments)


def _end(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:  # it has not come as far as `setsid`
        os.kill(pid, signal.SIGKILL)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

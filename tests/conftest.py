"""What all tests need: the folder `tools`, which is no package, and one thread a process; and long files first."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

# Threads of several processes (pytest -n auto, and what tests start) wait for each other; the models are tiny.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Last: ComfyUI has modules with the names of our folders.
sys.path.append(str(Path(__file__).parents[1]))

# Long files of few tests. Started last, one of them would keep a process busy while the others have nothing to do.
LONG = (
    "test_tools.py",
    "test_kills.py",
    "test_training_page.py",
    "test_wheel.py",
    "test_benchmark.py",
    "test_stack.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> None:
    """Files are taken in the order of `pytest_collection_modifyitems`, not by their number of tests alone."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In the processes of pytest-xdist: long files first, then those of many tests."""
    if hasattr(config, "workerinput"):
        counts = Counter(item.path for item in items)
        items.sort(key=lambda item: (item.path.name not in LONG, -counts[item.path]))

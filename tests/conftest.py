"""What all tests need: the folder `tools`, which is no installed package, and one thread a process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Threads of several processes (pytest -n auto, and what tests start) wait for each other; the models are tiny.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Last: ComfyUI has modules with the names of our folders.
sys.path.append(str(Path(__file__).parents[1]))

"""`tools` is no installed package; its tests, and those that make tokenizers, find it in the checkout."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # last: ComfyUI has modules with the names of our folders

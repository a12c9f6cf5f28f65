"""Imported first by the process that contenders are forked from. diffusers imports bitsandbytes if it is installed;
that must not initialise CUDA here, because then no forked process could use the GPU.
"""

import sys

sys.modules["bitsandbytes"] = None  # type: ignore[assignment] - Python's way to say that it cannot be imported

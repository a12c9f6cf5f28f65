"""Imported first by the process that contenders are forked from: there bitsandbytes, which diffusers imports where it
is installed, must not use the GPU, or no forked process could.
"""

import sys

sys.modules["bitsandbytes"] = None  # type: ignore[assignment] - Python's way to say that it cannot be imported

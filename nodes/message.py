"""A text on the node that runs, and advanced inputs, which newer versions of ComfyUI collapse."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from comfy_api.latest import io

_HAS_ADVANCED = "advanced" in inspect.signature(io.WidgetInput.__init__).parameters


def advanced() -> dict[str, Any]:
    """Arguments of an advanced input, where this ComfyUI supports it."""
    return {"advanced": True} if _HAS_ADVANCED else {}


def show_on_node(cls: type[io.ComfyNode], text: str) -> None:
    """Show a text on the node that runs. (ui.PreviewText only stores it in the history, for Preview Any.)"""
    # Not imported: a host that runs the nodes without ComfyUI's server has none.
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    node = getattr(getattr(cls, "hidden", None), "unique_id", None)
    if server is not None and node:
        server.send_progress_text(text, node)

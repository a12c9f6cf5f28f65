"""What a node shows of its own run, and inputs that newer versions of ComfyUI fold away."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from comfy_api.latest import io

_KNOWS_ADVANCED = "advanced" in inspect.signature(io.WidgetInput.__init__).parameters


def advanced() -> dict[str, Any]:
    """Arguments that fold an input away, where ComfyUI knows how."""
    return {"advanced": True} if _KNOWS_ADVANCED else {}


def show_on_node(cls: type[io.ComfyNode], text: str) -> None:
    """Show a text on the node that runs. ui.PreviewText alone is drawn by Preview Any only: it keeps the text in the
    history, this draws it.
    """
    # Not imported: a host that runs the nodes without ComfyUI's server has none.
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    node = getattr(getattr(cls, "hidden", None), "unique_id", None)
    if server is not None and node:
        server.send_progress_text(text, node)

"""Adapters with names like those of an IP-Adapter that are none for a UNet: what they are, and what to do."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

from .errors import AdapterError


class _Foreign(NamedTuple):
    pattern: str
    name: str
    advice: str


# By tensor names that only these files have; the first match wins.
_FOREIGN = (
    _Foreign(
        r"^style_image_proj_modules\.",
        "a StyleShot adapter",
        "It needs StyleShot's own style encoder: use StyleShot's nodes, or an IP-Adapter with the weight type 'style "
        "transfer'.",
    ),
    _Foreign(
        r"^content_image_proj\.|^style_image_proj\.|\.to_[kv]_ip_(content|style)\.",
        "a CSGO adapter",
        "It has separate layers for content and style: use CSGO's nodes, or an SDXL IP-Adapter with the weight type "
        "'style and composition'.",
    ),
    _Foreign(
        r"^(image_proj|image_proj_model)\.proj_new_input\.",
        "an IPAdapter-Instruct adapter",
        "It takes an instruction beside the image: use IPAdapter-Instruct's nodes, or a plus adapter.",
    ),
    _Foreign(
        r"^(pulid_|id_adapter)|^ip_adapter\.id_adapter",
        "a PuLID adapter",
        "Use PuLID's nodes, or a FaceID adapter.",
    ),
    _Foreign(
        r"^ip_adapter_proj_model\.|^double_blocks\.\d+\.processor\.",
        "an XLabs IP-Adapter for FLUX",
        "It fits no UNet: use XLabs' nodes with FLUX, or an adapter for SD1.5 or SDXL.",
    ),
    _Foreign(
        r"^ip_adapter\.\d+\.norm_ip\.|^image_proj\.time_embedding\.",
        "an InstantX IP-Adapter for SD3.5",
        "It fits no UNet: use the SD3.5 nodes that it was published for, or an adapter for SD1.5 or SDXL.",
    ),
    # Adapters for a UNet number their layers 1, 3, 5, ...
    _Foreign(
        r"^ip_adapter\.0\.to_[kv]_ip\.",
        "an IP-Adapter for FLUX or another diffusion transformer (its layers are numbered 0, 1, 2, ...)",
        "It fits no UNet: use nodes for that model, or an adapter for SD1.5 or SDXL.",
    ),
)


def foreign_adapter(names: Collection[str]) -> str | None:
    """The name of another kind of adapter with these tensors, such as "a StyleShot adapter"; None if unknown."""
    found = _find(names)
    return None if found is None else found.name


def refuse_foreign(names: Collection[str], origin: str) -> None:
    """Raises AdapterError for an adapter that is no IP-Adapter for a UNet; `origin` names the file."""
    found = _find(names)
    if found is not None:
        raise AdapterError(f"{origin}: {found.name}, not an IP-Adapter for a UNet. {found.advice}")


def _find(names: Collection[str]) -> _Foreign | None:
    return next((entry for entry in _FOREIGN if any(re.search(entry.pattern, name) for name in names)), None)

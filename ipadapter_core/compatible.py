"""Refuse a wrong pairing of adapter and model before sampling."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import AdapterError
from .layers import Site
from .spec import FAMILY_NAMES, AdapterSpec, family_of


def check_compatible(spec: AdapterSpec, sites: Sequence[Site], name: str = "The adapter") -> None:
    """Check that an adapter fits a model's cross-attention sites (in id order); `name` is the file's, for
    the message.

    Raises AdapterError such as "ip-adapter_sdxl is made for SDXL (context 2048); the connected model is
    SD1.5 (768)."
    """
    widths = tuple(site.width for site in sites)
    context = sites[0].context_width if sites else 0
    if widths == spec.layer_widths and context == spec.context_width:
        return
    if context == spec.context_width and len(widths) == len(spec.layer_widths):
        at = next(i for i, (a, b) in enumerate(zip(widths, spec.layer_widths, strict=True)) if a != b)
        raise AdapterError(
            f"{name} is made for another width: its layer {2 * at + 1} is {spec.layer_widths[at]} wide, the connected "
            f"model's {widths[at]}. Use an adapter made for this model."
        )
    family = family_of(context, widths)
    model = FAMILY_NAMES.get(family, "another model")
    detail = f"context {spec.context_width}, {len(spec.layer_widths)} layers"
    use = f"Use an {FAMILY_NAMES[family]} adapter." if family in FAMILY_NAMES else "Use an adapter made for this model."
    raise AdapterError(
        f"{name} is made for {spec.family_name} ({detail}); the connected model is {model} ({context}, {len(widths)} "
        f"layers). {use}"
    )

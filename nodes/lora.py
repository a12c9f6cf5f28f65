"""The LoRA inside a FaceID file, as weight patches that ComfyUI manages."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from comfy.weight_adapter import LoRAAdapter

from ..ipadapter_core import AdapterError, Site
from ..ipadapter_core.lora import LORA_PARTS
from .types import LoadedAdapter

# Trained at 1. With less, the model follows the text better and keeps the face; other hosts have 0.6 as default too.
LORA_STRENGTH = 0.6


def add_lora(model: Any, ip_adapter: LoadedAdapter, sites: Sequence[Site], strength: float) -> None:
    """Patch the attention weights of a new clone of a model; nothing for an adapter without LoRA, or strength 0.

    The LoRA of a file is added once, however many prompts of the file a model has, with the largest of their strengths.
    """
    if not math.isfinite(strength):
        raise AdapterError(f"lora_strength is {strength}. Choose a number from 0 to 2; 0 switches the LoRA off.")
    if ip_adapter.lora is None or strength == 0.0:
        return
    source = f"LoRA of {ip_adapter.name}"  # a later prompt of the same file finds these patches by it
    patches: dict[str, LoRAAdapter] = {}
    for site in sites:
        block = site.name.removesuffix(".attn2")
        for attention, id in (("attn1", site.id - 1), ("attn2", site.id)):
            for part in LORA_PARTS:
                update: Any = ip_adapter.lora.part(id, part)
                layer = "to_out.0" if part == "to_out" else part
                # up, down, then what this LoRA has not: alpha, mid, DoRA scale, new shape.
                weights = (update.up.weight.detach(), update.down.weight.detach(), None, None, None, None)
                patches[f"diffusion_model.{block}.{attention}.{layer}.weight"] = LoRAAdapter({source}, weights)
    strength = max([strength, *_take_out(model, source, patches)])
    before = model.patches_uuid
    missing = set(patches) - set(model.add_patches(patches, strength))
    if missing:
        raise AdapterError(
            f"{ip_adapter.name} holds a LoRA for {len(patches)} weights, the model has no {sorted(missing)[0]}. Set "
            "lora_strength to 0 to use the adapter without it."
        )
    # The same patches have the same name, or ComfyUI would patch all weights again when only the prompt has changed.
    model.patches_uuid = uuid.uuid5(before, f"{ip_adapter.patcher.patches_uuid} {strength}")


def _take_out(model: Any, source: str, keys: Iterable[str]) -> list[float]:
    """Remove the patches of an earlier prompt of the same file, and return their strengths."""
    strengths: list[float] = []
    for key in keys:
        kept = []
        for patch in model.patches.get(key, []):
            if source in getattr(patch[1], "loaded_keys", ()):
                strengths.append(patch[0])
            else:
                kept.append(patch)
        if key in model.patches:
            model.patches[key] = kept
    return strengths

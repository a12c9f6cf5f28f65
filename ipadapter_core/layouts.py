"""The key layouts of IP-Adapter files, and the key signatures of other model files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .errors import AdapterError
from .foreign import foreign_adapter, refuse_foreign
from .layers import attention_ids

# The published prefix is first: it is used where a file has the weights under both (NoobAI's MARK1).
IMAGE_PROJ_PREFIXES = ("image_proj.", "image_proj_model.")
IP_ADAPTER_PREFIXES = ("ip_adapter.", "adapter_modules.")
_ADAPTER_TENSOR = re.compile(r"to_([kv]_ip|(q|k|v|out)_lora\.(down|up))\.weight$")
_ATTENTION = re.compile(r"^(?:unet\.)?((?:down_blocks|up_blocks|mid_block)\..*?attn[12])\.")

_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:module|_orig_mod)\.")

FULL_CHECKPOINT = "a full checkpoint"
# What a file looks like, by key patterns; the first match wins.
_OTHER_FILES: tuple[tuple[str, str], ...] = (
    (r"^(image_proj|ip_adapter)\.", "an IP-Adapter"),
    (r"(^|\.)joint_blocks\.", "a Stable Diffusion 3 model"),
    (r"(^|\.)double_blocks\..*img_attn", "a FLUX model"),
    (r"^edm_mean$", "a Playground v2.5 model"),
    (
        r"^control_model\.|controlnet_cond_embedding\.|input_hint_block\.|controlnet_down_blocks\.",
        "a ControlNet",
    ),
    (  # before LoRA: a checkpoint may have LoRA tensors besides its own weights
        r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\.(?!.*lora).*\.weight$",
        FULL_CHECKPOINT,
    ),
    (r"lora_up|lora_down|\.lora_A\.|\.lora_B\.|^lora_unet_|_lora\.(down|up)\.weight$", "a LoRA"),
    (r"^down_blocks\..*attn2\.to_k\.|^input_blocks\.\d+", "a UNet"),
    (r"^double_blocks\.|^joint_blocks\.|^transformer_blocks\.", "a diffusion transformer"),
    (r"^vision_model\.|^visual\.|^visual_projection", "an image encoder (CLIP vision)"),
    (r"^text_model\.|^transformer\.text_model|^embeddings\.token_embedding", "a text encoder"),
    (r"^encoder\.conv_in\.|^decoder\.conv_in\.", "a VAE"),
    (r"^adapter\.body\.|^body\.\d+\.", "a T2I-Adapter"),
    (r"^emb_params$|^string_to_param|^clip_[gl]$", "a textual inversion embedding"),
)


@dataclass(frozen=True, slots=True)
class KeyPlan:
    """Published key -> key in the file, for both parts of an adapter."""

    layout: str
    image_proj: dict[str, str]
    ip_adapter: dict[str, str]


def looks_like(keys: Iterable[str]) -> str:
    """What a set of tensor names looks like, for error messages: "a LoRA", "a ControlNet", ..."""
    names = list(keys)
    foreign = foreign_adapter(names)
    if foreign is not None:
        return foreign
    for pattern, description in _OTHER_FILES:
        if any(re.search(pattern, name) for name in names):
            return description
    if not names:
        return "an empty file (no tensors)"
    return f"something unknown (its first key is {names[0]!r})"


def plan_keys(keys: Iterable[str], origin: str) -> KeyPlan:
    """Find `image_proj` and `ip_adapter` in a file's keys, in any known layout.

    Layouts: "flat" (`image_proj.*`, `ip_adapter.*`, also a nested .bin after flattening), "trainer"
    (`image_proj_model.*`, `adapter_modules.*`) and "training-dump" (the whole training state with `unet.*`, where
    keys and values may only be at `unet.<processor>.to_k_ip.weight`). The prefixes of DDP (`module.`) and
    torch.compile (`_orig_mod.`) are dropped.

    Raises AdapterError when one of the two parts is missing, or for another kind of file, which it names.
    """
    names: dict[str, str] = {}
    for key in keys:
        name = _WRAPPERS.sub("", key.removeprefix("state_dict."))
        if name in names:
            raise AdapterError(f"{origin}: {names[name]} and {key} are the same tensor {name}. Keep one of them.")
        names[name] = key
    refuse_foreign(names, origin)
    image_proj = _with_prefix(names, IMAGE_PROJ_PREFIXES)
    adapter_tensors = _with_prefix(names, IP_ADAPTER_PREFIXES)
    unet_tensors = {
        name.removeprefix("unet."): key
        for name, key in names.items()
        if name.startswith("unet.") and _ADAPTER_TENSOR.search(name)
    }
    # An old diffusers LoRA has the key names of a FaceID training dump, but no to_k_ip.
    if not image_proj and not adapter_tensors and not any("to_k_ip" in name for name in unet_tensors):
        raise AdapterError(
            f"{origin}: looks like {looks_like(names)}, not an IP-Adapter. Expected keys that start with "
            "'image_proj.' and 'ip_adapter.'. Choose an IP-Adapter file."
        )
    ip_adapter = _number_layers(unet_tensors, names, origin) | _number_layers(adapter_tensors, names, origin)
    if not ip_adapter:
        raise AdapterError(
            f"{origin}: holds an image projector of {len(image_proj)} tensors and 0 'ip_adapter' tensors: the export "
            "came out empty. Convert the training checkpoint that still has 'unet.' keys instead."
        )
    if not image_proj:
        raise AdapterError(
            f"{origin}: holds {len(ip_adapter)} 'ip_adapter' tensors and 0 'image_proj' tensors. Both parts are "
            "needed; export the adapter again with its image projector."
        )
    return KeyPlan(_layout(names), image_proj, ip_adapter)


def _with_prefix(names: dict[str, str], prefixes: tuple[str, ...]) -> dict[str, str]:
    """The tensors under the first of the prefixes that the file has."""
    prefix = next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in names)), None)
    if prefix is None:
        return {}
    return {name.removeprefix(prefix): key for name, key in names.items() if name.startswith(prefix)}


def _layout(names: dict[str, str]) -> str:
    if any(name.startswith("unet.") for name in names):
        return "training-dump"
    published = all(any(name.startswith(prefix) for name in names) for prefix in ("image_proj.", "ip_adapter."))
    return "flat" if published else "trainer"


def _number_layers(found: dict[str, str], names: dict[str, str], origin: str) -> dict[str, str]:
    """Replace processor names by ids ("down_blocks...attn2.processor" -> "1") and "001" by "1"."""
    numbered: dict[str, str] = {}
    ids: dict[str, int] = {}
    for name, key in found.items():
        head, _, rest = name.partition(".")
        if head.isdecimal():
            numbered[f"{head.lstrip('0') or '0'}.{rest}"] = key
            continue
        attention = _ATTENTION.match(name)
        if attention is None or not _ADAPTER_TENSOR.search(name):
            numbered[name] = key  # infer_spec refuses it
            continue
        ids = ids or attention_ids(_attention_names(names))
        tensor = name.removeprefix(attention.group(1)).removeprefix(".processor").removeprefix(".")
        id = ids.get(attention.group(1))
        numbered[name if id is None else f"{id}.{tensor}"] = key
    if len(numbered) != len(found):
        raise AdapterError(f"{origin}: {len(found)} adapter tensors have only {len(numbered)} distinct layer ids.")
    return numbered


def _attention_names(names: Iterable[str]) -> list[str]:
    """The attention modules in the file's keys, with or without the prefix of the adapter part."""
    bare = (name.removeprefix("ip_adapter.").removeprefix("adapter_modules.") for name in names)
    matches = (_ATTENTION.match(name) for name in bare)
    return sorted({match.group(1) for match in matches if match})

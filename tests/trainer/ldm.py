"""A diffusers folder as one file in the original layout: LDM for SD1.5 and SD2, SGM for SDXL."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

State = dict[str, Tensor]

_UNET = (
    (r"^time_embedding\.linear_1", "time_embed.0"),
    (r"^time_embedding\.linear_2", "time_embed.2"),
    (r"^add_embedding\.linear_1", "label_emb.0.0"),
    (r"^add_embedding\.linear_2", "label_emb.0.2"),
    (r"^conv_in", "input_blocks.0.0"),
    (r"^conv_norm_out", "out.0"),
    (r"^conv_out", "out.2"),
    (r"^mid_block\.resnets\.0", "middle_block.0"),
    (r"^mid_block\.attentions\.0", "middle_block.1"),
    (r"^mid_block\.resnets\.1", "middle_block.2"),
)
_RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("time_emb_proj", "emb_layers.1"),
    ("conv_shortcut", "skip_connection"),
)
_VAE = (
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("mid_block.attentions.0", "mid.attn_1"),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
    ("group_norm", "norm"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("to_out.0", "proj_out"),
)
_OPEN_CLIP = (
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("self_attn.out_proj", "attn.out_proj"),
    ("encoder.layers.", "transformer.resblocks."),
    ("final_layer_norm", "ln_final"),
    ("embeddings.token_embedding", "token_embedding"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
)


def write_single_file(
    folder: Path, file: Path, family: str, more: Mapping[str, Tensor] | None = None, **metadata: str
) -> Path:
    """`more` are tensors to add, `metadata` goes into the header."""
    state = single_file_state(folder, family) | dict(more or {})
    save_file(state, str(file), metadata=metadata or None)
    return file


def single_file_state(folder: Path, family: str) -> State:
    state = _prefixed("model.diffusion_model.", unet_to_ldm(_read(folder / "unet")))
    state |= _prefixed("first_stage_model.", vae_to_ldm(_read(folder / "vae")))
    text = _read(folder / "text_encoder")
    if family == "sd2":
        state |= _prefixed("cond_stage_model.model.", to_open_clip(text))
    else:
        prefix = "conditioner.embedders.0." if family == "sdxl" else "cond_stage_model."
        state |= _prefixed(f"{prefix}transformer.text_model.", _bare(text))
        state[f"{prefix}transformer.text_model.embeddings.position_ids"] = torch.arange(16)[None]
    if family == "sdxl":
        state |= _prefixed("conditioner.embedders.1.model.", to_open_clip(_read(folder / "text_encoder_2")))
    return {name: tensor.contiguous() for name, tensor in state.items()}


def unet_to_ldm(state: State) -> State:
    """Two residual blocks per level, as all published UNets have."""
    attentions = {name.split(".attentions.")[0] for name in state if ".attentions." in name}
    return {_unet_name(name, attentions): tensor for name, tensor in state.items()}


def _unet_name(name: str, with_attention: set[str]) -> str:
    for pattern, replacement in _UNET:
        name = re.sub(pattern, replacement, name)
    if match := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)", name):
        level, layer = int(match[2]), int(match[4])
        block = f"input_blocks.{1 + 3 * level + layer}" if match[1] == "down" else f"output_blocks.{3 * level + layer}"
        name = f"{block}.{int(match[3] == 'attentions')}{name[match.end() :]}"
    elif match := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv", name):
        name = f"input_blocks.{3 * int(match[1]) + 3}.0.op{name[match.end() :]}"
    elif match := re.match(r"(up_blocks\.(\d+))\.upsamplers\.0", name):
        place = 2 if match[1] in with_attention else 1
        name = f"output_blocks.{3 * int(match[2]) + 2}.{place}{name[match.end() :]}"
    if re.match(r"(input_blocks|output_blocks)\.\d+\.0\.|middle_block\.[02]\.", name):
        for old, new in _RESNET:
            name = name.replace(old, new)
    return name


def vae_to_ldm(state: State) -> State:
    levels = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("decoder.up_blocks."))
    return {_vae_name(name, levels): _as_convolution(name, tensor) for name, tensor in state.items()}


def _vae_name(name: str, levels: int) -> str:
    for old, new in _VAE:
        name = name.replace(old, new)
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{levels - 1 - int(m[1])}.block.", name)
    return re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)


def _as_convolution(name: str, tensor: Tensor) -> Tensor:
    attention = re.search(r"attentions\.0\.to_.*weight", name)
    return tensor[:, :, None, None] if attention else tensor


def to_open_clip(state: State) -> State:
    """Queries, keys and values in one matrix; the projection transposed (SD2 files hold one that is not used)."""
    text = _bare(state)
    width = text["embeddings.position_embedding.weight"].shape[1]
    found: State = {
        "text_projection": text.pop("text_projection.weight", torch.eye(width)).T,
        "logit_scale": torch.ones(()),
    }
    for name, tensor in text.items():
        if ".q_proj" in name:
            parts = [text[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            found[_open_clip_name(name.replace("self_attn.q_proj.", "attn.in_proj_"))] = torch.cat(parts)
        elif ".k_proj" not in name and ".v_proj" not in name:
            found[_open_clip_name(name)] = tensor
    return found


def _open_clip_name(name: str) -> str:
    for old, new in _OPEN_CLIP:
        name = name.replace(old, new)
    return name


def _bare(state: State) -> State:
    return {name.removeprefix("text_model."): tensor for name, tensor in state.items()}


def _prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def _read(folder: Path) -> State:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)

"""The parts of the emoji model, from its diffusers folder into ComfyUI's own classes.

ComfyUI's loaders recognise published models by their sizes, so a small model has to say what it is.
"""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The one .safetensors file of a part of a diffusers folder."""
    return comfy.utils.load_torch_file(str(next(iter(sorted(folder.glob("*.safetensors"))))), safe_load=True)


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


class _Ratio(float):
    """A channel multiplier that is no whole number but whose products with channels are."""

    def __mul__(self, channels: Any) -> int:
        return round(float(self) * channels)

    __rmul__ = __mul__


def load_unet(folder: Path) -> comfy.model_patcher.ModelPatcher:
    """A diffusers UNet2DConditionModel of SD1.5's layout and any width -> a MODEL with the v target."""
    config, weights = read_config(folder), read_weights(folder)
    channels = config["block_out_channels"]
    depth = [int("CrossAttn" in block) for block in config["down_block_types"] for _ in range(2)]
    unet = {
        "image_size": 32,
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": channels[0],
        "num_res_blocks": [config["layers_per_block"]] * len(channels),
        "channel_mult": [_Ratio(width / channels[0]) for width in channels],
        "transformer_depth": depth,
        # ComfyUI takes these from the end: the deepest block, which has no attention, comes first.
        "transformer_depth_output": [int(i < 9) for i in range(12)],
        "transformer_depth_middle": 1,
        "context_dim": config["cross_attention_dim"],
        "use_spatial_transformer": True,
        "use_linear_in_transformer": False,
        "adm_in_channels": None,
        "legacy": False,
        "use_temporal_attention": False,
        "use_temporal_resblock": False,
    }
    model_config = comfy.supported_models.SD15(unet)
    model_config.unet_config["num_heads"] = config["attention_head_dim"]  # heads, by diffusers' well-known slip
    load_device = comfy.model_management.get_torch_device()
    dtype = comfy.model_management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(weights),
        supported_dtypes=model_config.supported_inference_dtypes,
        weight_dtype=comfy.utils.weight_dtype(weights),
    )
    manual_cast = comfy.model_management.unet_manual_cast(dtype, load_device, model_config.supported_inference_dtypes)
    model_config.set_inference_dtype(dtype, manual_cast)
    offload_device = comfy.model_management.unet_offload_device()
    model = comfy.model_base.BaseModel(
        model_config, model_type=comfy.model_base.ModelType.V_PREDICTION, device=offload_device
    )
    names = comfy.utils.unet_to_diffusers(model_config.unet_config)
    state = {names[key]: tensor for key, tensor in weights.items()}
    model.diffusion_model.load_state_dict(state, strict=True)
    return comfy.model_patcher.ModelPatcher(model, load_device=load_device, offload_device=offload_device)


class _Tokenizer(comfy.sd1_clip.SDTokenizer):
    """Pads with the end token to the text encoder's length."""

    def __init__(self, folder: Path, length: int, width: int, embedding_directory: Any = None, **_: Any) -> None:
        super().__init__(
            tokenizer_path=str(folder),
            max_length=length,
            embedding_directory=embedding_directory,
            embedding_size=width,
            tokenizer_class=PreTrainedTokenizerFast,
        )


class _TextEncoder(comfy.sd1_clip.SDClipModel):
    def __init__(self, config: str, special_tokens: dict[str, int], length: int, **arguments: Any) -> None:
        super().__init__(
            textmodel_json_config=config,
            special_tokens=special_tokens,
            max_length=length,
            return_projected_pooled=False,
            **arguments,
        )


def load_text_encoder(folder: Path, tokenizer_folder: Path) -> comfy.sd.CLIP:
    """A diffusers text_encoder and tokenizer -> a CLIP."""
    config = read_config(folder)
    length = config["max_position_embeddings"]
    special = {"start": config["bos_token_id"], "end": config["eos_token_id"], "pad": config["pad_token_id"]}
    encoder = partial(_TextEncoder, str(folder / "config.json"), special, length)
    tokenizer = partial(_Tokenizer, tokenizer_folder, length, config["hidden_size"])
    target = comfy.supported_models_base.ClipTarget(
        partial(comfy.sd1_clip.SD1Tokenizer, tokenizer=tokenizer),
        partial(comfy.sd1_clip.SD1ClipModel, clip_model=encoder),
    )
    clip = comfy.sd.CLIP(target)
    # Newer transformers save the keys without the name of the text model.
    weights = {f"text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in read_weights(folder).items()}
    transformer = clip.cond_stage_model.clip_l.transformer
    _fit_vocabulary(transformer.text_model.embeddings, config["vocab_size"])
    missing, _ = transformer.load_state_dict(weights, strict=False)
    missing = [key for key in missing if not key.startswith("text_projection")]
    if missing:
        raise RuntimeError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}.")
    return clip


def _fit_vocabulary(embeddings: Any, size: int) -> None:
    """ComfyUI's token embedding always has CLIP's 49408 rows; make one of `size`."""
    full = embeddings.token_embedding
    embeddings.token_embedding = type(full)(
        size, full.embedding_dim, device=full.weight.device, dtype=full.weight.dtype
    ).requires_grad_(False)


def load_vae(folder: Path) -> comfy.sd.VAE:
    """A diffusers AutoencoderKL of any width and number of norm groups -> a VAE."""
    config, weights = read_config(folder), read_weights(folder)
    widths, groups = config["block_out_channels"], config["norm_num_groups"]
    # ComfyUI's layers have 32 norm groups, which need widths that 32 divides. So the modules are made wide
    # enough, then each gets its own weights and groups.
    scale = 32 // math.gcd(32, *widths)
    details = {
        "double_z": True,
        "z_channels": config["latent_channels"],
        "resolution": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_ch": config["out_channels"],
        "ch": widths[0] * scale,
        "ch_mult": [_Ratio(width / widths[0]) for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    parameters = {"embed_dim": config["latent_channels"], "ddconfig": details}
    with torch.device("meta"):
        blank = comfy.sd.AutoencoderKL(**parameters).state_dict()
    converted = comfy.sd.diffusers_convert.convert_vae_state_dict(weights)
    vae = comfy.sd.VAE(sd=_wide(blank), config={"params": parameters})
    _assign(vae.first_stage_model, converted, groups, vae.vae_dtype)
    vae.size = None
    return vae


def _wide(blank: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.zeros(()).expand(tensor.shape) for key, tensor in blank.items()}


def _assign(module: nn.Module, weights: dict[str, Tensor], groups: int, dtype: torch.dtype) -> None:
    """Replace every parameter, whatever its shape."""
    for name, parameter in list(module.named_parameters()):
        owner = module.get_submodule(name.rpartition(".")[0])
        tensor = weights[name].to(parameter.device, dtype)
        setattr(owner, name.rpartition(".")[2], nn.Parameter(tensor, requires_grad=False))
        if isinstance(owner, nn.GroupNorm):
            owner.num_groups, owner.num_channels = groups, tensor.shape[0]

"""Put the trained parts together: the checkpoints of a work folder become one diffusers folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPModel,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from ipadapter_core.assets import MODEL
from ipadapter_trainer.demo.emoji import EmojiImages
from ipadapter_trainer.demo.judges import StyleClassifier, classifier_state, read_judges
from ipadapter_trainer.models.image_processor import CLIPImageProcessor

from .clip import MAX_TOKENS, new_clip
from .loop import load_ema, start_from
from .unet import new_scheduler, new_unet
from .vae import fold_scaling, new_vae, only_decoder


def load_vae(work: Path, images: EmojiImages, with_decoder: bool = True) -> AutoencoderKL:
    """The trained autoencoder with SD1.5's scaling factor folded in; with the decoder that was trained on alone, when
    there is one."""
    vae = load_ema(new_vae(), work / "vae.pt")
    assert isinstance(vae, AutoencoderKL)
    fold_scaling(vae, images.images)
    if with_decoder and (work / "decoder.pt").is_file():
        load_ema(only_decoder(vae), work / "decoder.pt")
    return vae.requires_grad_(False)


def load_clip(work: Path, with_vision: bool = True) -> tuple[CLIPModel, CLIPTokenizer]:
    """The trained CLIP and its tokenizer; with the vision tower that was trained on alone, when there is one."""
    tokenizer = CLIPTokenizer.from_pretrained(str(work / "tokenizer"), model_max_length=MAX_TOKENS)
    clip = load_ema(new_clip(tokenizer), work / "clip.pt")
    assert isinstance(clip, CLIPModel)
    if with_vision and (work / "vision.pt").is_file():
        load_ema(only_vision(clip), work / "vision.pt")
    return clip.requires_grad_(False), tokenizer


def only_vision(clip: CLIPModel) -> CLIPModel:
    """Let only the vision tower and its projection be trained."""
    clip.requires_grad_(False)
    clip.vision_model.requires_grad_(True)
    clip.visual_projection.requires_grad_(True)
    return clip


def load_unet(work: Path) -> UNet2DConditionModel:
    """The trained UNet."""
    unet = load_ema(new_unet(), work / "unet.pt")
    assert isinstance(unet, UNet2DConditionModel)
    return unet.requires_grad_(False)


def export(work: Path, images: EmojiImages, folder: Path) -> None:
    """Write ``folder``/emoji-model as diffusers loads it (fp16) and ``folder``/judges beside it."""
    clip, tokenizer = load_clip(work)
    config: Any = clip.config
    text_encoder = CLIPTextModel(config.text_config)
    text_encoder.load_state_dict(clip.text_model.state_dict())
    image_encoder = CLIPVisionModelWithProjection(config.vision_config)
    image_encoder.vision_model.load_state_dict(clip.vision_model.state_dict())
    image_encoder.visual_projection.load_state_dict(clip.visual_projection.state_dict())
    unet = load_unet(work)
    parts: dict[str, Any] = {
        "vae": load_vae(work, images),
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "unet": cast("Any", unet).to(memory_format=torch.contiguous_format),
        "scheduler": new_scheduler(),
        "safety_checker": None,
        "feature_extractor": new_image_processor(),
        "image_encoder": image_encoder,
        "requires_safety_checker": False,
    }
    pipeline: Any = cast("Any", StableDiffusionPipeline)(**parts)
    pipeline.to(dtype=torch.float16).save_pretrained(folder / MODEL)
    # The name that every version of transformers has, not that of our subclass.
    edit_json(folder / MODEL / "model_index.json", feature_extractor=["transformers", "CLIPImageProcessor"])
    prefix_keys(folder / MODEL / "text_encoder" / "model.safetensors", "text_model.")
    for name in ("vocab.json", "merges.txt"):  # for readers that know no tokenizer.json
        shutil.copy(work / "tokenizer" / name, folder / MODEL / "tokenizer" / name)
    # The tokenizer remembers the folder it was read from; nobody else has that folder.
    edit_json(folder / MODEL / "tokenizer" / "tokenizer_config.json", name_or_path=None)
    save_judges(work, clip, folder / "judges.safetensors")


def edit_json(file: Path, **values: object) -> None:
    """Change these values of the file; those that are None are removed."""
    settings = json.loads(file.read_text(encoding="utf-8")) | values
    for name, value in values.items():
        if value is None:
            del settings[name]
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def prefix_keys(file: Path, prefix: str) -> None:
    """Give every tensor the name that SD1.5's files have; newer transformers write shorter ones, and read both."""
    state = {key if key.startswith(prefix) else prefix + key: value for key, value in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})


def unpack(folder: Path, work: Path) -> None:
    """The reverse of ``export``: checkpoints of step 0 from the shipped weights, for anyone to train them further."""
    model = folder / MODEL
    judges = read_judges(folder / "judges.safetensors")
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    shutil.copytree(model / "tokenizer", work / "tokenizer", dirs_exist_ok=True)
    clip, classifier = new_clip(tokenizer), StyleClassifier()
    clip.text_model.load_state_dict(CLIPTextModel.from_pretrained(model / "text_encoder").state_dict())
    image_encoder = CLIPVisionModelWithProjection.from_pretrained(model / "image_encoder")
    clip.vision_model.load_state_dict(image_encoder.vision_model.state_dict())
    clip.visual_projection.load_state_dict(image_encoder.visual_projection.state_dict())
    clip.text_projection.load_state_dict({"weight": judges["text_projection.weight"]})
    classifier.load_state_dict(classifier_state(judges, "style_classifier"))
    start_from(clip, work / "clip.pt")
    start_from(classifier, work / "judge.pt")
    start_from(AutoencoderKL.from_pretrained(model / "vae"), work / "vae.pt")
    start_from(UNet2DConditionModel.from_pretrained(model / "unet"), work / "unet.pt")


def save_judges(work: Path, clip: CLIPModel, file: Path) -> None:
    """The style classifier and CLIP's text projection, which no generation needs, in one file."""
    classifier = load_ema(StyleClassifier(), work / "judge.pt")
    state = {f"style_classifier.{key}": value.half() for key, value in classifier.state_dict().items()}
    state["text_projection.weight"] = clip.text_projection.weight.detach().half()
    save_file(state, file)


def new_image_processor() -> CLIPImageProcessor:
    """CLIP's preprocessing at 64 px."""
    return CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})

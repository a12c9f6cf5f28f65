"""Put the trained parts together: the checkpoints of a work folder become one diffusers folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from ipadapter_core.assets import MODEL
from ipadapter_trainer.demo.emoji import EmojiImages
from ipadapter_trainer.models.image_processor import CLIPImageProcessor

from .clip import MAX_TOKENS, new_clip
from .concepts import CONCEPTS
from .efficientnet import EfficientNet
from .images import Drawings
from .judges import JUDGES_FILE, StyleClassifier, classifier_state, compressed, last_layer, only_known, read_judges
from .loop import load_ema, on_training_device, start_from
from .unet import new_scheduler, new_unet
from .vae import fold_scaling, new_vae, only_decoder
from .vision import VisionTower


def load_vae(work: Path, images: EmojiImages, with_decoder: bool = True) -> AutoencoderKL:
    """The trained autoencoder with SD1.5's scaling factor folded in; with the decoder that was trained on alone, when
    there is one. It is on the training device."""
    vae = on_training_device(load_ema(new_vae(images.size), work / "vae.pt"))
    assert isinstance(vae, AutoencoderKL)
    fold_scaling(vae, images.images)
    if with_decoder and (work / "decoder.pt").is_file():
        load_ema(only_decoder(vae), work / "decoder.pt")
    return vae.requires_grad_(False)


def load_clip(work: Path, size: int) -> tuple[CLIPModel, CLIPTokenizer]:
    """The trained CLIP, of whose towers the text's is shipped, and its tokenizer."""
    tokenizer = CLIPTokenizer.from_pretrained(str(work / "tokenizer"), model_max_length=MAX_TOKENS)
    clip = load_ema(new_clip(tokenizer, size), work / "clip.pt")
    assert isinstance(clip, CLIPModel)
    return clip.requires_grad_(False), tokenizer


def load_teacher(work: Path, drawings: Drawings) -> EfficientNet:
    """The trained teacher of the image encoder."""
    teacher = load_ema(EfficientNet(len(drawings.labels)), work / "teacher.pt")
    assert isinstance(teacher, EfficientNet)
    return teacher


def load_tower(work: Path, drawings: Drawings) -> VisionTower:
    """The trained image encoder with its heads."""
    tower = load_ema(VisionTower(drawings.images.shape[-1], len(drawings.labels)), work / "vision.pt")
    assert isinstance(tower, VisionTower)
    return tower.requires_grad_(False)


def load_unet(work: Path, size: int) -> UNet2DConditionModel:
    """The trained UNet."""
    unet = load_ema(new_unet(size), work / "unet.pt")
    assert isinstance(unet, UNet2DConditionModel)
    return unet.requires_grad_(False)


def export(work: Path, images: EmojiImages, drawings: Drawings, folder: Path) -> None:
    """Write ``folder``/emoji-model as diffusers loads it (fp16)."""
    clip, tokenizer = load_clip(work, images.size)
    config: Any = clip.config
    text_encoder = CLIPTextModel(config.text_config)
    text_encoder.load_state_dict(clip.text_model.state_dict())
    unet = load_unet(work, images.size)
    parts: dict[str, Any] = {
        "vae": load_vae(work, images).cpu(),
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        # It was trained in bfloat16: in float16 its 8 bits are all there, and the file compresses better.
        "unet": cast("Any", unet).to(torch.bfloat16, memory_format=torch.contiguous_format),
        "scheduler": new_scheduler(),
        "safety_checker": None,
        "feature_extractor": new_image_processor(images.size),
        "image_encoder": load_tower(work, drawings).encoder,
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


def unpack(folder: Path, drawings: Drawings, work: Path) -> None:
    """The reverse of ``export``: checkpoints of step 0 from the shipped weights, for anyone to train them further.

    What is not shipped starts at random: the teacher, the image encoder's heads and projector, and what the judge of
    concepts knows of other drawings.
    """
    size, model = drawings.images.shape[-1], folder / MODEL
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    shutil.copytree(model / "tokenizer", work / "tokenizer", dirs_exist_ok=True)
    clip = new_clip(tokenizer, size)
    clip.text_model.load_state_dict(CLIPTextModel.from_pretrained(model / "text_encoder").state_dict())
    judges = read_judges(folder / JUDGES_FILE)
    clip.text_projection.load_state_dict({"weight": judges["text_projection.weight"]})
    start_from(clip, work / "clip.pt")
    start_from(AutoencoderKL.from_pretrained(model / "vae"), work / "vae.pt")
    start_from(UNet2DConditionModel.from_pretrained(model / "unet"), work / "unet.pt")
    tower = VisionTower(size, len(drawings.labels))
    tower.encoder = CLIPVisionModelWithProjection.from_pretrained(model / "image_encoder").float()
    start_from(tower, work / "vision.pt")
    styles = StyleClassifier()
    styles.load_state_dict(classifier_state(judges, "styles"))
    start_from(styles, work / "styles.pt")
    concepts, known = EfficientNet(len(drawings.labels)), classifier_state(judges, "concepts")
    rows = {key: torch.cat([known[key], value[len(CONCEPTS) :]]) for key, value in last_layer(concepts).items()}
    concepts.load_state_dict({**known, **rows})
    start_from(concepts, work / "concepts.pt")


def save_judges(work: Path, drawings: Drawings, file: Path) -> None:
    """The classifiers and CLIP's text projection, which no generation needs, in one file."""
    clip, _ = load_clip(work, drawings.images.shape[-1])
    judges: dict[str, dict[str, Tensor]] = {
        "styles": load_ema(StyleClassifier(), work / "styles.pt").state_dict(),
        "concepts": only_known(load_ema(EfficientNet(len(drawings.labels)), work / "concepts.pt").state_dict()),
    }
    state = {"text_projection.weight": clip.text_projection.weight.detach().half()}
    for name, tensors in judges.items():
        state |= {f"{name}.{key}": value for key, value in compressed(tensors).items()}
    save_file(state, file)


def new_image_processor(size: int) -> CLIPImageProcessor:
    """CLIP's preprocessing at the stack's own size."""
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})

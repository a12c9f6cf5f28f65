"""`ipadapter generate`: image files from text and image prompts."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ipadapter_core import AdapterSpec

from ..data.face_embeds import check_face_embed, read_face_embed
from ..data.images import StoredImage, check_image_file, open_rgb, to_pil_images, why_unreadable
from ..errors import DataError, TrainerError
from ..files.opening import adapter_to_use
from ..models.base_model import BaseModel, load_base_model
from ..models.generate import generate
from ..models.image_features import encode_images
from ..runtime.disk import whole_file
from ..runtime.processes import inference_dtype
from ..settings.fields import ModelConfig, parse_size
from ..settings.generate_config import GenerateConfig


def generate_files(config: GenerateConfig) -> list[Path]:
    """Generate and save images, on the GPU if there is one, in the precision of `inference_dtype`.

    Raises TrainerError for an output without a known image suffix and for prompts that the kind of adapter does not
    take, before the model is loaded; and as loading and generating do.
    """
    check_image_file(config.output)
    adapter = None if config.adapter is None else adapter_to_use(config.adapter, config.shortcut)
    if adapter is not None:
        _check_prompts(adapter.spec, config)
    images = [] if config.image is None else [open_image(config.image)]
    face = None
    if adapter is not None and config.face_embeds is not None:
        face = open_face(config.face_embeds, adapter.spec)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base_model = load_model(config, device, needs_image_encoder=bool(images))
    features = None
    if adapter is not None:
        features = encode_images(base_model, adapter.spec, images, face)
        base_model.release("image_encoder")
    pixels = generate(
        base_model,
        adapter,
        prompts=[config.prompt] * config.num_images,
        image_features=features,
        weight=config.weight,
        negative_prompt=config.negative_prompt,
        steps=config.num_inference_steps,
        guidance=config.guidance_scale,
        seed=config.seed,
        size=None if config.size is None else parse_size(config.size),
    )
    if not pixels.isfinite().all():
        raise TrainerError(
            f"{config.output}: not written, because the image has NaN or infinite values. The base model or the "
            f"adapter is damaged, or overflows in {base_model.dtype}."
        )
    return _save(to_pil_images(pixels), config.output)


def load_model(config: ModelConfig, device: torch.device, *, needs_image_encoder: bool) -> BaseModel:
    """The base model that the settings name, in the precision of `inference_dtype`."""
    return load_base_model(
        config.base_model,
        inference_dtype(device),
        device,
        config.image_encoder,
        base_config=config.base_config,
        prediction_type=config.prediction_type,
        needs_image_encoder=needs_image_encoder,
    )


def open_image(image: StoredImage) -> Image.Image:
    """The image in RGB. Raises DataError for a missing file, and for one that is damaged or no image."""
    if isinstance(image, Path) and not image.is_file():
        raise DataError(f"{image}: no such image.")
    try:
        return open_rgb(image)[0]
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise DataError(f"{image}: cannot be read as an image: {why_unreadable(error)}") from error


def open_face(path: Path, spec: AdapterSpec) -> Tensor:
    """A face embedding, float32 [1, F], from a .npy file, a torch file, or a .safetensors file with one tensor.

    Raises DataError for a missing or unreadable file, several tensors, and another size than the adapter's.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such face embedding.")
    return check_face_embed(read_face_embed(path), int(spec.face_dim or 0), str(path))[None]


def _check_prompts(spec: AdapterSpec, config: GenerateConfig) -> None:
    """Raises TrainerError for a missing prompt, and for one that this kind of adapter does not take."""
    for key, dim, what in (("image", spec.image_dim, "image"), ("face_embeds", spec.face_dim, "face embedding")):
        is_given = getattr(config, key) is not None
        if dim is not None and not is_given:
            article = "an" if what == "image" else "a"
            raise TrainerError(f"This {spec.kind} adapter needs {article} {what} ({spec.encoder}); {key} is missing.")
        if dim is None and is_given:
            raise TrainerError(f"This {spec.kind} adapter takes no {what}; leave {key} out.")


def _save(images: list[Image.Image], output: Path) -> list[Path]:
    files = [output]
    if len(images) > 1:
        files = [output.with_stem(f"{output.stem}-{number}") for number in range(1, len(images) + 1)]
    for file, image in zip(files, images, strict=True):
        with whole_file(file) as temporary:
            image.save(temporary)
    return files

"""Picture files in and out, for `ipadapter generate`."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ipadapter_core import load_adapter

from .base_model import load_base_model
from .data import to_rgb
from .errors import DataError, TrainerError
from .features import encode_pictures
from .generate import generate


def generate_files(
    base_model: Path,
    adapter: Path | None,
    image: Path | None,
    output: Path,
    *,
    prompt: str,
    negative_prompt: str,
    weight: float,
    steps: int,
    guidance: float,
    seed: int,
    count: int,
    size: int | None,
    image_encoder: Path | None,
) -> list[Path]:
    """Load, generate and save; on the GPU in bfloat16 when there is one, else on the CPU in float32.

    Raises TrainerError when the options do not belong together, and as loading and generating do; files are
    checked before the model is loaded.
    """
    if (adapter is None) != (image is None):
        missing = "--adapter" if adapter is None else "--image"
        raise TrainerError(f"An image prompt needs both --adapter and --image; {missing} is missing.")
    if output.suffix.lower() not in Image.registered_extensions():
        raise TrainerError(f"{output}: unknown picture suffix {output.suffix!r}. Use .png.")
    picture = None if image is None else open_picture(image)
    loaded = None if adapter is None else load_adapter(adapter, dtype=torch.float32)
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    model = load_base_model(base_model, dtype, device, image_encoder)
    pixels = generate(
        model,
        loaded,
        prompts=[prompt] * count,
        image_embeds=None if picture is None else encode_pictures(model, [picture]),
        weight=weight,
        negative_prompt=negative_prompt,
        steps=steps,
        guidance=guidance,
        seed=seed,
        size=size,
    )
    names = [output] if count == 1 else [output.with_stem(f"{output.stem}-{i}") for i in range(1, count + 1)]
    output.parent.mkdir(parents=True, exist_ok=True)
    for name, picture_out in zip(names, to_pictures(pixels), strict=True):
        picture_out.save(name)
    return names


def open_picture(path: Path) -> Image.Image:
    """Raises DataError when the file is missing or is no picture."""
    try:
        with Image.open(path) as picture:
            return to_rgb(picture)
    except FileNotFoundError:
        raise DataError(f"{path}: no such picture.") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a picture ({error}).") from error


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """Pixels [B, 3, H, W] in [-1, 1] -> RGB pictures."""
    values = ((pixels.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(row.permute(1, 2, 0).numpy()) for row in values]

"""Image files in and out, for `ipadapter generate`."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ipadapter_core import (
    AdapterSpec,
)

from ..data.face_embeds import check_face_embed, read_face_embed
from ..data.images import open_rgb, to_pil_images, why_unreadable
from ..errors import DataError, TrainerError
from ..files.opening import adapter_to_use
from ..models.base_model import load_base_model
from ..models.generate import check_numbers, generate
from ..models.image_features import encode_images
from ..runtime.disk import whole_file
from ..runtime.processes import inference_dtype

MAX_COUNT = 1000  # images of one call, which are one batch


def generate_files(
    base_model: Path,
    adapter: Path | None,
    image: Path | None,
    output: Path,
    *,
    face_embed: Path | None = None,
    prompt: str = "",
    negative_prompt: str = "",
    weight: float = 1.0,
    steps: int = 20,
    guidance: float = 5.0,
    seed: int = 0,
    count: int = 1,
    size: str | None = None,
    image_encoder: Path | None = None,
    base_config: Path | None = None,
    prediction_type: str | None = None,
    shortcut: bool | None = None,
) -> list[Path]:
    """Load, generate and save; on the GPU when there is one, in the precision of `inference_dtype`.

    `image` and `face_embed` are what the adapter's kind takes. `size` is "512" or "832x1216" (width x height).
    `shortcut` tells FaceID-plus v2 (True) from v1 where neither the file nor its name does.

    Raises TrainerError when the options do not belong together, and as loading and generating do; files are
    checked before the model is loaded.
    """
    if output.is_dir():
        raise TrainerError(f"{output}: a folder. Name the image too, such as {output / 'image.png'}.")
    if output.suffix.lower() not in Image.registered_extensions():
        raise TrainerError(f"{output}: unknown image suffix {output.suffix!r}. Use .png.")
    if adapter is None and (image is not None or face_embed is not None):
        given = "--image" if image is not None else "--face-embed"
        raise TrainerError(f"An image prompt needs an adapter; {given} was given, --adapter is missing.")
    check_numbers([weight], guidance, steps)
    if count > MAX_COUNT:
        raise TrainerError(f"--count {count}: expected at most {MAX_COUNT:,}.")
    pixels_of = None if size is None else parse_size(size)
    loaded = None if adapter is None else adapter_to_use(adapter, shortcut)
    if loaded is not None:
        check_prompt(loaded.spec, image, face_embed)
    prompt_image = None if image is None else open_image(image)
    face = None if loaded is None or face_embed is None else open_face(face_embed, loaded.spec)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = inference_dtype(device)
    model = load_base_model(
        base_model,
        dtype,
        device,
        image_encoder,
        base_config=base_config,
        prediction_type=prediction_type,
        needs_image_encoder=prompt_image is not None,
    )
    features = None
    if loaded is not None:
        features = encode_images(model, loaded.spec, [] if prompt_image is None else [prompt_image], face)
        model.release("image_encoder")
    pixels = generate(
        model,
        loaded,
        prompts=[prompt] * count,
        image_features=features,
        weight=weight,
        negative_prompt=negative_prompt,
        steps=steps,
        guidance=guidance,
        seed=seed,
        size=pixels_of,
    )
    if not pixels.isfinite().all():
        raise TrainerError(
            f"{output}: not written: the image holds NaN. The base model or the adapter overflows in {dtype}, or is "
            "damaged."
        )
    names = [output] if count == 1 else [output.with_stem(f"{output.stem}-{i}") for i in range(1, count + 1)]
    output.parent.mkdir(parents=True, exist_ok=True)
    for name, image_out in zip(names, to_pil_images(pixels), strict=True):
        with whole_file(name) as temporary:
            image_out.save(temporary)
    return names


def check_prompt(spec: AdapterSpec, image: Path | None, face_embed: Path | None) -> None:
    """Raises TrainerError when an adapter of this kind needs another prompt than was given."""
    options = (
        ("--image", image, spec.image_dim, "an image"),
        ("--face-embed", face_embed, spec.face_dim, "a face embedding"),
    )
    for option, given, width, what in options:
        if width is not None and given is None:
            raise TrainerError(f"This {spec.kind} adapter needs {what} ({spec.encoder}); {option} is missing.")
        if width is None and given is not None:
            raise TrainerError(f"This {spec.kind} adapter takes no {what.split(' ', 1)[1]}; leave {option} out.")


def open_face(path: Path, spec: AdapterSpec) -> Tensor:
    """A face embedding, float32 [1, F], from a .npy file, a torch file, or a .safetensors file with one tensor.

    Raises DataError for a missing or unreadable file, several tensors, and another width than the adapter's.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such face embedding.")
    return check_face_embed(read_face_embed(path), int(spec.face_dim or 0), str(path))[None]


def parse_size(text: str) -> tuple[int, int]:
    """ "512" or "832x1216" (width x height) -> (height, width). Raises TrainerError for another text."""
    match = re.fullmatch(r"(\d+)(?:\s*[xX]\s*(\d+))?", text.strip())
    if match is None:
        raise TrainerError(f"--size {text!r}: expected a side or WIDTHxHEIGHT in pixels, such as 512 or 832x1216.")
    width = int(match[1])
    return int(match[2] or width), width


def open_image(path: Path) -> Image.Image:
    """Raises DataError when the file is missing or is no image."""
    if not path.is_file():
        raise DataError(f"{path}: no such image.")
    try:
        return open_rgb(path)[0]
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise DataError(f"{path}: cannot be read as an image: {why_unreadable(error)}") from error

"""Saved images of an evaluation, and a grid of them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ..data.images import open_rgb
from ..report.image_grid import draw_grid
from ..runtime.disk import whole_file
from .scores import Job
from .setup import Setup

_COLUMNS = 4  # of generated images, about
_SMALLEST, _LARGEST = 128, 256  # pixels; images are scaled to a side in this range


def image_file(folder: Path, job: Job) -> Path:
    """Where a generated image is saved."""
    return folder / f"{job.index:05}-{job.weight:g}-{job.number}.png"


def save_grid(setup: Setup) -> str | None:
    """Draw `output`/grid.png, one row per saved prompt: the image prompt, then the images of each weight.

    Returns the file, or None without saved prompts and when an image is missing.
    """
    config, prompts = setup.config, setup.saved_prompts
    per_weight = min(config.num_images_per_prompt, max(1, _COLUMNS // len(config.weights)))
    columns: list[tuple[str, list[Image.Image]]] = []
    for weight in config.weights:
        for number in range(per_weight):
            files = [image_file(setup.image_folder, Job(prompt.index, number, weight)) for prompt in prompts]
            if not files or not all(file.is_file() for file in files):
                return None
            title = f"weight {weight:g}" + (f", no. {number + 1}" if per_weight > 1 else "")
            columns.append((title, [open_rgb(file)[0] for file in files]))
    side = max(_SMALLEST, min(_LARGEST, max(columns[0][1][0].size)))
    image_prompts = ("image prompt", [open_rgb(prompt.example.prompt_image)[0] for prompt in prompts])
    grid = draw_grid([image_prompts, *columns], side=side, labels=[prompt.example.text for prompt in prompts])
    with whole_file(config.output / "grid.png") as temporary:
        grid.save(temporary)
    return str(config.output / "grid.png")

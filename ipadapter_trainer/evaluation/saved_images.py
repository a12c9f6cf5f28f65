"""Generated images that are kept to be looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..data.images import open_rgb
from ..report.image_grid import draw_grid
from ..runtime.disk import whole_file
from .data import Prompt
from .scores import Job

GRID = "grid.png"
_COLUMNS = 4  # of generated images, about
_SIDES = (128, 256)  # pixels; smaller and larger ones are scaled


@dataclass(frozen=True, eq=False)
class SavedImages:
    """The images of the first prompts, in `output`/images/<settings>."""

    output: Path
    settings: str  # their digest
    prompts: Sequence[Prompt]

    def keeps(self, job: Job) -> bool:
        """Whether this one is among them."""
        return any(prompt.index == job.index for prompt in self.prompts)

    def save(self, job: Job, image: Image.Image) -> None:
        """Write one."""
        file = self._file(job)
        with whole_file(file) as temporary:
            image.save(temporary)

    def grid(self, weights: Sequence[float], numbers: int) -> Path | None:
        """Draw and write them, one row a prompt: its image prompt, then each weight; None when a file is gone."""
        shown = min(numbers, max(1, _COLUMNS // len(weights)))
        columns: list[tuple[str, list[Image.Image]]] = []
        for weight in weights:
            for number in range(shown):
                files = [self._file(Job(prompt.index, number, weight)) for prompt in self.prompts]
                if not files or not all(file.is_file() for file in files):
                    return None
                title = f"weight {weight:g}" + (f", no. {number + 1}" if shown > 1 else "")
                columns.append((title, [open_rgb(file)[0] for file in files]))
        smallest, largest = _SIDES
        side = max(smallest, min(largest, max(columns[0][1][0].size)))
        prompts = ("image prompt", [open_rgb(prompt.image)[0] for prompt in self.prompts])
        path = self.output / GRID
        drawn = draw_grid([prompts, *columns], side=side, labels=[prompt.text for prompt in self.prompts])
        with whole_file(path) as temporary:
            drawn.save(temporary)
        return path

    def _file(self, job: Job) -> Path:
        return self.output / "images" / self.settings / f"{job.index:05}-{job.weight:g}-{job.number}.png"

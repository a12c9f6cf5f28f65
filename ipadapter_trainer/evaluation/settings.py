"""What to evaluate and how: the options of `ipadapter eval`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ..errors import EvaluationError

TEXTS = ("none", "caption")


@dataclass(frozen=True)
class EvalSettings:
    """What to evaluate, and how; the defaults are the paper's.

    `data` is what `data.read_examples` takes, `root` the folder of its images. `clip` is the folder of the CLIP
    that measures. `text` "none" generates from the image alone, "caption" from image and caption. `controls` adds
    weight 0. `images` prompts keep theirs, for the grid. `caption_prefix` goes before the captions in CLIP-T.

    Raises EvaluationError for values that make no sense.
    """

    base_model: Path
    adapter: Path
    data: Path
    clip: Path | None
    output: Path = Path("evaluation")
    images_per_caption: int = 4
    limit: int | None = 5000
    weights: tuple[float, ...] = (1.0,)
    controls: bool = False
    text: str = "none"
    steps: int = 50
    guidance: float = 7.5
    seed: int = 0
    size: str | None = None
    batch_size: int = 8
    images: int = 6
    caption_prefix: str = ""
    root: Path | None = None
    face_embeds: Path | None = None
    image_encoder: Path | None = None
    base_config: Path | None = None
    prediction_type: str | None = None
    shortcut: bool | None = None

    def __post_init__(self) -> None:
        if self.text not in TEXTS:
            raise EvaluationError(f"text is {self.text!r}; expected {' or '.join(TEXTS)}.")
        if not self.weights or not all(map(math.isfinite, self.weights)):
            raise EvaluationError(f"weights are {self.weights}; expected one or more finite numbers.")
        for name in ("images_per_caption", "limit", "steps", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EvaluationError(f"{name} is {value}; expected at least 1.")

    @property
    def all_weights(self) -> tuple[float, ...]:
        """Each weight once, 0 first."""
        return tuple(sorted({*self.weights, *([0.0] if self.controls else [])}))

    @property
    def image_folder(self) -> Path:
        """What the names of images in a list, and in a table of face embeddings, are relative to."""
        return self.root or (self.data if self.data.is_dir() else self.data.parent)


def parse_weights(text: str) -> tuple[float, ...]:
    """ "0,0.5,1" -> (0.0, 0.5, 1.0). Raises EvaluationError for another text."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise EvaluationError(
            f"--weights {text!r}: expected numbers with commas between them, such as 0,0.5,1."
        ) from None

"""What an evaluation asks for: image prompts and their captions, in a fixed random order, as the measuring CLIP sees
them.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..data.examples import Example, find_examples
from ..data.face_embeds import face_id_embed
from ..data.images import ImageSource, open_rgb, why_unreadable
from ..data.shard_files import is_shards
from ..errors import DataError, EvaluationError
from .clip import ClipModel, clip_i

COCO_IMAGES = 5000  # of val2017
_CHUNK = 32  # images open at once
_SAME = 0.9999  # cosine of two embeddings of one image; batches round differently

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Prompt:
    """An image prompt. `index` is the example's in the data set; `text` is "" without a caption."""

    index: int
    example: Example
    image: ImageSource
    text: str
    image_embed: Tensor  # [D]
    text_embed: Tensor | None  # [D]; None without a caption

    @property
    def name(self) -> str:
        """For people."""
        return str(self.image) if isinstance(self.image, Path) else self.example.name


@dataclass(frozen=True, eq=False)
class Prompts:
    """By the index of the example: the chosen ones in their order, and for each another one, which shows another
    image; None when all are the same image. `broken` says of each image that was skipped why it could not be
    read.
    """

    chosen: dict[int, Prompt]
    others: dict[int, Prompt | None]
    broken: list[str]


def read_examples(data: Path, root: Path | None = None, require_caption: bool = False) -> list[Example]:
    """A data set as `examples.find_examples` reads it, or COCO's captions_val2017.json. Its images are in `root`, by
    default the folder val2017 beside the annotations or beside their folder; each has the first of its captions.

    Raises DataError as `find_examples` does, EvaluationError for shards.
    """
    if is_shards(data):
        raise EvaluationError(f"{data}: shards are read as a stream, an evaluation needs each image. Unpack them.")
    annotations = _coco(data) if data.suffix == ".json" and data.is_file() else None
    if annotations is None:
        return find_examples(data, root, require_caption)
    return _coco_examples(annotations, data, root)


def is_coco(data: Path, examples: Sequence[Example]) -> bool:
    """Whether this is, by its name and size, the whole of COCO val2017."""
    return data.name == "captions_val2017.json" and len(examples) == COCO_IMAGES


def open_prompts(
    examples: Sequence[Example],
    clip: ClipModel,
    *,
    limit: int | None = None,
    seed: int = 0,
    caption_prefix: str = "",
    face_dim: int | None = None,
    progress_bar: bool = False,
) -> Prompts:
    """The first `limit` examples of an order drawn with `seed`, so that a higher limit only adds to a lower one. Their
    prompt is their first reference, or the image itself; and, with `face_dim`, a face embedding of so many values.

    The other prompt of each is the next one in the same order that shows another image. Raises DataError when none of
    the prompts can be read.
    """
    eyes = _Eyes(examples, clip, caption_prefix, face_dim)
    order = random.Random(f"{seed}/order").sample(range(len(examples)), len(examples))
    chosen = order if limit is None else order[:limit]
    broken: list[str] = []
    opened: list[Prompt] = []
    chunks = [chosen[start : start + _CHUNK] for start in range(0, len(chosen), _CHUNK)]
    with tqdm(total=len(chosen), desc="prompts", unit="image", disable=not progress_bar) as bar:
        for chunk in chunks:
            opened += eyes.open(chunk, broken)
            bar.update(len(chunk))
    if not opened:
        raise DataError(f"None of the {len(chosen)} prompts can be read. The first: {broken[0]}")
    if broken:
        log.warning("%d of %d prompts cannot be read and are left out, such as %s", len(broken), len(chosen), broken[0])
    # Behind the limit only as many as the last ones need.
    rest = (p for index in order[len(chosen) :] for p in eyes.open([index], []))
    return Prompts({prompt.index: prompt for prompt in opened}, _others(opened, rest), broken)


def _others(prompts: Sequence[Prompt], rest: Iterator[Prompt]) -> dict[int, Prompt | None]:
    """For each prompt the next one, in `rest` and then around the end, that shows another image."""
    beyond: list[Prompt] = []

    def following(place: int) -> Iterator[Prompt]:
        yield from islice(prompts, place + 1, None)
        yield from beyond
        for prompt in rest:
            beyond.append(prompt)
            yield prompt
        yield from islice(prompts, place)

    def differ(one: Prompt, other: Prompt) -> bool:
        return float(clip_i(one.image_embed, other.image_embed)) < _SAME

    return {p.index: next((o for o in following(place) if differ(o, p)), None) for place, p in enumerate(prompts)}


@dataclass(frozen=True, eq=False)
class _Eyes:
    """Examples as the CLIP sees them."""

    examples: Sequence[Example]
    clip: ClipModel
    prefix: str
    face_dim: int | None

    def open(self, indices: Sequence[int], broken: list[str]) -> list[Prompt]:
        """Those that can be read; the others are added to `broken`."""
        images: dict[int, Image.Image] = {}
        for index in indices:
            try:
                images[index] = self._read(self.examples[index])
            except DataError as error:
                broken.append(str(error))
        if not images:
            return []
        image_embeds = dict(zip(images, self.clip.embed_images(list(images.values())), strict=True))
        captioned = [index for index in images if self.examples[index].text]
        captions = [self.prefix + self.examples[index].text for index in captioned]
        texts = dict(zip(captioned, self.clip.embed_texts(captions), strict=True)) if captions else {}
        examples = [(index, self.examples[index]) for index in images]
        return [Prompt(i, e, prompt_image(e), e.text, image_embeds[i], texts.get(i)) for i, e in examples]

    def _read(self, example: Example) -> Image.Image:
        """Raises DataError for an image or a face embedding that cannot be read."""
        if self.face_dim is not None:
            face_id_embed(example, self.face_dim)
        image = prompt_image(example)
        try:
            return open_rgb(image)[0]
        except Exception as error:  # whatever a decoder raises
            raise DataError(f"{image}: {why_unreadable(error)}") from error


def prompt_image(example: Example) -> ImageSource:
    """What an example's image prompt is."""
    return example.references[0] if example.references else example.image


def _coco(file: Path) -> dict[str, Any] | None:
    """COCO's annotations, or None for another JSON file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return None  # find_examples says what is wrong
    return content if isinstance(content, dict) and {"images", "annotations"} <= set(content) else None


def _coco_examples(annotations: dict[str, Any], file: Path, root: Path | None) -> list[Example]:
    captions: dict[Any, str] = {}
    try:
        for annotation in annotations["annotations"]:
            captions.setdefault(annotation["image_id"], str(annotation["caption"]).strip())
        rows = [(str(image["file_name"]), captions.get(image["id"], "")) for image in annotations["images"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{file}: not COCO's caption annotations ({error!r} is missing).") from error
    beside = file.stem.removeprefix("captions_")
    guesses = (file.parent / beside, file.parent.parent / beside, file.parent)
    folder = root if root is not None else next((guess for guess in guesses if guess.is_dir()), file.parent)
    examples = [Example(folder / name, text) for name, text in rows]
    there = [example for example in examples if isinstance(example.image, Path) and example.image.is_file()]
    if not there:
        raise DataError(
            f"{file}: none of its {len(rows)} images is in {folder}. Download the images, and name their folder "
            "with --root."
        )
    if len(there) < len(examples):
        log.warning("%d of %d images are not in %s and are left out", len(examples) - len(there), len(rows), folder)
    return there

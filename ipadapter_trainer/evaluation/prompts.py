"""Image prompts of an evaluation, with their CLIP embeddings, in a random order that only the seed decides."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..data.examples import Example, find_examples
from ..data.face_embeds import face_id_embed
from ..data.files import whole_text
from ..data.shard_files import is_shards
from ..errors import DataError, EvaluationError
from .clip import ClipModel, clip_i
from .generate_images import open_image

COCO_IMAGES = 5000  # in val2017
_CHUNK = 32  # images in memory at once
_SAME = 0.9999  # cosine above which two embeddings are of the same image; batches round differently

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Prompt:
    """An image prompt and its caption. `index` is the position of the example in the data set."""

    index: int
    example: Example
    image_embed: Tensor  # [D], of unit length
    text_embed: Tensor | None  # [D], of unit length; None without a caption

    @property
    def name(self) -> str:
        """For messages and scores."""
        image = self.example.prompt_image
        return str(image) if isinstance(image, Path) else self.example.name


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts by their index, in random order. `different` holds for each of them the next prompt with another image,
    None if all images are the same. `skipped` has an error message for each prompt that cannot be read.
    """

    by_index: dict[int, Prompt]
    different: dict[int, Prompt | None]
    skipped: list[str]


def read_examples(data: Path, root: Path | None = None, require_caption: bool = False) -> list[Example]:
    """The examples of a data set as `find_examples` reads it, or of COCO's captions_val2017.json with the first caption
    of each image. COCO's images are in `root`; default: the folder val2017 next to the annotations or their folder.

    Raises DataError as `find_examples` does, EvaluationError for shards.
    """
    if is_shards(data):
        raise EvaluationError(f"{data}: an evaluation cannot read shards, as it needs random access. Unpack them.")
    annotations = _coco_annotations(data) if data.suffix == ".json" and data.is_file() else None
    if annotations is None:
        return find_examples(data, root, require_caption)
    return _coco_examples(annotations, data, root)


def is_coco(data: Path, examples: Sequence[Example]) -> bool:
    """Whether this is, by its name and size, all of COCO val2017."""
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
    """Shuffle the examples with `seed` and embed the first `limit`, so that a higher limit only adds prompts.

    With `face_dim`, prompts without a readable face embedding of that size are skipped. Raises DataError if all are.
    """
    embed = partial(_embed, examples, clip, caption_prefix, face_dim)
    order = random.Random(f"{seed}/order").sample(range(len(examples)), len(examples))
    drawn = order[:limit]
    prompts: list[Prompt] = []
    skipped: list[str] = []
    with tqdm(total=len(drawn), desc="prompts", unit="image", disable=not progress_bar) as bar:
        for start in range(0, len(drawn), _CHUNK):
            chunk = drawn[start : start + _CHUNK]
            embedded, errors = embed(chunk)
            prompts += embedded
            skipped += errors
            bar.update(len(chunk))
    if not prompts:
        raise DataError(f"None of the {len(drawn)} prompts can be read. The first: {skipped[0]}")
    if skipped:
        log.warning("%d of %d prompts cannot be read and are skipped, such as %s", len(skipped), len(drawn), skipped[0])
    beyond = (prompt for index in order[len(drawn) :] for prompt in embed([index])[0])
    return Prompts({prompt.index: prompt for prompt in prompts}, _different(prompts, beyond), skipped)


def _embed(
    examples: Sequence[Example],
    clip: ClipModel,
    caption_prefix: str,
    face_dim: int | None,
    indices: Sequence[int],
) -> tuple[list[Prompt], list[str]]:
    """The prompts that can be read, and an error message for each of the rest."""
    images: dict[int, Image.Image] = {}
    errors: list[str] = []
    for index in indices:
        try:
            if face_dim is not None:
                face_id_embed(examples[index], face_dim)
            images[index] = open_image(examples[index].prompt_image)
        except DataError as error:
            errors.append(str(error))
    if not images:
        return [], errors
    captions = {index: caption_prefix + examples[index].text for index in images if examples[index].text}
    image_embeds = dict(zip(images, clip.embed_images(list(images.values())), strict=True))
    text_embeds = dict(zip(captions, clip.embed_texts(list(captions.values())), strict=True)) if captions else {}
    return [Prompt(i, examples[i], image_embeds[i], text_embeds.get(i)) for i in images], errors


def _different(prompts: Sequence[Prompt], beyond: Iterator[Prompt]) -> dict[int, Prompt | None]:
    """For each prompt the next one with another image: up to the last prompt, then in `beyond`, then from the first.

    `beyond` is read only as far as needed.
    """
    line = list(prompts)

    def following(position: int) -> Iterator[Prompt]:
        yield from islice(line, position + 1, None)
        for prompt in beyond:
            line.append(prompt)
            yield prompt
        yield from islice(line, position)

    def differs(one: Prompt) -> Callable[[Prompt], bool]:
        return lambda other: float(clip_i(one.image_embed, other.image_embed)) < _SAME

    return {p.index: next(filter(differs(p), following(position)), None) for position, p in enumerate(prompts)}


def _coco_annotations(file: Path) -> dict[str, Any] | None:
    """COCO's annotations, or None for another JSON file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return None  # find_examples reports it
    return content if isinstance(content, dict) and {"images", "annotations"} <= set(content) else None


def _coco_examples(annotations: dict[str, Any], file: Path, root: Path | None) -> list[Example]:
    captions: dict[Any, str] = {}
    try:
        for annotation in annotations["annotations"]:
            image, caption = annotation["image_id"], str(annotation["caption"]).strip()
            captions.setdefault(image, whole_text(caption, f"{file}: a caption of image {image}"))
        rows = [(str(image["file_name"]), captions.get(image["id"], "")) for image in annotations["images"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{file}: not COCO's caption annotations ({error!r} is missing).") from error
    split = file.stem.removeprefix("captions_")
    guesses = (file.parent / split, file.parent.parent / split)
    folder = root or next((guess for guess in guesses if guess.is_dir()), file.parent)
    examples = [Example(folder / name, text) for name, text in rows if (folder / name).is_file()]
    if not examples:
        raise DataError(
            f"{file}: none of its {len(rows)} images is in {folder}. Download the images, and set data_root to their "
            "folder."
        )
    if len(examples) < len(rows):
        log.warning("%d of %d images are not in %s and are skipped", len(rows) - len(examples), len(rows), folder)
    return examples

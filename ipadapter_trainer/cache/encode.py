"""The tensors of a cache's shards: worker processes make the models' inputs, the frozen models the outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..data.augmentation import Augmentation, crop_params
from ..data.dataset import worker_options
from ..data.examples import Example
from ..data.from_config import augmentation_from_config
from ..data.images import StoredImage, why_unreadable
from ..data.preprocess import Preprocessor, image_tensors, open_image, reference_tensor, tokenize
from ..errors import CacheError
from ..models.base_model import BaseModel
from ..models.conditioning import encode_tokens
from ..models.features import encode_moments
from ..models.from_config import preprocessor_from_config
from ..models.image_features import encode_clip_images
from ..settings.config import TrainConfig
from .plan import SIZES, CacheSettings, Shard, distinct_captions, distinct_references
from .quantise import pack_features


@dataclass(frozen=True, eq=False)
class RowDataset(Dataset[dict[str, Any]]):
    """The models' inputs for a row, indexed by (shard, position in the shard): `text_input_ids` [L] of a caption;
    `clip_images` [V, 3, S, S] of a reference; `images` [V, 3, H, W], sizes [V, 2] and, for an image that is its own
    reference, `clip_images` of an image. `broken` is why the image could not be read, or ""; a blank one replaces it.

    The variants are the random crops of epochs 0, 1, ...; with flips, each is followed by its mirror image.
    """

    shards: Sequence[Shard]
    examples: Sequence[Example]
    captions: Sequence[str]
    references: Sequence[StoredImage]
    preprocessor: Preprocessor
    augmentation: Augmentation

    def __getitem__(self, index: tuple[int, int]) -> dict[str, Any]:
        shard = self.shards[index[0]]
        row = int(shard.rows[index[1]])
        if shard.table == "captions":
            ids = tokenize(self.preprocessor.tokenizers, [self.captions[row]], self.preprocessor.text_length)
            names = ("text_input_ids", "text_input_ids_2")
            return {"broken": "", **{name: rows[0] for name, rows in zip(names, ids, strict=False)}}
        image = self.references[row] if shard.table == "references" else self.examples[row].image
        try:
            return {"broken": "", **self._variants(shard, row, image)}
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
            blank = Image.new("RGB", (64, 64))
            return {"broken": f"{image}: {why_unreadable(error)}", **self._variants(shard, row, blank)}

    def _variants(self, shard: Shard, row: int, image: StoredImage) -> dict[str, Tensor]:
        augmentation, preprocessor = self.augmentation, self.preprocessor
        size = shard.size or (augmentation.resolution, augmentation.resolution)
        opened = open_image(preprocessor, augmentation, size, image)
        latents, features = (len(shard.tensors.get(name, ())) for name in ("latents_mean", "image_features"))
        if not features:
            preprocessor = replace(preprocessor, image_processor=None)
        flips = 2 if augmentation.flip else 1
        variants: list[dict[str, Tensor]] = []
        for variant in range(max(latents, features)):
            name = row if latents else f"reference {row}"
            crop = crop_params(augmentation, (augmentation.seed, variant // flips, name))
            crop = replace(crop, flip=variant % flips == 1, own_reference=True)
            if latents:
                variants.append(image_tensors(preprocessor, augmentation, size, crop, opened))
            else:
                variants.append({"clip_images": reference_tensor(preprocessor, crop, opened[0])})
        tensors = {key: torch.stack([variant[key] for variant in variants]) for key in variants[0]}
        return {key: value if key == "clip_images" else value[:latents] for key, value in tensors.items()}


def encode_shards(
    config: TrainConfig,
    base_model: BaseModel,
    settings: CacheSettings,
    examples: Sequence[Example],
    shards: Sequence[Shard],
    *,
    progress_bar: bool = False,
) -> Iterator[tuple[Shard, dict[str, Tensor], dict[int, str]]]:
    """The tensors of shards, and the rows that could not be read with the reasons.

    Raises CacheError for values that the tensors cannot hold.
    """
    preprocessor, augmentation = preprocessor_from_config(config, base_model), augmentation_from_config(config)
    captions, references = distinct_captions(examples), distinct_references(examples)
    dataset = RowDataset(shards, examples, captions, references, preprocessor, augmentation)
    for table, part in groupby(enumerate(shards), key=lambda numbered: numbered[1].table):
        if table != "captions":
            base_model.release("text_encoders")
        size = config.batch_size if table == "captions" else max(1, config.batch_size // settings.variants())
        batches = [
            [(number, position) for position in range(start, min(start + size, len(shard.rows)))]
            for number, shard in part
            for start in range(0, len(shard.rows), size)
        ]
        options = worker_options(config.num_workers, pin=base_model.device.type == "cuda")
        loader = DataLoader(dataset, batch_sampler=batches, **options)
        inputs = zip(batches, tqdm(loader, table, unit="batch", disable=not progress_bar), strict=True)
        for number, group in groupby(inputs, key=lambda pair: pair[0][0][0]):
            shard = shards[number]
            yield shard, *_encode_shard(base_model, settings, shard, (batch for _, batch in group))


def _encode_shard(
    base_model: BaseModel, settings: CacheSettings, shard: Shard, batches: Iterable[dict[str, Any]]
) -> tuple[dict[str, Tensor], dict[int, str]]:
    parts: dict[str, list[Tensor]] = {key: [] for key in shard.tensors}
    reasons: list[str] = []
    for inputs in batches:
        reasons += inputs["broken"]
        for key, value in _encode(base_model, settings, inputs).items():
            parts[key].append(value.to("cpu", shard.tensors[key].dtype))
    tensors = {key: torch.cat(values) for key, values in parts.items()}
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise CacheError(
                f"{key} of {shard.file} has values that are not finite in {dtype}: an encoder overflows in its "
                "precision. Set mixed_precision=no, or check the base model's files."
            )
    broken = {row: reason for row, reason in zip(shard.rows.tolist(), reasons, strict=True) if reason}
    return {**tensors, "row": torch.from_numpy(shard.rows)}, broken


def _encode(base_model: BaseModel, settings: CacheSettings, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """A batch of rows -> the tensors of a shard, by name."""
    outputs: dict[str, Tensor] = {key: inputs[key] for key in SIZES if key in inputs}
    if "text_input_ids" in inputs:
        text = encode_tokens(base_model, inputs["text_input_ids"], inputs.get("text_input_ids_2"))
        outputs |= {"text_states": text.states} | ({} if text.pooled is None else {"text_embeds": text.pooled})
    if "images" in inputs:
        shape = inputs["images"].shape[:2]
        mean, std = encode_moments(base_model, inputs["images"].flatten(0, 1))
        outputs |= {"latents_mean": mean.unflatten(0, shape), "latents_std": std.unflatten(0, shape)}
    if "clip_images" in inputs:
        assert settings.image_feature is not None
        shape = inputs["clip_images"].shape[:2]
        features = encode_clip_images(base_model, inputs["clip_images"].flatten(0, 1), settings.image_feature)
        outputs |= pack_features(features.unflatten(0, shape), settings.cache_image_features == "int8")
    return outputs

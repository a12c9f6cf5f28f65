"""The tensors of a cache's shards: worker processes make the models' inputs, the frozen models the outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from ..data.images import StoredImage, file_size, why_unreadable
from ..data.preprocess import Preprocessor, image_tensors, open_image, reference_tensor, tokenize
from ..errors import CacheError
from ..models.base_model import BaseModel
from ..models.conditioning import encode_tokens
from ..models.features import encode_moments
from ..models.from_config import preprocessor_from_config
from ..models.image_features import encode_clip_images
from ..settings.config import TrainConfig
from .files import SIZES
from .plan import Shard, cache_rows, variants
from .quantise import pack_features


@dataclass(frozen=True, eq=False)
class RowDataset(Dataset[dict[str, Any]]):
    """The models' inputs for a row, indexed by (number of the shard, row): `text_input_ids` [1, L] of a caption;
    `clip_images` [V, 3, S, S] of a reference; `images` [V, 3, H, W], sizes [V, 2] and, if it is its own reference,
    `clip_images` of an image. `broken` is why the image could not be read, or ""; a blank one replaces it.

    The variants are the random crops of epochs 0, 1, ...; with flips, each is followed by its mirror image.
    """

    shards: Sequence[Shard]
    sources: Sequence[Any]  # of the rows
    preprocessor: Preprocessor
    augmentation: Augmentation

    def __getitem__(self, index: tuple[int, int]) -> dict[str, Any]:
        shard, row = self.shards[index[0]], index[1]
        source = self.sources[row]
        if shard.table == "captions":
            ids = tokenize(self.preprocessor.tokenizers, [source], self.preprocessor.text_length)
            names = ("text_input_ids", "text_input_ids_2")
            return {"broken": "", **dict(zip(names, ids, strict=False))}
        try:
            return {"broken": "", **self._variants(shard, row, source)}
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
            blank = Image.new("RGB", (64, 64))
            return {"broken": f"{source}: {why_unreadable(error)}", **self._variants(shard, row, blank)}

    def _variants(self, shard: Shard, row: int, image: StoredImage) -> dict[str, Tensor]:
        preprocessor, augmentation = self.preprocessor, self.augmentation
        opened = open_image(preprocessor, augmentation, shard.size, image)
        latents, features = (len(shard.tensors.get(name, ())) for name in ("latents_mean", "image_features"))
        if not features:
            preprocessor = replace(preprocessor, image_processor=None)
        flips = 2 if augmentation.flip else 1
        crops: list[dict[str, Tensor]] = []
        for variant in range(max(latents, features)):
            key = (augmentation.seed, variant // flips, row if latents else f"reference {row}")
            crop = replace(crop_params(augmentation, key), flip=variant % flips == 1, own_reference=True)
            if latents:
                crops.append(image_tensors(preprocessor, augmentation, shard.size, crop, opened))
            else:
                crops.append({"clip_images": reference_tensor(preprocessor, crop, opened[0])})
        tensors = {key: torch.stack([crop[key] for crop in crops]) for key in crops[0]}
        return {key: value if key == "clip_images" else value[:latents] for key, value in tensors.items()}


def encode_shards(
    config: TrainConfig,
    base_model: BaseModel,
    settings: Mapping[str, Any],
    examples: Sequence[Example],
    shards: Sequence[Shard],
    *,
    progress_bar: bool = False,
) -> Iterator[tuple[Shard, dict[str, Tensor], dict[int, str]]]:
    """The tensors of shards, and the rows that could not be read with the reasons.

    Raises CacheError for values that the tensors cannot hold.
    """
    batches: list[list[tuple[int, int]]] = []
    for number, shard in enumerate(shards):
        size = config.batch_size if shard.table == "captions" else max(1, config.batch_size // variants(settings))
        indices = [(number, row) for row in shard.rows.tolist()]
        batches += [indices[start : start + size] for start in range(0, len(indices), size)]
    preprocessor, augmentation = preprocessor_from_config(config, base_model), augmentation_from_config(config)
    sources = cache_rows(settings, examples)
    dataset = RowDataset(shards, sources, preprocessor, augmentation)
    options = worker_options(config.num_workers, pin=base_model.device.type == "cuda")
    loader = DataLoader(dataset, batch_sampler=batches, **options)
    inputs = iter(tqdm(loader, unit="batch", disable=not progress_bar))
    for shard in shards:
        if shard.table != "captions":
            base_model.release("text_encoders")
        tensors = {k: torch.empty(len(shard.rows), *row.shape, dtype=row.dtype) for k, row in shard.tensors.items()}
        reasons: list[str] = []
        while len(reasons) < len(shard.rows):
            batch = next(inputs)
            span = slice(len(reasons), len(reasons) + len(batch["broken"]))
            for key, value in _encode(base_model, settings, batch).items():
                tensors[key][span] = value.to("cpu", tensors[key].dtype)
            reasons += batch["broken"]
        rows = shard.rows.tolist()
        if "file_size" in tensors:
            sizes = [0 if reason else file_size(sources[row]) for row, reason in zip(rows, reasons, strict=True)]
            tensors["file_size"] = torch.tensor(sizes)
        for key, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise CacheError(
                    f"{key} of {shard.file} has values that are not finite in {str(tensor.dtype)[6:]}: an encoder "
                    "overflows in its precision. Set mixed_precision=no, or check the base model's files."
                )
        broken = {row: reason for row, reason in zip(rows, reasons, strict=True) if reason}
        yield shard, {**tensors, "row": torch.from_numpy(shard.rows)}, broken


def _encode(base_model: BaseModel, settings: Mapping[str, Any], inputs: dict[str, Any]) -> dict[str, Tensor]:
    """A batch of rows -> the tensors of a shard, by name."""
    rows = len(inputs["broken"])
    flat: dict[str, Tensor] = {key: value.flatten(0, 1) for key, value in inputs.items() if key != "broken"}
    outputs = {key: flat[key] for key in SIZES if key in flat}
    if "text_input_ids" in flat:
        text = encode_tokens(base_model, flat["text_input_ids"], flat.get("text_input_ids_2"))
        outputs |= {"text_states": text.states} | ({} if text.pooled is None else {"text_embeds": text.pooled})
    if "images" in flat:
        outputs["latents_mean"], outputs["latents_std"] = encode_moments(base_model, flat["images"])
    if "clip_images" in flat:
        features = encode_clip_images(base_model, flat["clip_images"], settings["image_feature"])
        outputs |= pack_features(features, settings["cache_image_features"] == "int8")
    return {key: value.unflatten(0, (rows, -1)) for key, value in outputs.items()}

"""The rows of a feature cache: worker processes make the models' inputs, the frozen models the outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..data.augmentation import Augmentation, CropParams, crop_params
from ..data.dataset import worker_options
from ..data.examples import Example
from ..data.images import Size, StoredImage, why_unreadable
from ..data.preprocess import Preprocessor, image_tensors, open_image, reference_tensor, tokenize
from ..errors import CacheError
from ..models.base_model import BaseModel
from ..models.conditioning import encode_tokens
from ..models.features import encode_moments
from ..models.image_features import encode_clip_images
from .plan import SIZES, CacheSettings, Shard
from .quantise import pack_features

RowIndex = tuple[str, int, Size | None, bool]  # table, row, bucket, whether image features are stored
Inputs = tuple[dict[str, Tensor], str]  # of a row, and why it could not be read, or ""


@dataclass(frozen=True, eq=False)
class RowDataset(Dataset[Inputs]):
    """The models' inputs for a row: `text_input_ids` [L] of a caption; `clip_images` [V, 3, S, S] of a reference;
    `images` [V, 3, H, W], sizes [V, 2] and, for an image that is its own reference, `clip_images` of an image.

    The variants of an image are the random crops of epochs 0, 1, ...; with flips, each is followed by its mirror image.
    """

    examples: Sequence[Example]
    captions: Sequence[str]
    references: Sequence[StoredImage]
    preprocessor: Preprocessor
    augmentation: Augmentation
    settings: CacheSettings

    def __getitem__(self, index: RowIndex) -> Inputs:
        table, row, size, encoded = index
        if table == "captions":
            return self._caption(self.captions[row]), ""
        try:
            return self._reference(row) if size is None else self._image(row, size, encoded), ""
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
            name = self.references[row] if size is None else self.examples[row].name
            return {}, f"{name}: {why_unreadable(error)}"

    def _caption(self, text: str) -> dict[str, Tensor]:
        ids = tokenize(self.preprocessor.tokenizers, [text], self.preprocessor.text_length)
        return {key: rows[0] for key, rows in zip(("text_input_ids", "text_input_ids_2"), ids, strict=False)}

    def _reference(self, row: int) -> dict[str, Tensor]:
        square = (self.settings.resolution, self.settings.resolution)
        image, _ = open_image(self.preprocessor, self.augmentation, square, self.references[row])
        crops = self._crops(f"reference {row}", self.settings.reference_variants)
        return {"clip_images": torch.stack([reference_tensor(self.preprocessor, crop, image) for crop in crops])}

    def _image(self, row: int, size: Size, encoded: bool) -> dict[str, Tensor]:
        opened = open_image(self.preprocessor, self.augmentation, size, self.examples[row].image)
        preprocessor = self.preprocessor if encoded else replace(self.preprocessor, image_processor=None)
        crops = self._crops(row, self.settings.variants if encoded else self.settings.latent_variants)
        variants = [image_tensors(preprocessor, self.augmentation, size, crop, opened) for crop in crops]
        latents = variants[: self.settings.latent_variants]
        return {
            key: torch.stack([tensors[key] for tensors in (variants if key == "clip_images" else latents)])
            for key in variants[0]
        }

    def _crops(self, name: int | str, variants: int) -> Iterator[CropParams]:
        flips = 2 if self.settings.flip else 1
        for variant in range(variants):
            crop = crop_params(self.augmentation, (self.augmentation.seed, variant // flips, name))
            yield replace(crop, flip=variant % flips == 1, own_reference=True)


def collate_rows(items: Sequence[Inputs]) -> tuple[dict[str, Tensor], list[str]]:
    """The inputs of the readable rows as a batch, and for every row why it could not be read, or ""."""
    readable = [tensors for tensors, reason in items if not reason]
    batch = {key: torch.stack([tensors[key] for tensors in readable]) for key in (readable[0] if readable else ())}
    return batch, [reason for _, reason in items]


def encode_rows(base_model: BaseModel, settings: CacheSettings, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch of `collate_rows` -> the tensors of a shard, by name."""
    outputs = {key: inputs[key] for key in SIZES if key in inputs}
    if "text_input_ids" in inputs:
        text = encode_tokens(base_model, inputs["text_input_ids"], inputs.get("text_input_ids_2"))
        outputs["text_states"] = text.states
        if text.pooled is not None:
            outputs["text_embeds"] = text.pooled
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


def encode_shards(
    base_model: BaseModel, dataset: RowDataset, shards: Sequence[Shard], batch_size: int, num_workers: int, bar: tqdm
) -> Iterator[tuple[Shard, dict[str, Tensor], dict[int, str]]]:
    """The tensors of shards of one table, and the rows that could not be read with the reasons.

    Raises CacheError for values that the tensors cannot hold.
    """
    if not shards:
        return
    batches = [
        (shard, range(start, min(start + batch_size, len(shard.rows))))
        for shard in shards
        for start in range(0, len(shard.rows), batch_size)
    ]
    indices = [
        [(shard.table, int(shard.rows[i]), shard.size, "image_features" in shard.tensors) for i in places]
        for shard, places in batches
    ]
    options = worker_options(num_workers, pin=base_model.device.type == "cuda")
    loader = DataLoader(dataset, batch_sampler=indices, collate_fn=collate_rows, **options)
    for shard, group in groupby(zip(batches, loader, strict=True), key=lambda batch: batch[0][0]):
        # Rows that cannot be read stay ones: a shard that ends in zeros would count as damaged.
        tensors = {key: torch.ones(len(shard.rows), *row.shape, dtype=row.dtype) for key, row in shard.tensors.items()}
        tensors["row"] = torch.from_numpy(shard.rows)
        broken: dict[int, str] = {}
        for (_, places), (inputs, reasons) in group:
            broken |= {int(shard.rows[i]): reason for i, reason in zip(places, reasons, strict=True) if reason}
            readable = [i for i, reason in zip(places, reasons, strict=True) if not reason]
            for key, value in (encode_rows(base_model, dataset.settings, inputs) if readable else {}).items():
                tensors[key][readable] = value.to("cpu", tensors[key].dtype)
            bar.update(len(places))
        for key, tensor in tensors.items():
            if not tensor.isfinite().all():
                dtype = str(tensor.dtype).removeprefix("torch.")
                raise CacheError(
                    f"{key} of {shard.file} has values that are not finite in {dtype}: an encoder overflows in its "
                    "precision. Set mixed_precision=no, or check the base model's files."
                )
        yield shard, tensors, broken

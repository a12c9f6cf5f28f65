"""The common part of all old apply nodes: images or EMBEDS -> an image prompt in the model, with the old numbers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from ...ipadapter_core import AdapterError, Scaling
from ...ipadapter_core.image_prompt import combine_features
from ..faces import check_faces, crop_size
from ..install import apply_prompt, switch_off
from ..types import EncodedImages, ImagePrompt
from .old_faces import read_faces
from .old_features import image_features, unconditional
from .old_weights import Shares, layer_shares
from .setting import is_corrected
from .wires import Pipeline

_log = logging.getLogger("ip_adapter_kit")


@dataclass(frozen=True, eq=False)
class OldPrompt:
    """The inputs of the old apply nodes. `unfold`: image i is for latent i; then `weight` may be a list."""

    image: Tensor | None = None
    image_composition: Tensor | None = None
    image_negative: Tensor | None = None
    pos_embed: Tensor | None = None
    neg_embed: Tensor | None = None
    weight: Any = 1.0
    weight_composition: Any = 1.0
    weight_faceidv2: float | None = None
    weight_kolors: float = 1.0
    weight_type: str = "linear"
    combine_embeds: str = "concat"
    start_at: float = 0.0
    end_at: float = 1.0
    attn_mask: Tensor | None = None
    unfold: bool = False
    embeds_scaling: str = "V only"
    layer_weights: str | None = None
    encode_batch_size: int = 0
    style_boost: float | None = None
    composition_boost: float | None = None
    enhance_tiles: int = 1
    enhance_ratio: float = 1.0

    @property
    def weights(self) -> list[float]:
        """One weight, or with `unfold` one for each image."""
        listed = list(self.weight) if isinstance(self.weight, list | tuple) else [self.weight]
        if not listed:
            raise AdapterError("weight is an empty list. Connect at least one weight.")
        return [float(weight) for weight in (listed if self.unfold else listed[:1])]


def apply_old(model: Any, pipeline: Pipeline, node: str, *prompts: OldPrompt) -> tuple[Any, Tensor | None]:
    """A clone of the model with the prompts in it, one after the other, and the face crops of the last. `node` is the
    title of the node, for the log.
    """
    patched, faces = model.clone(), None
    for prompt in prompts:
        patched, faces = _apply_one(patched, pipeline, node, prompt)
    return patched, faces


def _apply_one(model: Any, pipeline: Pipeline, node: str, prompt: OldPrompt) -> tuple[Any, Tensor | None]:
    shares = layer_shares(model, prompt)
    encoded, faces = _encode(pipeline, node, prompt)
    if prompt.start_at >= prompt.end_at:
        _log.warning(
            "%s: start_at %g is not below end_at %g, so the image prompt acts in no step.",
            node,
            prompt.start_at,
            prompt.end_at,
        )
        shares = []
    if not shares:
        switch_off(model)
    for part in shares:
        made = _image_prompt(pipeline, encoded, part, prompt)
        model = apply_prompt(
            model,
            pipeline.adapter,
            made,
            weights=part.layers,
            start_at=prompt.start_at,
            end_at=prompt.end_at,
            scaling=cast("Scaling", prompt.embeds_scaling),
            attn_mask=prompt.attn_mask,
            token_scale=prompt.weight_kolors if pipeline.adapter.spec.token_dim is not None else 1.0,
            lora_strength=0.0,  # the unified loader adds the LoRA's own file
            checked=False,
            node=node,
        )
    return model, faces


@dataclass(frozen=True, eq=False)
class _Encoded:
    """Features of the image, of the composition image, and of the negative branch."""

    positive: EncodedImages
    negative: EncodedImages
    composition: EncodedImages | None = None


def _encode(pipeline: Pipeline, node: str, prompt: OldPrompt) -> tuple[_Encoded, Tensor | None]:
    spec = pipeline.adapter.spec
    options = {"batch_size": prompt.encode_batch_size}
    enhanced = {**options, "tiles": prompt.enhance_tiles, "ratio": prompt.enhance_ratio}
    image, face, faces, composition = prompt.image, None, None, None
    if prompt.pos_embed is not None:
        if spec.face_dim is not None:
            raise AdapterError(
                f"{pipeline.adapter.name} is a {spec.kind} adapter: it needs faces, which EMBEDS do not hold. Use "
                "IPAdapter FaceID."
            )
        features = prompt.pos_embed
        negative = unconditional(pipeline, features) if prompt.neg_embed is None else prompt.neg_embed
        return _Encoded(_images(features), _images(_sized(negative, len(features)))), None
    if image is None:
        raise AdapterError("Neither an image nor EMBEDS are connected. Connect one of them.")
    if spec.face_dim is not None:
        if pipeline.insightface is None:
            raise AdapterError(
                f"{pipeline.adapter.name} is a {spec.kind} adapter and needs insightface. Connect IPAdapter "
                "InsightFace Loader, or IPAdapter Unified Loader FaceID."
            )
        # The old pack asks for raw embeddings by the file's name, which no Kolors file has.
        raw = spec.unnormalised and (is_corrected() or not spec.is_kolors)
        face, faces = read_faces(pipeline.insightface, image, crop=crop_size(spec), normalised=not raw)
        check_faces(pipeline.adapter, face, "The connected insightface")
        image = faces
    features = None if spec.image_dim is None else image_features(pipeline, image, **enhanced)
    if features is None:
        negative = None
    else:
        negative = _sized(unconditional(pipeline, features, prompt.image_negative, **options), len(features))
    if prompt.image_composition is not None and features is not None:
        composition = image_features(pipeline, prompt.image_composition, **enhanced)
    negative_face = None if face is None else torch.zeros_like(face)
    if prompt.combine_embeds != "concat" and not prompt.unfold:
        several = any(part is not None and len(part) > 1 for part in (features, face))
        if several:
            features, face = (
                None if part is None else combine_features(part, prompt.combine_embeds) for part in (features, face)
            )
            negative, negative_face = (None if part is None else part[:1] for part in (negative, negative_face))
        if composition is not None and (several or is_corrected()):
            composition = combine_features(composition, prompt.combine_embeds)
        elif composition is not None and len(composition) > 1:  # the old pack looks at the style images alone
            _log.warning(
                "%s: combine_embeds %r has no effect on the %d composition images beside one style image, as in "
                "ComfyUI_IPAdapter_plus: their tokens are joined.",
                node,
                prompt.combine_embeds,
                len(composition),
            )
    comp = None if composition is None else _images(composition)
    return _Encoded(_images(features, face), _images(negative, negative_face), comp), faces


def _image_prompt(pipeline: Pipeline, encoded: _Encoded, part: Shares, prompt: OldPrompt) -> ImagePrompt:
    positive = encoded.composition if part.of_composition and encoded.composition is not None else encoded.positive
    count = max(len(positive), len(part.weights)) if prompt.unfold else len(positive)
    weights = tuple(part.weights[min(index, len(part.weights) - 1)] for index in range(count))
    positive = _repeated(positive, count, weights)
    alike = prompt.unfold and len(set(weights)) == 1 and len(encoded.negative) == 1
    likeness = prompt.weight_faceidv2
    return ImagePrompt(
        positive,
        _repeated(encoded.negative, 1 if alike else count, weights[:1] if alike else weights),
        one_each=prompt.unfold,
        likeness=prompt.weights[0] * 2 if likeness is None else float(likeness),
    )


def _images(image: Tensor | None, face: Tensor | None = None) -> EncodedImages:
    first = next(part for part in (image, face) if part is not None)
    return EncodedImages(image, face, (1.0,) * len(first))


def _repeated(images: EncodedImages, count: int, weights: tuple[float, ...]) -> EncodedImages:
    """As many images as weights: the last one again, or the first ones."""
    image, face = (None if part is None else _sized(part, count) for part in (images.image, images.face))
    return replace(images, image=image, face=face, weights=weights)


def _sized(features: Tensor, count: int) -> Tensor:
    rows: Sequence[int] = [min(index, len(features) - 1) for index in range(count)]
    return features[list(rows)]

"""Faces in images: detection, embeddings and aligned crops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

from ..ipadapter_core import AdapterError, AdapterSpec
from ..ipadapter_core.image_prompt import rgb_pixels
from ..ipadapter_core.masks import one_of
from .face_analysis import FaceAnalysis
from .types import LoadedAdapter

ORDERS = ("largest", "left to right", "most certain")
NO_FACE = ("error", "skip")
_DETECTION_SIZES = range(640, 255, -64)  # a face that fills the image is found when the image is made smaller
_ADVICE = "Use an image that shows a whole face, seen from the front, with some space around it."


@dataclass(frozen=True, eq=False)
class Face:
    """A face in an image, in pixels: box (left, top, right, bottom) and five landmarks, a NumPy array [5, 2]."""

    box: tuple[float, float, float, float]
    landmarks: Any
    certainty: float


class FaceFeatures(NamedTuple):
    """One face of each image that has one: embeddings [N, F], aligned crops [N, S, S, 3] in 0..1, and the rows of these
    images in the batch.
    """

    embeddings: Tensor
    crops: Tensor
    rows: tuple[int, ...]


def find_faces(analysis: FaceAnalysis, image: Tensor) -> tuple[Face, ...]:
    """The faces in an image [H, W, 3] of 0..1, the most certain first; looked for at several sizes until there are."""
    pixels = _bgr(image)
    for size in _DETECTION_SIZES:
        boxes, landmarks = analysis.detector.detect(pixels, input_size=(size, size))
        if len(boxes):
            return tuple(
                Face((left, top, right, bottom), points, certainty)
                for (left, top, right, bottom, certainty), points in zip(boxes.tolist(), landmarks, strict=True)
            )
    return ()


def choose_face(faces: tuple[Face, ...], order: str = "largest", index: int = 0) -> Face | None:
    """The face at `index`, counted from 0, in this order; None when there are fewer.

    Raises AdapterError for an unknown order.
    """
    if order == "largest":
        faces = tuple(sorted(faces, key=lambda face: _area(face.box), reverse=True))
    elif order == "left to right":
        faces = tuple(sorted(faces, key=lambda face: face.box[0] + face.box[2]))
    elif order != "most certain":
        raise AdapterError(f"Unknown order of faces {order!r}. Use one of: {', '.join(ORDERS)}.")
    return faces[index] if 0 <= index < len(faces) else None


def face_features(
    analysis: FaceAnalysis,
    image: Tensor,
    size: int,
    *,
    unnormalised: bool = False,
    order: str = "largest",
    index: int = 0,
    no_face: str = "error",
) -> FaceFeatures:
    """One face of each image [B, H, W, C]. `size` is that of the crops, a multiple of 112 or 128; `unnormalised` asks
    for embeddings as the model makes them, else they have the length 1.

    Raises AdapterError when an image has no such face and `no_face` is "error", and when no image has one.
    """
    from insightface.app.common import Face as Seen  # noqa: PLC0415
    from insightface.utils.face_align import norm_crop  # noqa: PLC0415

    images = rgb_pixels(image, "image").movedim(1, -1)
    progress = comfy.utils.ProgressBar(len(images))
    embeddings: list[Tensor] = []
    crops: list[Tensor] = []
    rows: list[int] = []
    for row, one in enumerate(images):
        comfy.model_management.throw_exception_if_processing_interrupted()
        faces = find_faces(analysis, one)
        face = choose_face(faces, order, index)
        if face is None and no_face == "error":
            raise AdapterError(_no_such_face(len(faces), index, one_of("image", row, images)))
        if face is not None:
            pixels = _bgr(one)
            seen = Seen(kps=face.landmarks)
            analysis.recognizer.get(pixels, seen)
            embedding = torch.from_numpy(seen.embedding if unnormalised else seen.normed_embedding).float()
            if not torch.isfinite(embedding).all():
                raise AdapterError(f"The recognition model of {analysis.name} makes NaN of a face. Download it again.")
            embeddings.append(embedding)
            crop = norm_crop(pixels, landmark=face.landmarks, image_size=size)
            crops.append(torch.from_numpy(crop[..., ::-1].copy()).float() / 255.0)
            rows.append(row)
        progress.update(1)
    if not rows:
        which = f"the face at face_index {index}" if index else "a face"
        raise AdapterError(f"None of the {len(images)} images shows {which}, so nothing is left to encode. {_ADVICE}")
    return FaceFeatures(torch.stack(embeddings), torch.stack(crops), tuple(rows))


def crop_size(spec: AdapterSpec) -> int:
    """The side of the aligned crop, as in ComfyUI_IPAdapter_plus."""
    return 336 if spec.is_kolors else 256 if spec.cross_attention_dim == 2048 else 224


def check_faces(ip_adapter: LoadedAdapter, embeddings: Tensor, models: str) -> None:
    """Raises AdapterError for embeddings of face models that the adapter was not trained with."""
    if embeddings.shape[1] != ip_adapter.spec.face_dim:
        raise AdapterError(
            f"{models} makes face embeddings of {embeddings.shape[1]}, {ip_adapter.name} takes "
            f"{ip_adapter.spec.face_dim}. Choose the face models that it was trained with, such as buffalo_l."
        )


def _no_such_face(found: int, index: int, image: str) -> str:
    if not found:
        return f"{image} shows no face that was found. {_ADVICE}"
    faces = "1 face" if found == 1 else f"{found} faces"
    return f"{image} shows {faces}; face_index {index} is beyond them (it counts from 0). Choose a smaller face_index."


def _area(box: tuple[float, float, float, float]) -> float:
    left, top, right, bottom = box
    return (right - left) * (bottom - top)


def _bgr(image: Tensor) -> Any:
    """[H, W, 3] in 0..1 -> the bytes [H, W, BGR] that insightface takes, in NumPy."""
    return (image.flip(-1) * 255).clamp(0, 255).to("cpu", torch.uint8).contiguous().numpy()

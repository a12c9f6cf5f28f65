"""Faces for the old FaceID nodes, from an INSIGHTFACE wire: insightface's own FaceAnalysis."""

from __future__ import annotations

from typing import Any

import folder_paths
import numpy as np
import torch
from torch import Tensor

from ...ipadapter_core import AdapterError

_SIZES = range(640, 256, -64)  # of the detector's input: smaller ones find faces that fill the image


def load_faces(provider: str, name: str = "buffalo_l") -> Any:
    """insightface's models from models/insightface/models/NAME."""
    try:
        from insightface.app import FaceAnalysis  # noqa: PLC0415  # optional, and slow to import
    except ImportError as error:
        raise AdapterError(
            "FaceID needs the package insightface, which is not installed. Run: python -m pip install insightface "
            "onnxruntime, with ComfyUI's python. Its face models are licensed for research only."
        ) from error
    root = f"{folder_paths.models_dir}/insightface"
    analysis = FaceAnalysis(name=name, root=root, providers=[f"{provider}ExecutionProvider"])
    analysis.prepare(ctx_id=0, det_size=(_SIZES.start, _SIZES.start))
    return analysis


def read_faces(analysis: Any, images: Tensor, *, crop: int, normalised: bool) -> tuple[Tensor, Tensor]:
    """Images [N, H, W, 3] -> embeddings [N, F] of the first face in each, and aligned crops [N, crop, crop, 3].

    Raises AdapterError for an image without a face.
    """
    from insightface.utils import face_align  # noqa: PLC0415

    embeddings, crops = [], []
    # insightface takes BGR, as OpenCV does.
    pixels = images[..., :3].mul(255).clamp(0, 255).byte().cpu().flip(-1).numpy()
    for index, image in enumerate(pixels):
        face = _first_face(analysis, np.ascontiguousarray(image))
        if face is None:
            which = f"Image {index + 1} of {len(pixels)}" if len(pixels) > 1 else "The image"
            raise AdapterError(f"{which} shows no face that can be found. Use a larger or a frontal face.")
        embeddings.append(torch.from_numpy(face.normed_embedding if normalised else face.embedding))
        aligned = face_align.norm_crop(image, landmark=face.kps, image_size=crop)
        crops.append(torch.from_numpy(np.ascontiguousarray(aligned)).float().div(255).flip(-1))
    return torch.stack(embeddings), torch.stack(crops)


def _first_face(analysis: Any, image: Any) -> Any:
    before = analysis.det_model.input_size
    try:
        for size in _SIZES:
            analysis.det_model.input_size = (size, size)
            faces = analysis.get(image)
            if faces:
                return faces[0]
        return None
    finally:
        analysis.det_model.input_size = before

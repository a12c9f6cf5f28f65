"""Faces for the old FaceID nodes, from an INSIGHTFACE wire: insightface's own FaceAnalysis, as other packs use it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...ipadapter_core import AdapterError
from ..face_analysis import FaceAnalysis, load_face_analysis
from ..faces import face_features


def load_faces(provider: str, name: str = "buffalo_l") -> Any:
    """The face models of models/insightface/models/NAME, run by the CPU where the provider is missing.

    Raises AdapterError when insightface or the files are missing, or a file is damaged.
    """
    models = load_face_analysis(name, provider, fall_back=True)
    from insightface.app import FaceAnalysis as Analysis  # noqa: PLC0415  # optional, and slow to import

    # Not by its constructor, which loads all files of the folder, and downloads what is missing.
    analysis = Analysis.__new__(Analysis)
    analysis.models = {"detection": models.detector, "recognition": models.recognizer}
    analysis.det_model = models.detector
    analysis.addons = {}  # of insightface 2
    analysis.prepare(ctx_id=0, det_size=(640, 640))
    return analysis


def read_faces(analysis: Any, images: Tensor, *, crop: int, normalised: bool) -> tuple[Tensor, Tensor]:
    """Images [N, H, W, 3] -> embeddings [N, F] of the most certain face in each, and aligned crops [N, crop, crop, 3].

    Raises AdapterError for an image without a face, and for models of another pack that tell no faces apart.
    """
    recognizer = getattr(analysis, "models", {}).get("recognition")
    if recognizer is None:
        raise AdapterError("The connected insightface has no recognition model. Connect IPAdapter InsightFace Loader.")
    models = FaceAnalysis("insightface", analysis.det_model, recognizer)
    found = face_features(models, images, crop, unnormalised=not normalised, order="most certain")
    return found.embeddings, found.crops

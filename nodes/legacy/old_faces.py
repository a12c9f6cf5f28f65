"""Faces for the old FaceID nodes, from an INSIGHTFACE wire: insightface's own FaceAnalysis, as other packs use it."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from ...ipadapter_core import AdapterError
from ..face_analysis import PAGE, PROVIDERS, FaceAnalysis, find_files
from ..faces import face_features


def load_faces(provider: str, name: str = "buffalo_l") -> Any:
    """The face models of models/insightface/models/NAME.

    Raises AdapterError when insightface or the files are missing: insightface itself would download them.
    """
    try:
        from insightface.app import FaceAnalysis as Analysis  # noqa: PLC0415  # optional, and slow to import
    except ImportError as error:
        raise AdapterError(
            f'FaceID needs insightface, which cannot be imported ({error}). Install it with: "{sys.executable}" '
            '-m pip install "insightface>=2" and restart ComfyUI.'
        ) from error
    files = find_files(name)
    if not files:
        raise AdapterError(
            f"No face models in models/insightface/models/{name}. Unpack {name}.zip from {PAGE} there (for "
            "non-commercial research only)."
        )
    analysis = Analysis(
        name=str(files[0].parent),
        allowed_modules=["detection", "recognition"],
        providers=[PROVIDERS.get(provider, f"{provider}ExecutionProvider")],
    )
    analysis.prepare(ctx_id=0, det_size=(640, 640))
    return analysis


def read_faces(analysis: Any, images: Tensor, *, crop: int, normalised: bool) -> tuple[Tensor, Tensor]:
    """Images [N, H, W, 3] -> embeddings [N, F] of the most certain face in each, and aligned crops [N, crop, crop, 3].

    Raises AdapterError for an image without a face.
    """
    models = FaceAnalysis("insightface", analysis.det_model, analysis.models["recognition"])
    found = face_features(models, images, crop, unnormalised=not normalised, order="most certain")
    return found.embeddings, found.crops

"""Where an adapter comes from: metadata in the header of its file, which hosts may read and may ignore."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from accelerate.utils import extract_model_from_parallel

from ipadapter_core import METADATA_ENCODER, METADATA_NEGATIVE, IPAdapter, save_adapter

from .base_model import BaseModel

BASE_MODEL = "ipadapter.base_model"  # a name for people
BASE_HASH = "ipadapter.base_hash"  # BaseModel.fingerprint
ENCODER_HASH = "ipadapter.encoder_hash"  # BaseModel.encoder_fingerprint
PREDICTION_TYPE = "ipadapter.prediction_type"
STEPS = "ipadapter.steps"
IMAGES_SEEN = "ipadapter.images_seen"
SEED = "ipadapter.seed"
DATA_HASH = "ipadapter.data_hash"
DATA_SIZE = "ipadapter.data_size"
TRAINER = "ipadapter.trainer"


def trainer_version() -> str:
    """Such as "ip-adapter-kit 0.1.0"."""
    try:
        return f"ip-adapter-kit {version('ip-adapter-kit')}"
    except PackageNotFoundError:  # run from a checkout
        return "ip-adapter-kit (not installed)"


def provenance(
    base_model: BaseModel, *, steps: int, images_seen: int, seed: int, data_hash: str = "", data_size: int = 0
) -> dict[str, str]:
    """Header metadata of an adapter that was trained on `base_model`. No paths, no dates: equal trainings
    give equal files.
    """
    metadata = {
        BASE_MODEL: base_model.name,
        BASE_HASH: base_model.fingerprint(),
        PREDICTION_TYPE: base_model.prediction_type,
        METADATA_ENCODER: base_model.encoder_name,
        ENCODER_HASH: base_model.encoder_fingerprint(),
        METADATA_NEGATIVE: "zeros",  # base: the projection of a zeroed embedding
        STEPS: str(steps),
        IMAGES_SEEN: str(images_seen),
        SEED: str(seed),
        TRAINER: trainer_version(),
    }
    if data_hash:
        metadata |= {DATA_HASH: data_hash, DATA_SIZE: str(data_size)}
    return metadata


def export_adapter(path: str | os.PathLike[str], adapter: IPAdapter, metadata: dict[str, str]) -> Path:
    """Write the published layout, in float32, whole or not at all; a wrapper of Accelerate's is taken off.

    Raises AdapterError for weights that are not finite, OSError when the disk refuses.
    """
    save_adapter(path, extract_model_from_parallel(adapter), metadata)
    return Path(path)

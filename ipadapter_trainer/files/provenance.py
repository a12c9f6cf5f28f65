"""The origin of a trained adapter, as metadata in its file's header; hosts ignore it."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from accelerate.utils import extract_model_from_parallel

from ipadapter_core import METADATA_ENCODER, METADATA_NEGATIVE, AdapterSpec, IPAdapter

from ..models.base_model import BaseModel
from .writing import write_adapter

BASE_MODEL = "ipadapter.base_model"  # its name
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
    base_model: BaseModel,
    spec: AdapterSpec,
    *,
    steps: int,
    images_seen: int,
    seed: int,
    prediction_type: str | None = None,
    data_hash: str = "",
    data_size: int | None = None,
) -> dict[str, str]:
    """Header metadata of an adapter of this `spec` that was trained on `base_model`. It holds no paths and no dates, so
    equal trainings give equal metadata.
    """
    metadata = {
        BASE_MODEL: base_model.name,
        BASE_HASH: base_model.fingerprint(),
        PREDICTION_TYPE: prediction_type or base_model.prediction_type,
        METADATA_ENCODER: spec.encoder,
        METADATA_NEGATIVE: "zeros",  # zero embeddings, or the encoding of a grey image; see `dropped_features`
        STEPS: str(steps),
        IMAGES_SEEN: str(images_seen),
        SEED: str(seed),
        TRAINER: trainer_version(),
    }
    if spec.image_dim is not None:
        metadata[ENCODER_HASH] = base_model.encoder_fingerprint()
    if data_hash:
        metadata[DATA_HASH] = data_hash
    if data_size is not None:
        metadata[DATA_SIZE] = str(data_size)
    return metadata


def export_adapter(
    path: str | os.PathLike[str],
    adapter: IPAdapter,
    metadata: dict[str, str],
    *,
    dtype: torch.dtype | None = None,
    verify: bool = False,
    with_diffusers: bool = True,
) -> Path:
    """`write_adapter` for an adapter in training, which Accelerate may have wrapped; see there for the options."""
    plain = extract_model_from_parallel(adapter)
    write_adapter(Path(path), plain, metadata, dtype=dtype, verify=verify, with_diffusers=with_diffusers)
    return Path(path)

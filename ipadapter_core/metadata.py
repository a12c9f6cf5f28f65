"""The metadata of adapter files: written from a spec, and checked against the tensors when read."""

from __future__ import annotations

import re
from collections.abc import Mapping

from .errors import AdapterError
from .spec import FAMILIES, AdapterSpec, Kind

# Safetensors metadata that this library writes and reads; every other host ignores them.
METADATA_KIND = "ipadapter.kind"
METADATA_BASE_FAMILY = "ipadapter.base_family"
METADATA_SHORTCUT = "ipadapter.shortcut"  # "true" is FaceID-plus v2, "false" v1
METADATA_ENCODER = "ipadapter.encoder"  # free text, such as a repository id
METADATA_NEGATIVE = "ipadapter.negative"  # "zeros" or "black": the image of the unconditional branch
METADATA_NUM_TOKENS = "ipadapter.tokens"
METADATA_DIM_HEAD = "ipadapter.dim_head"
METADATA_RESOLUTION = "ipadapter.encoder_resolution"  # pixels of the encoder's input, where not its own
# Always written from the spec: in other metadata they may be those of an older file.
OF_THE_TENSORS = (METADATA_KIND, METADATA_BASE_FAMILY, METADATA_SHORTCUT, METADATA_NUM_TOKENS, METADATA_DIM_HEAD)


def spec_metadata(spec: AdapterSpec) -> dict[str, str]:
    """The metadata that lets `infer_spec` return this spec from the saved file."""
    metadata = {
        METADATA_KIND: spec.kind,
        METADATA_BASE_FAMILY: spec.family,
        METADATA_NEGATIVE: spec.negative,
        METADATA_NUM_TOKENS: str(spec.num_tokens),
    }
    if spec.dim_head is not None:
        metadata[METADATA_DIM_HEAD] = str(spec.dim_head)
    if spec.shortcut is not None:
        metadata[METADATA_SHORTCUT] = str(spec.shortcut).lower()
    if spec.encoder_id:
        metadata[METADATA_ENCODER] = spec.encoder_id
    if spec.encoder_resolution is not None:
        metadata[METADATA_RESOLUTION] = str(spec.encoder_resolution)
    return metadata


def check_family(family: str, metadata: Mapping[str, str], origin: str) -> None:
    """Raises AdapterError when the metadata has another known family; `origin` is the file, here and below."""
    claimed = metadata.get(METADATA_BASE_FAMILY)
    known = claimed is not None and (claimed in FAMILIES or claimed.startswith("context-"))
    if known and claimed != family:
        raise AdapterError(
            f"{origin}: its metadata says {METADATA_BASE_FAMILY}={claimed!r}, its layers are those of {family!r}. "
            "Correct the metadata or export it again."
        )


def read_num_tokens(kind: Kind, num_tokens: int, metadata: Mapping[str, str], origin: str) -> int:
    """The tokens of an adapter whose projector makes `num_tokens`. Raises AdapterError when the metadata differs."""
    claimed = read_integer(METADATA_NUM_TOKENS, metadata, origin)
    if claimed is None or claimed == num_tokens:
        return num_tokens
    if kind == "full":  # one token per patch: the encoder's resolution decides, not the weights
        return claimed
    raise AdapterError(
        f"{origin}: its metadata says {METADATA_NUM_TOKENS}={claimed}, its projector makes {num_tokens} tokens. "
        "Correct the metadata or export it again."
    )


def read_integer(key: str, metadata: Mapping[str, str], origin: str) -> int | None:
    """A number above 0; None when the key is missing. Raises AdapterError for other text."""
    text = metadata.get(key)
    if text is None:
        return None
    if not re.fullmatch("0*[1-9][0-9]{0,8}", text):
        raise AdapterError(f"{origin}: its metadata says {key}={text!r}; expected a whole number above 0.")
    return int(text)


def read_negative(metadata: Mapping[str, str], origin: str) -> str:
    """What the negative branch gets: "zeros" unless the metadata says "black". Raises AdapterError for other text."""
    claimed = metadata.get(METADATA_NEGATIVE, "zeros")
    if claimed not in ("zeros", "black"):
        raise AdapterError(
            f"{origin}: its metadata says {METADATA_NEGATIVE}={claimed!r}; expected 'zeros' or 'black'. Correct the "
            "metadata."
        )
    return claimed


def read_shortcut(kind: Kind, metadata: Mapping[str, str], origin: str) -> bool | None:
    """True for FaceID-plus v2, False for v1, None when unknown. Raises AdapterError for other text and kinds."""
    claimed = metadata.get(METADATA_SHORTCUT)
    if claimed is None:
        return None
    if kind != "faceid-plus" or claimed not in ("true", "false"):
        raise AdapterError(
            f"{origin}: its metadata says {METADATA_SHORTCUT}={claimed!r} and it is a {kind} adapter; expected 'true' "
            "or 'false' on a faceid-plus adapter only. Correct the metadata."
        )
    return claimed == "true"

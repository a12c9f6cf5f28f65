"""The adapter that a training starts from: a new one, or a file."""

from __future__ import annotations

from pathlib import Path

import torch

from ipadapter_core import (
    AdapterSpec,
    IPAdapter,
    check_compatible,
    init_from_unet,
    load_adapter,
)

from ..errors import TrainerError
from ..models.base_model import BaseModel
from ..models.hub import refuse_missing
from ..settings.kinds import TRAIN_KINDS, TrainKind, spec_for


def adapter_spec(base_model: BaseModel, kind: TrainKind, num_tokens: int | None = None) -> AdapterSpec:
    """The spec of a new adapter of this kind for this model; reads configs only, no weights."""
    return spec_for(
        kind,
        [site.dim for site in base_model.sites],
        base_model.sites[0].cross_attention_dim,
        image_embeds_dim=base_model.image_dim if kind.takes_image else None,
        hidden_dim=base_model.hidden_dim if kind.takes_image else None,
        image_tokens=base_model.image_tokens if kind.takes_image else None,
        num_tokens=num_tokens,
        encoder_id=base_model.encoder_name if kind.takes_image else None,
    )


def new_adapter(
    base_model: BaseModel,
    kind: TrainKind = TRAIN_KINDS["base"],
    num_tokens: int | None = None,
    init_from: Path | None = None,
) -> IPAdapter:
    """A trainable float32 adapter for this model, on the CPU: keys and values copied from the UNet's own
    text layers and a random projector (paper, section 4.1.2), or the weights of the file `init_from`.

    Raises AdapterError when the file is not an adapter for this model, TrainerError when it has another kind,
    number of tokens or encoder width.
    """
    if init_from is not None:
        return read_initial_adapter(base_model, kind, num_tokens, init_from).requires_grad_(True).train()
    adapter = IPAdapter(adapter_spec(base_model, kind, num_tokens))
    init_from_unet(adapter.layers, base_model.unet)
    return adapter.train()


def read_initial_adapter(base_model: BaseModel, kind: TrainKind, num_tokens: int | None, init_from: Path) -> IPAdapter:
    """The adapter of the file `init_from`, frozen, in float32; no weight of the model is read.

    Raises as `new_adapter`.
    """
    spec = adapter_spec(base_model, kind, num_tokens)
    refuse_missing(init_from)
    adapter = load_adapter(init_from, dtype=torch.float32, shortcut=spec.shortcut)
    check_compatible(adapter.spec, base_model.sites, Path(init_from).name)
    for what in ("kind", "num_tokens", "image_dim", "face_dim", "lora_rank"):
        found, wanted = getattr(adapter.spec, what), getattr(spec, what)
        if found != wanted:
            raise TrainerError(
                f"init_from {init_from}: its {what} is {found}, this training's {wanted}. Set kind, "
                "num_tokens and image_encoder to the file's (`ipadapter inspect` prints them), or choose another file."
            )
    return adapter

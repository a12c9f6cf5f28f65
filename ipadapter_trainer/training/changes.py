"""What a checkpoint was trained with, compared with the settings of the run that resumes from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..models.base_model import BaseModel
from ..settings.config import TrainConfig
from .training_data import TrainingData

# The weights and the optimizer's state would not fit, or would mean something else.
_FIXED = ("kind", "num_tokens", "base_model", "image_encoder", "prediction_type", "optimizer")
# They decide which image is drawn in which step, and how it is cut: with others it is not the same training.
_DRAWS = (
    "data",
    "validation_images",
    "images_per_batch",
    "shards",
    "seed",
    "resolution",
    "buckets",
    "bucket_step",
    "crop",
    "flip",
    "reference_crop",
    "self_reference",
)
# They change how the following steps learn; a resumed run may try others.
_FREE = (
    "features",
    "init_from",
    "steps",
    "epochs",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler",
    "lr_warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "ema_decay",
    "text_dropout",
    "image_dropout",
    "both_dropout",
    "noise_offset",
    "min_snr_gamma",
    "zero_terminal_snr",
    "mixed_precision",
    "export_dtype",
)


def run_settings(
    config: TrainConfig,
    base_model: BaseModel,
    source: TrainingData,
    *,
    num_tokens: int,
    prediction_type: str,
    processes: int,
) -> dict[str, Any]:
    """What a checkpoint keeps of its training: everything that is compared when another run resumes from it."""
    settings = config.model_dump(mode="json")
    facts = {name: settings[name] for name in (*_FIXED, *_DRAWS, *_FREE) if name in settings}
    encoder = f"{base_model.encoder_name} ({base_model.encoder_fingerprint()})" if config.train_kind.takes_image else ""
    return facts | {
        "num_tokens": num_tokens,
        "base_model": f"{base_model.name} ({base_model.fingerprint()})",
        "image_encoder": encoder,
        "prediction_type": prediction_type,
        "data": source.data_hash,
        "images": source.size,
        "validation_images": source.held_out_images,
        "images_per_batch": config.batch_size * processes,
        # Another number of them deals the shards otherwise.
        "shards": f"{processes} processes of {max(config.num_workers, 1)} workers" if config.streams else None,
        "bucket_step": config.bucket_step if config.buckets else None,
        "features": _features(config),
    }


def changed_settings(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], accept: bool) -> list[str]:
    """A line for each difference between what the checkpoint `folder` was trained with and what is to come; `accept`
    also allows those that make it another training.

    Raises CheckpointError for differences that cannot be resumed from, naming both values and what to do.
    """
    fixed, draws, free = (_differences(names, before, now) for names in (_FIXED, _DRAWS, _FREE))
    if fixed:
        fits = all(before[name] == now[name] for name in ("kind", "num_tokens"))
        how = f" with init_from={folder / 'adapter.safetensors'}, which starts a new run from its weights" * fits
        raise CheckpointError(
            f"{folder} belongs to another training: {'; '.join(fixed)}. Set it back, or choose another output{how}."
        )
    if draws and not accept:
        raise CheckpointError(
            f"{folder} was trained on other data: {'; '.join(draws)}. Set it back; or add accept_changes=true to "
            "resume with the change, keeping the weights, the optimizer and the step count; or choose another output."
        )
    return [*draws, *free]


def _differences(names: tuple[str, ...], before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A checkpoint of an older version does not have every name; what it does not have counts as unchanged."""
    changed = [name for name in names if _value(name, before.get(name, now[name])) != _value(name, now[name])]
    return [_difference(name, before, now) for name in changed]


def _difference(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    was, is_now = before[name], now[name]
    if name == "data":
        images = before["images"], now["images"]
        if images[0] == images[1]:
            return f"other images or captions ({_words(images[1])} to train on, as before)"
        return f"{_words(images[0])} images to train on, now {_words(images[1])}"
    if name == "features":
        return f"the features came from {was} and now come from {is_now}: the same training but for rounding"
    shown = "batch_size x processes" if name == "images_per_batch" else name
    suffix = ", which has no effect on a resumed run; choose another output to start from it"
    return f"{shown} was {_words(was)} and is now {_words(is_now)}{suffix if name == 'init_from' else ''}"


def _value(name: str, value: Any) -> Any:
    """What is compared. A renamed folder is still the same model, so of a model it is the fingerprint."""
    return value.rpartition(" (")[2] if name in ("base_model", "image_encoder") and value else value


def _words(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _features(config: TrainConfig) -> str:
    """Where the outputs of the frozen models come from."""
    if config.cache is None:
        return "the images"
    quantised = config.train_kind.takes_hidden_states and config.cache_image_features == "int8"
    variants = config.cache_variants
    return f"a cache of {variants} variant{'s' * (variants > 1)}{' with int8 image features' if quantised else ''}"

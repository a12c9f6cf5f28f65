"""Resuming: which checkpoint, and how its settings differ from those of this run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files.opening import ADAPTER_FILE, STATE_FILE, checkpoint_folders, incomplete_checkpoints, step_of
from ..models.base_model import BaseModel
from ..settings.config import TrainConfig
from .checkpoints import Position
from .new_adapter import adapter_spec
from .objective import Objective
from .training_data import TrainingData

# A change of these is refused: the weights or the optimizer state would not fit.
_FIXED = ("kind", "num_tokens", "base_model", "image_encoder", "prediction_type", "optimizer")
# These decide what a step sees: a change needs accept_changes=true.
_DATA = (
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
    "vae",
    "text_encoders",
)
# These decide the order of the images.
_ORDER = ("data", "validation_images", "images_per_batch", "shards", "seed", "buckets", "bucket_sizes")
_MODELS = ("base_model", "image_encoder", "vae", "text_encoders")
# A resumed run may change these.
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


def checkpoint_to_resume(config: TrainConfig) -> Path | None:
    """The newest checkpoint in `output`; if there is none, the one that `resume` names. So rerunning a command resumes
    its own run, and a run that starts from an older checkpoint needs another output than the later checkpoints.

    Raises CheckpointError when the named one does not exist or must not be used, and when a later one in `output` is
    incomplete.
    """
    folders, chosen = checkpoint_folders(config.output), config.resume
    _refuse_incomplete(config.output, folders)
    if isinstance(chosen, bool):
        if folders and not chosen:
            raise CheckpointError(
                f"{config.output} already holds {folders[-1].name}. Choose another output, or resume=true."
            )
        return folders[-1] if folders else None
    siblings = checkpoint_folders(chosen.parent)
    if chosen not in siblings:
        inside = [str(folder) for folder in checkpoint_folders(chosen) or siblings]
        such = " or ".join(inside) or f"one such as {config.output / 'checkpoint-001000'}"
        raise CheckpointError(f"resume={chosen}: no complete checkpoint. Expected true, false or a folder: {such}.")
    later = [folder.name for folder in folders if step_of(folder) > step_of(chosen)]
    if chosen.parent.resolve() == config.output.resolve():
        if later:
            raise CheckpointError(
                f"{config.output} already goes on to {later[-1]}. To train on from {chosen.name} choose another "
                f"output, such as output={config.output}-from-{step_of(chosen)}; or delete {', '.join(later)}."
            )
        return chosen
    if folders and not later:
        raise CheckpointError(
            f"{config.output} holds {folders[-1].name}, which is not later than resume={chosen}. Choose another output."
        )
    return folders[-1] if folders else chosen


def _refuse_incomplete(output: Path, complete: Sequence[Path]) -> None:
    """Refuse incomplete checkpoints after the last complete one, whose steps the run would repeat and replace."""
    done = step_of(complete[-1]) if complete else -1
    for folder, missing in incomplete_checkpoints(output):
        if step_of(folder) > done:
            instead = f"resume from {complete[-1].name}" if complete else "start again"
            weights = f"; or choose another output with {_from_weights(folder)}" if missing == STATE_FILE else ""
            raise CheckpointError(
                f"{folder}: {missing} is missing, so it cannot be resumed. Move it away to {instead}{weights}."
            )


def nothing_to_do(config: TrainConfig, checkpoint: Path, done: int) -> str:
    """The warning for a training that is already complete.

    Raises CheckpointError if `checkpoint` is in another folder: this output then has nothing to export.
    """
    if config.steps is not None:
        found = f"steps={config.steps}, but {checkpoint} has already done {done:,}"
    else:
        found = f"epochs={config.epochs:g}, but {checkpoint} has already done as many, in {done:,} steps"
    if checkpoint.parent.resolve() != config.output.resolve():
        raise CheckpointError(
            f"{found}. Raise steps to train on, or write its adapter with `ipadapter export {checkpoint}`."
        )
    return f"{found}: there is nothing to train, so its adapter is exported again. Raise steps to train on."


def run_settings(
    config: TrainConfig, base_model: BaseModel, objective: Objective, data: TrainingData, processes: int
) -> dict[str, Any]:
    """The settings that a checkpoint stores, to be compared with those of the run that resumes from it."""
    given = config.model_dump(mode="json")
    settings = {name: given[name] for name in (*_FIXED, *_DATA, *_FREE) if name in given}
    encoder = f"{base_model.encoder_name} ({base_model.encoder_fingerprint()})" if config.train_kind.takes_image else ""
    return settings | {
        "num_tokens": adapter_spec(base_model, config.train_kind, config.num_tokens).num_tokens,
        "base_model": f"{base_model.name} ({base_model.fingerprint()})",
        "image_encoder": encoder,
        "vae": f"{base_model.name} ({base_model.vae_fingerprint()})",
        "text_encoders": f"{base_model.name} ({base_model.text_fingerprint()})",
        "prediction_type": objective.prediction_type,
        "data": data.data_hash,
        "images": data.size,
        "validation_images": data.held_out_images,
        "images_per_batch": config.batch_size * processes,
        # Shards are distributed over processes and workers.
        "shards": f"{processes} processes of {max(config.num_workers, 1)} workers" if config.streams else None,
        "bucket_step": config.bucket_step if config.buckets else None,
        "features": _features(config),
        "batches_per_epoch": data.batches_per_epoch,
        "bucket_sizes": f"{config.resolution} in steps of {config.bucket_step}" if config.buckets else None,
    }


def resume_at(position: Position, before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[int, float]:
    """The number of the batch that a resumed run begins with, and the epochs that are done (0 for a stream).

    In another order of the images that is the first batch of the next epoch, so that no image comes again; in another
    stream, the one after as many images.
    """
    is_changed, per_epoch = bool(_differences(_ORDER, before, now)), now["batches_per_epoch"]
    if per_epoch is None:
        return -(-position.images // now["images_per_batch"]) if is_changed else position.batches, 0.0
    epochs = position.images / (per_epoch * now["images_per_batch"])  # not of batches: some may have been skipped
    if not is_changed:
        return position.batches, epochs
    images = before["images"] or now["images"]  # a stream does not know its number
    per_epoch_before = before.get("batches_per_epoch") or -(-images // before["images_per_batch"])
    return -(-position.batches // per_epoch_before) * per_epoch, epochs


def changed_settings(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], accept: bool) -> list[str]:
    """A line for each setting that differs from those of the checkpoint `folder`; `accept` also allows changes of the
    data.

    `before` is empty for a checkpoint of a version that stored other settings: nothing can be compared.

    Raises CheckpointError for differences that cannot be resumed from, naming both values and what to do.
    """
    initial = _from_weights(folder)
    if not before:
        unknown = "an earlier version wrote it, so its settings cannot be compared with those of this run"
        if not accept:
            raise CheckpointError(
                f"{folder}: {unknown}. If they are the same, add accept_changes=true to resume; or choose another "
                f"output with {initial}."
            )
        return [unknown]
    fixed, data, free = (_differences(names, before, now) for names in (_FIXED, _DATA, _FREE))
    if fixed:
        fits = all(before[name] == now[name] for name in ("kind", "num_tokens"))
        how = f" with {initial}" * fits
        raise CheckpointError(
            f"{folder} belongs to another training: {'; '.join(fixed)}. Set it back, or choose another output{how}."
        )
    if data and not accept:
        raise CheckpointError(
            f"{folder} was trained on other data: {'; '.join(data)}. Set it back; or add accept_changes=true to "
            "resume with the change, keeping the weights, the optimizer and the step count; or choose another output."
        )
    return [*data, *free]


def _from_weights(folder: Path) -> str:
    return f"init_from={folder / ADAPTER_FILE}, which starts a new run from its weights"


def _differences(names: tuple[str, ...], before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Settings that a checkpoint of an older version lacks count as unchanged."""
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
    """Models are compared by fingerprint: a renamed folder is still the same model."""
    return value.rpartition(" (")[2] if name in _MODELS and value else value


def _words(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _features(config: TrainConfig) -> str:
    """Whether features are computed or read from a cache, for a line about a change."""
    if config.cache is None:
        return "the images"
    quantised = config.train_kind.takes_hidden_states and config.cache_image_features == "int8"
    variants = config.cache_variants
    return f"a cache of {variants} variant{'s' * (variants > 1)}{' with int8 image features' if quantised else ''}"

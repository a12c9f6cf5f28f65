"""Which settings of a training do not go together, and what to do instead: a sentence each, or None."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import TrainConfig


def _length(c: TrainConfig) -> str | None:
    if (c.steps is None) != (c.epochs is None):
        return None
    given = "neither is given" if c.steps is None else f"steps={c.steps}, epochs={c.epochs} are"
    return f"give either steps or epochs ({given})"


def _dropout(c: TrainConfig) -> str | None:
    total = c.text_dropout + c.image_dropout + c.both_dropout
    if total <= 1:
        return None
    return f"text_dropout + image_dropout + both_dropout is {total:g}, but they are shares of one whole (at most 1)"


def _data(c: TrainConfig) -> str | None:
    if c.data_root is not None and Path(c.data).suffix not in (".json", ".jsonl", ".csv"):
        return f"data_root belongs to a .json, .jsonl or .csv list, but data is {c.data!r}"
    if c.streams and c.epochs is not None:
        return f"epochs={c.epochs} needs a data set of known length, but data is a stream of shards; give steps"
    if c.streams and c.buckets:
        return "buckets need the size of every image before the start; cache the shards, or set buckets=false"
    return None


def _faces(c: TrainConfig) -> str | None:
    if c.face_embeds is not None and not c.train_kind.takes_face:
        return f"face_embeds is for the faceid and portrait kinds, but kind is {c.kind!r}"
    return None


def _cache(c: TrainConfig) -> str | None:
    if c.cache_variants > 1 and c.crop == "center" and c.reference_crop == 1:
        return (
            f"cache_variants={c.cache_variants} would hold the same crop {c.cache_variants} times; set crop=random or "
            "reference_crop below 1, or leave it out"
        )
    if c.cache is not None and c.from_shards and "://" in c.data:
        return f"a cache is made from shards on this machine, but data is {c.data!r}; download them, or leave cache out"
    return None


def _shape(c: TrainConfig) -> str | None:
    if c.kind == "full" and c.num_tokens is not None:
        return f"num_tokens={c.num_tokens}: a full adapter has one token for every patch; leave num_tokens out"
    if c.buckets and c.bucket_step > c.resolution:
        return f"bucket_step={c.bucket_step} is more than resolution={c.resolution}; lower it"
    return None


def _schedule(c: TrainConfig) -> str | None:
    if c.optimizer == "schedulefree" and c.lr_scheduler != "constant":
        return f"optimizer=schedulefree needs no schedule, but lr_scheduler is {c.lr_scheduler!r}; set constant"
    if c.optimizer == "schedulefree" and c.ema_decay:
        return f"optimizer=schedulefree averages the weights itself; set ema_decay=0 (it is {c.ema_decay:g})"
    if c.optimizer == "prodigy" and c.learning_rate < 0.1:
        return f"optimizer=prodigy finds the learning rate: set learning_rate=1 (it is {c.learning_rate:g})"
    if c.steps is not None and c.lr_warmup_steps >= c.steps:
        return f"lr_warmup_steps={c.lr_warmup_steps} leave nothing of steps={c.steps}"
    return None


def _objective(c: TrainConfig) -> str | None:
    if c.zero_terminal_snr and c.prediction_type == "epsilon":
        return "zero_terminal_snr leaves an epsilon model nothing to predict at the last timestep; use v_prediction"
    return None


CHECKS = (_length, _dropout, _data, _faces, _cache, _shape, _schedule, _objective)

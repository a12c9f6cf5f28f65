"""The settings of a training, checked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import field_validator

from .fields import check_data_root
from .kinds import TRAIN_KINDS, TrainKind
from .train_options import TrainOptions

_SAME_SCHEDULES = {"cosine_with_restarts": "cosine", "polynomial": "linear"}  # with diffusers' default values


class TrainConfig(TrainOptions):
    """One training."""

    @property
    def train_kind(self) -> TrainKind:
        """The kind's table entry."""
        return TRAIN_KINDS[self.kind]

    @property
    def from_shards(self) -> bool:
        """Whether the data are WebDataset shards."""
        path = self.data.split("?")[0] if "://" in self.data else self.data  # a local "?" is part of a pattern
        return path.endswith((".tar", ".tar.gz", ".tgz"))

    @property
    def streams(self) -> bool:
        """Whether the data are a stream of unknown length: shards without a cache that lists their images."""
        return self.from_shards and self.cache is None

    @field_validator("resume", mode="before")
    @classmethod
    def _check_resume(cls, value: Any) -> Any:
        if not isinstance(value, (bool, str, Path)):  # pydantic would report each type of the union
            raise ValueError(f"resume = {value!r}: expected true, false or a checkpoint folder")
        return value

    @field_validator("lr_scheduler", mode="before")
    @classmethod
    def _check_lr_scheduler(cls, value: Any) -> Any:
        if isinstance(value, str) and (same := _SAME_SCHEDULES.get(value)):
            raise ValueError(f"lr_scheduler = {value!r} is {same} with its default values; set {same}")
        return value

    def problems(self) -> Iterator[str]:
        """Settings that exclude each other."""
        yield from self._data_problems()
        yield from self._training_problems()

    def _data_problems(self) -> Iterator[str]:
        yield from check_data_root(self.data, self.data_root)
        if self.streams and self.epochs is not None:
            yield f"epochs={self.epochs} needs a data set of known length, but data is a stream of shards; give steps"
        if self.streams and self.buckets:
            yield "buckets need the size of every image before the start; cache the shards, or set buckets=false"
        if self.cache is not None and self.from_shards and "://" in self.data:
            yield f"only local shards can be cached, but data is {self.data!r}; download them, or leave cache out"
        if self.cache_variants > 1 and self.crop == "center" and self.reference_crop == 1:
            yield (
                f"cache_variants={self.cache_variants} would cache the same crop {self.cache_variants} times; set "
                "crop=random or reference_crop below 1, or leave it out"
            )
        if self.face_embeds is not None and not self.train_kind.takes_face:
            yield f"face_embeds is for the faceid and portrait kinds, but kind is {self.kind!r}"
        if self.buckets and self.bucket_step > self.resolution:
            yield f"bucket_step={self.bucket_step} is larger than resolution={self.resolution}; lower it"
        if not self.buckets and self.bucket_step != type(self).model_fields["bucket_step"].default:
            yield f"bucket_step={self.bucket_step} has no effect without buckets; set buckets=true, or leave it out"
        dropout = self.text_dropout + self.image_dropout + self.both_dropout
        if dropout > 1:
            yield f"text_dropout + image_dropout + both_dropout is {dropout:g}; their sum must be at most 1"
        if (without_image := self.image_dropout + self.both_dropout) >= 1:
            yield (
                f"image_dropout + both_dropout is {without_image:g}, so the adapter would never see an image prompt; "
                "their sum must be less than 1"
            )

    def _training_problems(self) -> Iterator[str]:
        if self.steps is None and self.epochs is None:
            yield "give either steps or epochs (neither is given)"
        if self.steps is not None and self.epochs is not None:
            yield f"give either steps or epochs (steps={self.steps}, epochs={self.epochs} are given)"
        if self.steps is not None and self.lr_warmup_steps >= self.steps:
            yield f"lr_warmup_steps={self.lr_warmup_steps} must be less than steps={self.steps}"
        if self.kind == "full" and self.num_tokens is not None:
            yield f"num_tokens={self.num_tokens}: a full adapter has one token per patch; leave num_tokens out"
        if self.optimizer == "schedulefree" and self.lr_scheduler != "constant":
            yield f"optimizer=schedulefree needs no schedule, but lr_scheduler is {self.lr_scheduler!r}; set constant"
        if self.optimizer == "schedulefree" and self.ema_decay:
            yield f"optimizer=schedulefree averages the weights itself; set ema_decay=0 (it is {self.ema_decay:g})"
        if self.optimizer == "prodigy" and self.learning_rate < 0.1:
            yield f"optimizer=prodigy adapts the learning rate: set learning_rate=1 (it is {self.learning_rate:g})"
        if self.zero_terminal_snr and self.prediction_type == "epsilon":
            yield "zero_terminal_snr leaves nothing to predict at the last timestep with epsilon; use v_prediction"

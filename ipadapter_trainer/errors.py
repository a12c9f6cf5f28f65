"""What the user can put right: every message names the thing, what was found, what was expected and what to
do.
"""

from __future__ import annotations


class TrainerError(ValueError):
    """Base class; the command line prints the message alone and exits with status 2."""


class ConfigError(TrainerError):
    """An unknown key, a value of the wrong type, or settings that exclude each other."""


class BaseModelError(TrainerError):
    """A base model folder that is incomplete or of a kind that is not supported."""


class DataError(TrainerError):
    """A data set without usable images or captions."""


class CacheError(TrainerError):
    """A feature cache that is incomplete, damaged or of other settings, or that the disk has no room for."""


class CheckpointError(TrainerError):
    """A checkpoint that is incomplete or belongs to another training."""


class InUseError(TrainerError):
    """A folder that another process writes into."""


class DivergedError(TrainerError):
    """The loss is no longer a number."""


class DiskError(TrainerError):
    """A disk that is full or refuses a file. `problem` is the message without the advice."""

    def __init__(self, problem: str, advice: str) -> None:
        super().__init__(f"{problem}. {advice}.")
        self.problem = problem


class ExportError(TrainerError):
    """A file that cannot be written as asked: its name, its place, or a dtype that its values do not fit."""


class VerificationError(TrainerError):
    """A written file that a host would not load as what it was meant to be."""


class EvaluationError(TrainerError):
    """Parts that cannot be evaluated together, or images that cannot be measured."""

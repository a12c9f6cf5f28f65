"""Scores on disk, one line per generated image, so that an evaluation can stop at any moment and resume."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ..runtime.disk import disk_errors

SCORES = "scores.jsonl"


@dataclass(frozen=True)
class Job:
    """An image to generate: the index of its example in the data set, its number for that example, the weight."""

    index: int
    number: int
    weight: float


@dataclass(frozen=True)
class Score:
    """The scores of a generated image. `ipadapter generate` makes it again with `seed`.

    The other_* scores are those with the image and caption of a different example. None without a caption or without
    a different image.
    """

    index: int
    number: int
    weight: float
    seed: int
    name: str  # of the image prompt
    clip_i: float
    clip_t: float | None
    other_clip_i: float | None
    other_clip_t: float | None

    @property
    def job(self) -> Job:
        """The generated image."""
        return Job(self.index, self.number, self.weight)


def score_file(folder: Path, process: int = 0) -> Path:
    """The file that a process appends its scores to."""
    return folder / (SCORES if process == 0 else f"{Path(SCORES).stem}-{process}.jsonl")


def read_scores(folder: Path, settings: str) -> tuple[dict[Job, Score], int]:
    """The scores of all processes, and the number of scores with other settings. Truncated lines are ignored.

    `settings` is a digest of everything that the scores depend on.
    """
    names = [field.name for field in fields(Score)]
    scores: dict[Job, Score] = {}
    with_other_settings = 0
    for file in sorted(folder.glob(f"{Path(SCORES).stem}*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
                score, found = Score(**{name: row[name] for name in names}), row["settings"]
            except (ValueError, KeyError, TypeError):
                continue
            if found == settings:
                scores[score.job] = score
            else:
                with_other_settings += 1
    return scores, with_other_settings


def append_scores(file: Path, settings: str, scores: Iterable[Score]) -> None:
    """Append a line per score, all with one write."""
    rows = ({"settings": settings, **asdict(score)} for score in scores)
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    with disk_errors(file, kept="the scores so far are kept"):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab+") as stream:
            if stream.tell():  # end a line that a killed process left unfinished
                stream.seek(-1, 2)
                text = text if stream.read(1) == b"\n" else "\n" + text
            stream.write(text.encode(errors="backslashreplace"))  # in JSON: a name of a file may not be UTF-8

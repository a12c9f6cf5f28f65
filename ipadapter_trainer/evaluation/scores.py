"""The scores of an evaluation on disk, one line a generated image, so that it can be stopped at any moment."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

from ..runtime.disk import disk_errors

SCORES = "scores.jsonl"


class Job(NamedTuple):
    """One image to generate: for which example of the data set, its number among those, and the weight."""

    index: int
    number: int
    weight: float


@dataclass(frozen=True)
class Score:
    """What one generated image scores. `seed` makes it again with `ipadapter generate`. The other_* ones are beside
    another example's prompt and caption. None where there is no caption, or no other image.
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
        """What was to be done."""
        return Job(self.index, self.number, self.weight)


class ScoreFile:
    """Scores in a folder, each line with the digest of the settings that it depends on.

    Every process appends to a file of its own; all of them are read, whoever wrote them. Lines of other settings stay
    as they are.
    """

    def __init__(self, folder: Path, settings: str, process: int = 0) -> None:
        self._folder, self._settings = folder, settings
        self._file = folder / (f"{Path(SCORES).stem}-{process}.jsonl" if process else SCORES)
        self.foreign = 0  # lines of other settings that the newest `read` met

    def read(self) -> dict[Job, Score]:
        """What is measured so far. A line that was cut off is none."""
        names = {field.name for field in fields(Score)}
        found: dict[Job, Score] = {}
        self.foreign = 0
        for file in sorted(self._folder.glob(f"{Path(SCORES).stem}*.jsonl")):
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                    settings, values = row.pop("settings"), {name: row[name] for name in names}
                except (ValueError, KeyError, AttributeError):
                    continue
                if settings == self._settings:
                    score = Score(**values)
                    found[score.job] = score
                else:
                    self.foreign += 1
        return found

    def append(self, scores: Iterable[Score]) -> None:
        """Add a batch at once."""
        rows = ({"settings": self._settings, **asdict(score)} for score in scores)
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        with disk_errors(self._file, kept="the scores that are written stay"):
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._file.open("ab+") as stream:
                if stream.tell() and not self._ends_in_newline():  # of a process that was killed while it wrote
                    text = "\n" + text
                stream.write(text.encode())

    def _ends_in_newline(self) -> bool:
        with self._file.open("rb") as stream:
            stream.seek(-1, 2)
            return stream.read(1) == b"\n"

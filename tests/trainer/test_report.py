"""The page as a reader gets it: everything in it, nothing beside it, and words that follow the numbers."""

from __future__ import annotations

import base64
import io
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ipadapter_trainer.errors import DataError
from ipadapter_trainer.report.curves import CHARTS, POINTS, draw, smoothed
from ipadapter_trainer.report.page import write_report
from ipadapter_trainer.report.run_files import LOG_FILE
from ipadapter_trainer.report.verdict import read_verdict

SVG = "{http://www.w3.org/2000/svg}"


def validated(step: int, gap: float, loss: float = 0.5, error: float = 0.01, **more: float) -> dict[str, float]:
    numbers = {
        "loss": loss,
        "loss_no_image": 0.5,
        "loss_dropped": 0.6,
        "loss_shuffled": loss + gap,
        "gap_no_image": 0.5 - loss,
        "gap_shuffled": gap,
        "gap_shuffled_error": error,
        "attention_ratio": 0.8,
        **{f"gap_shuffled_t{quarter}": gap for quarter in range(4)},
        **more,
    }
    return {"step": step, **{f"validation/{name}": value for name, value in numbers.items()}}


def trained(step: int) -> dict[str, float]:
    return {"step": step, "loss": 1 / step, "learning_rate": 1e-4, "images_per_second": 9.0, "grad_norm": 0.5}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a training leaves behind, as `RunLog` writes it."""
    output = tmp_path / "cats & dogs"
    (output / "samples").mkdir(parents=True)
    lines = [trained(step) for step in range(1, 31)] + [validated(step, step / 100) for step in (0, 10, 20, 30)]
    (output / LOG_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (output / "config.toml").write_text('data = "images/<cats>"\n')
    for step in (0, 10, 20, 30):
        Image.new("RGB", (40, 30), (200, step, 0)).save(output / "samples" / f"step-{step:06d}.png")
    return output


class Page(HTMLParser):
    """The texts and the images of a page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.text, self.images, self.references = "", {}, list[str]()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values: dict[str, Any] = dict(attrs)
        self.references += [values[name] for name in ("src", "href") if name in values]
        if tag == "img":
            self.images[values["alt"]] = base64.b64decode(values["src"].partition("base64,")[2])

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_has_it_all_and_needs_nothing(run: Path) -> None:
    page = Page(write_report(run, "base for <SD1.5>, 4 tokens"))
    for words in (
        "cats & dogs",
        "base for <SD1.5>, 4 tokens",
        'data = "images/<cats>"',
        "The adapter uses its image prompt",
    ):
        assert words in page.text
    assert all(reference.startswith("data:") for reference in page.references)
    assert {chart.title for chart in CHARTS} <= page.images.keys()
    for chart in CHARTS:
        assert ET.fromstring(page.images[chart.title]).tag == f"{SVG}svg"
    grids = {title: grid for title, grid in page.images.items() if title.startswith("samples")}
    assert list(grids) == ["samples at step 0", "samples at step 20", "samples at step 30"]
    for title, grid in grids.items():
        red, green, _ = Image.open(io.BytesIO(grid)).getpixel((20, 15))  # type: ignore[misc]
        assert (abs(red - 200), abs(green - int(title.split()[-1]))) <= (3, 3)


def test_a_run_without_validation_or_samples_is_reported_too(run: Path) -> None:
    for sample in (run / "samples").iterdir():
        sample.unlink()
    (run / "config.toml").unlink()
    (run / LOG_FILE).write_text(json.dumps(trained(1)) + "\n" + '{"step": 2, "lo')
    page = Page(write_report(run, ""))
    assert list(page.images) == ["Training loss", "Gradient norm", "Learning rate", "Images a second"]
    assert "There was no validation" in page.text


def test_a_sample_that_cannot_be_read_is_left_out(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = run / "samples" / "step-000000.png"
    broken.write_bytes(b"")
    (run / "samples" / "step-000000 copy.png").touch()  # a file of the user's
    page = Page(write_report(run, ""))
    assert [title for title in page.images if title.startswith("samples")] == [
        "samples at step 20",
        "samples at step 30",
    ]
    assert "step-000000.png cannot be read." in page.text
    assert caplog.messages == [f"{broken}: left out of the report (not an image, or of an unknown format)."]


A_RUN = r"A run is the output folder of a training, with log\.jsonl, config\.toml and checkpoints in it"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cast & dogs", rf"/cast & dogs: no such folder\. {A_RUN}, such as .*/cats & dogs\."),
        ("empty", rf"/empty: no log\.jsonl in it\. {A_RUN}, such as .*/cats & dogs\."),
        (".", rf": no log\.jsonl in it\. {A_RUN}, such as .*/cats & dogs\."),
        ("notes.txt", rf"/notes\.txt: a file\. {A_RUN}, such as"),
        ("empty/deeper/still", rf"/still: no such folder\. {A_RUN}\."),
        (
            "cats & dogs/samples",
            r"/samples is a part of the run .*/cats & dogs\. Write `ipadapter report '.*/cats & dogs'`",
        ),
        ("cats & dogs/log.jsonl", r"/log\.jsonl is a part of the run .*/cats & dogs\."),
    ],
)
def test_a_folder_that_is_no_run_is_refused(name: str, words: str, run: Path) -> None:
    (run.parent / "empty").mkdir()
    (run.parent / "notes.txt").write_text("")
    with pytest.raises(DataError, match=words):
        write_report(run.parent / name, "")


BROKEN = [
    b'{"step": 3, "lo',
    b"\xff\xfe",
    b"[1]",
    b'{"loss": 1}',
    b'{"step": 1, "loss": null}',
    b'{"step": 1, "loss": "x"}',
]


def test_broken_lines_are_counted(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = run / LOG_FILE
    whole = log.read_bytes()
    log.write_bytes(whole + b"\n".join(BROKEN) + b"\n")
    assert "The adapter uses its image prompt" in Page(write_report(run, "")).text
    assert caplog.messages == [f"{log}: 6 of 40 lines cannot be read and are left out."]
    log.write_bytes(b"\n".join(BROKEN))
    with pytest.raises(DataError, match=r"log\.jsonl: none of its 6 lines is about training steps\. The"):
        write_report(run, "")
    log.write_text("")
    with pytest.raises(DataError, match=r"log\.jsonl: empty\. The first line comes after log_every steps; try again"):
        write_report(run, "")


def curves(drawn: bytes) -> list[list[tuple[float, float]]]:
    """The points of what is drawn inside the axes, the grid left out."""
    inside = [path.get("d", "") for path in ET.fromstring(drawn).iter(f"{SVG}path") if path.get("clip-path")]
    points = [[(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)] for path in inside]
    return [line for line in points if len({x for x, _ in line}) > 1 and len({y for _, y in line}) > 1]


def test_a_curve_goes_through_its_points() -> None:
    (chart,) = (chart for chart in CHARTS if chart.title == "Images a second")
    values = [1.0, 3.0, 2.0, 5.0] * 8
    drawn = draw(chart, [{"step": i, "images_per_second": value} for i, value in enumerate(values)], [])
    assert drawn is not None
    (curve,) = curves(drawn)
    heights = [y for _, y in curve]
    top, bottom = min(heights), max(heights)  # of 5 and of 1
    assert heights == pytest.approx([bottom - (value - 1) / 4 * (bottom - top) for value in values], abs=0.1)
    assert draw(chart, [{"step": 1}], []) is None


def test_a_long_log_stays_a_small_image() -> None:
    lines = [trained(step) for step in range(1, 50_001)]
    drawn = [draw(chart, lines, []) for chart in CHARTS if not chart.of_validation]
    assert all(image is not None and len(image) < 150_000 for image in drawn)
    (chart,) = (chart for chart in CHARTS if chart.title == "Learning rate")
    lines[-1]["learning_rate"] = 1.0
    image = draw(chart, lines, [])
    assert image is not None
    (curve,) = curves(image)  # the last point is drawn whatever is left out
    assert curve[-1][1] == min(y for _, y in curve) < curve[0][1]
    assert len(curve) <= POINTS


def test_smoothing_keeps_the_mean_and_tames_the_noise() -> None:
    noisy = [1.0 + (-1) ** i for i in range(400)]
    smooth = smoothed(noisy)
    assert smooth[0] == noisy[0]
    assert all(abs(value - 1) < 0.1 for value in smooth[100:])
    assert smoothed([3.0] * 10) == pytest.approx([3.0] * 10)


@pytest.mark.parametrize(
    ("validations", "reads", "words"),
    [
        ([], None, ["no validation"]),
        ([{"step": 1, "validation/loss": 0.5, "validation/gap_no_image": 0.1}], None, ["the same image prompt"]),
        ([validated(1, 0.005)], False, ["No gap yet", "0.0050, standard error 0.0100", "80% as strong"]),
        ([validated(1, -0.1)], False, ["Something is wrong"]),
        (
            [validated(1, 0.1, loss=0.4)],
            True,
            ["uses its image", "20.0% lower with the right image", "It is 0.1000 lower"],
        ),
        ([validated(1, 0.1, loss=0.6)], True, ["Without the adapter it is still 0.1000 lower"]),
        ([validated(i, i / 10, loss=0.5 - i / 100) for i in (1, 2, 3)], True, ["more training should help"]),
        (
            [validated(i, g) for i, g in ((1, 0.1), (2000, 0.2), (3000, 0.15))],
            True,
            ["largest at step 2,000", "no longer"],
        ),
        (
            [validated(i, 0.1, loss=v) for i, v in ((1, 0.5), (2, 0.4), (3, 0.44))],
            True,
            ["at step 2 and is 10.0% higher"],
        ),
    ],
)
def test_the_words_follow_the_numbers(
    validations: list[dict[str, float]], reads: bool | None, words: list[str]
) -> None:
    found, text = read_verdict(validations)
    assert found is reads
    for word in words:
        assert word in text


def test_a_user_reports_a_run(run: Path, run_ipadapter: Callable[..., Any]) -> None:
    process = run_ipadapter("report", run)
    said, complaint = process.communicate(timeout=120)
    assert process.returncode == 0, complaint
    assert said.strip() == f"Saved {run / 'report.html'}"
    assert "The adapter uses its image prompt" in Page(run / "report.html").text


def test_a_folder_of_the_wrong_kind_is_refused_in_one_line(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from ipadapter_trainer.cli import app

    cases = {
        (str(tmp_path),): f"{tmp_path}: no log.jsonl in it. A run is the output folder of a training",
        (): "takes one run, the output folder of a training; none is given.",
        ("runs/a", "runs/b"): "takes one run, the output folder of a training; 2 are given.",
    }
    for arguments, words in cases.items():
        result = CliRunner().invoke(app, ["report", *arguments])
        assert result.exit_code == 2
        assert result.output.count("\n") == 1 and words in result.output

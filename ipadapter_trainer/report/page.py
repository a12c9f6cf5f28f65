"""The report of a run: a self-contained HTML page with charts, samples and a verdict."""

from __future__ import annotations

import base64
import html
import io
import logging
from pathlib import Path

from PIL import Image

from ..data.images import why_unreadable
from .curves import CHARTS, Chart, Lines, draw
from .run_files import CONFIG_FILE, REPORT_FILE, read_run, replace_text, sample_files
from .verdict import read_verdict

_STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.5rem } h3 { font-size: 1rem; margin: 1.5rem 0 .5rem }
pre { background: #8881; padding: 1rem; white-space: pre-wrap; font-size: .85rem; border-radius: .4rem }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem }
figure { margin: 0 } figcaption { font-size: .9rem; margin-bottom: .4rem }
figcaption small { display: block; opacity: .7 }
img { max-width: 100%; background: white; border-radius: .4rem } figure img { width: 100% }
.verdict { border-left: .3rem solid #3a7; padding: .2rem 1rem } .doubt { border-color: #c83 }
"""

log = logging.getLogger(__name__)


def write_report(output: Path, summary: str) -> Path:
    """Write output/report.html from the log, the settings and the samples of a run; `summary` is shown at the top.

    Raises DataError if the folder is not a run.
    """
    train, validations = read_run(output)
    config = output / CONFIG_FILE
    settings = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    name = html.escape(output.resolve().name)
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>{name}: training report</title><style>{_STYLE}</style>",
        f"<h1>{name}</h1>",
        f"<pre>{html.escape(summary)}</pre>" if summary else "",
        _verdict(train, validations),
        '<h2>Curves</h2><div class="curves">',
        *(_figure(chart, drawn) for chart in CHARTS if (drawn := draw(chart, train, validations))),
        "</div>",
        *_samples(output),
        f"<h2>Settings</h2><pre>{html.escape(settings)}</pre></html>\n",
    ]
    target = output / REPORT_FILE
    replace_text(target, "\n".join(parts))
    return target


def _verdict(train: Lines, validations: Lines) -> str:
    reads, text = read_verdict(validations)
    kind = "verdict" if reads else "verdict doubt"
    steps = f"{int(train[-1]['step']):,} steps, loss {train[-1]['loss']:.4f}."
    return f'<p class="{kind}">{html.escape(f"{steps} {text}")}</p>'


def _figure(chart: Chart, drawn: bytes) -> str:
    caption = f"<b>{html.escape(chart.title)}</b><small>{html.escape(chart.meaning)}</small>"
    return f"<figure><figcaption>{caption}</figcaption>{_image(drawn, chart.title, 'svg+xml')}</figure>"


def _samples(output: Path) -> list[str]:
    """The first grid of samples, the middle one and the last."""
    files = list(sample_files(output).items())
    if not files:
        return []
    chosen = [files[i] for i in sorted({0, len(files) // 2, len(files) - 1})]
    return ["<h2>Samples: held-out images, the same noise each time</h2>", *(_grid(*sample) for sample in chosen)]


def _grid(step: int, file: Path) -> str:
    try:
        grid = _image(_as_jpeg(file), f"samples at step {step:,}", "jpeg")
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        log.warning("%s: left out of the report (%s).", file, why_unreadable(error))
        grid = f"<p>{html.escape(file.name)} cannot be read.</p>"
    return f"<h3>Step {step:,}</h3>{grid}"


def _as_jpeg(file: Path) -> bytes:
    """The grid as JPEG, a tenth of the size of its PNG file."""
    stream = io.BytesIO()
    with Image.open(file) as image:
        image.convert("RGB").save(stream, "JPEG", quality=90)
    return stream.getvalue()


def _image(content: bytes, title: str, kind: str) -> str:
    data = base64.b64encode(content).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/{kind};base64,{data}">'

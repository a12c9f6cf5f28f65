"""benchmarks/training.py: what it builds, what it times, and how it judges."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = {
    "resolution": 64,
    "picture": (80, 64),
    "unet": (8, 16, 32, 32),
    "vae": (8, 8, 8, 8),
    "text": (16, 1, 2),
    "vision": (16, 2, 2),
    "image_width": 16,
}
STAND_IN = """
import sys
from diffusers.pipelines.controlnet import MultiControlNetModel
from beside import LOSSES
assert __name__ == "__main__" and sys.argv[1:] == ["--resolution", "64"], sys.argv
assert isinstance(MultiControlNetModel, type)
for step, loss in enumerate(LOSSES):
    sum(number * number for number in range(100_000))
    print("Epoch {}, step {}, data_time: {}, time: {}, step_loss: {}".format(0, step, 0.1, 0.2, loss))
"""


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def small():
    from training_models import SIZES

    return dataclasses.replace(SIZES["tiny"], **SMALL)


def test_tiny_computes_in_the_proportions_of_sd15():
    from training_models import SIZES, part_flops

    shares = {}
    for name in ("tiny", "sd15"):
        flops = part_flops(SIZES[name])
        shares[name] = {part: count / sum(flops.values()) for part, count in flops.items()}
    assert shares["sd15"]["unet"] == pytest.approx(1.670 / 3.135, abs=0.003)  # what others counted: the 46.5 %
    assert shares["tiny"] == pytest.approx(shares["sd15"], abs=0.025)


def test_the_written_model_and_pictures_are_a_training(tmp_path, small):
    """Through the real command's function, on both sides of the clock."""
    from training_child import Clock, run_ours
    from training_models import write_base_model, write_data
    from training_runs import Setup, ours

    setup = Setup(
        base_model=write_base_model(tmp_path / "base", small, "cpu"),
        data=write_data(tmp_path / "data", 8, small),
        resolution=small.resolution,
        batch_size=2,
        warmup=1,
        steps=3,
        workers=0,
        device="cpu",
        threads=1,
    )
    contender = ours(setup, "learning_rate=1e-3 log_with=none")
    assert contender.name == "ours, no cache, learning_rate=1e-3, log_with=none"
    overrides = [text.replace("{output}", str(tmp_path / "run")) for text in contender.arguments[1:]]
    measured = run_ours(overrides, Clock(setup.warmup, setup.steps))
    assert len(measured.losses) == setup.warmup + setup.steps
    assert all(0.5 < loss < 2 for loss in measured.losses)
    assert measured.cpu_seconds > 0 and measured.wall_seconds > 0
    assert 1e8 < measured.peak < 1e11
    assert "1e-3" not in json.dumps(dataclasses.asdict(measured))
    assert list((tmp_path / "run").glob("*.safetensors"))


def test_the_original_runs_as_a_script_with_the_names_it_misses(tmp_path, capsys):
    """A script that prints what tutorial_train.py prints stands for it; the original is nobody's to copy."""
    from training_child import Clock, run_original

    (tmp_path / "tutorial_train.py").write_text(STAND_IN)
    (tmp_path / "beside.py").write_text("LOSSES = [1.5, 1.25, 1.0, 0.75]")
    arguments, stream = list(sys.argv), sys.stdout
    measured = run_original(tmp_path, ["--resolution", "64"], Clock(1, 2))
    assert (sys.argv, sys.stdout) == (arguments, stream)
    assert measured.losses == [1.5, 1.25, 1.0, 0.75]
    assert measured.cpu_seconds > 0
    assert "step_loss: 0.75" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="ended after 4 of 7 steps"):
        run_original(tmp_path, ["--resolution", "64"], Clock(2, 5))


@pytest.mark.skipif(not os.environ.get("IP_ADAPTER_PATH"), reason="IP_ADAPTER_PATH names no checkout of IP-Adapter")
def test_the_original_itself(tmp_path, small):
    from training_models import write_base_model, write_data
    from training_runs import Setup, measure, original

    setup = Setup(
        base_model=write_base_model(tmp_path / "base", small, "cpu"),
        data=write_data(tmp_path / "data", 6, small),
        resolution=small.resolution,
        batch_size=2,
        warmup=1,
        steps=2,
        workers=0,
        device="cpu",
        threads=1,
    )
    measured = measure(setup, original(setup, Path(os.environ["IP_ADAPTER_PATH"])), tmp_path / "run")
    assert len(measured.losses) == 3 and measured.cpu_seconds > 0


def measured(seconds, peak=100, losses=(1.0,)):
    from training_child import Measured

    return Measured(seconds, 2 * seconds, peak, None, list(losses), [])


def judged_rows(device, original_runs, our_runs, *, cached=True):
    from training_runs import ORIGINAL, Contender, Setup
    from training_table import rows_of

    setup = Setup(Path(), Path(), 64, 4, 1, 5, 0, device, 1)
    contenders = [Contender("ours", (), cached=cached)]
    found = {"ours": our_runs}
    if original_runs:
        contenders.insert(0, Contender(ORIGINAL, ()))
        found[ORIGINAL] = original_runs
    return rows_of(found, contenders, setup, judged=True)


def test_ratios_are_taken_within_a_round():
    from training_table import render

    # The second round met a busy machine: figures halve, ratios stay.
    rows = judged_rows("cpu", [measured(10), measured(20), measured(10)], [measured(5), measured(10), measured(5, 150)])
    theirs, ours = rows
    assert (theirs.cpu, theirs.wall, ours.cpu) == (2.0, 1.0, 4.0)
    assert (ours.cpu_ratio, ours.wall_ratio, ours.memory_ratio) == (2.0, 2.0, 1.0)
    assert theirs.bar is None and ours.met is True
    assert ours.as_json()["met"] is True
    assert ">= 1.5 x" in render(rows)


@pytest.mark.parametrize(
    ("device", "cached", "seconds", "peak", "met"),
    [
        ("cpu", True, 6, 1000, True),
        ("cpu", True, 7, 1, False),
        ("cuda", True, 3, 50, True),
        ("cuda", True, 4, 50, False),
        ("cuda", True, 3, 51, False),
        ("cuda", False, 5, 50, True),
        ("cuda", False, 6, 50, False),
        ("cpu", False, 100, 1000, None),
    ],
)
def test_bars(device, cached, seconds, peak, met):
    ours = judged_rows(device, [measured(10)], [measured(seconds, peak)], cached=cached)[-1]
    assert ours.met is met


def test_without_the_original_nothing_is_judged():
    (row,) = judged_rows("cpu", [], [measured(5)])
    assert row.met is None and row.cpu_ratio is None and row.cells()[-1] == "-"


def test_one_of_our_settings_must_meet_a_bar():
    from training import missed_bars
    from training_table import BARS, Row

    bar = BARS["cuda", True]
    slow = Row("a", 1, 1, 1, 1, 1, cpu_ratio=1, wall_ratio=1, memory_ratio=1, bar=bar, judged_by="wall")
    good = dataclasses.replace(slow, name="b", wall_ratio=3.0, memory_ratio=0.5)
    assert missed_bars([slow, good]) == []
    assert missed_bars([slow]) == [">= 3 x, <= 0.5 of the memory (a)"]


@pytest.mark.parametrize("loss", [2.0, float("nan")])
def test_a_contender_that_computes_something_else_is_refused(loss):
    from training_runs import check_losses

    check_losses({"original": [measured(1)], "ours": [measured(1, losses=[1.05])]})
    with pytest.raises(RuntimeError, match="ours: its mean loss is"):
        check_losses({"original": [measured(1)], "ours": [measured(1, losses=[loss])]})


def test_wrong_input(tmp_path, capsys):
    import training

    with pytest.raises(SystemExit):
        training.main(["--original", str(tmp_path)])
    assert "has no tutorial_train.py" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        training.main(["--warmup", "0"])
    assert "--warmup must be at least 1" in capsys.readouterr().err


def test_a_failing_process_is_named(tmp_path):
    from training_runs import Contender, Setup, measure

    setup = Setup(tmp_path, tmp_path, 64, 2, 1, 1, 0, "cpu", 1)
    with pytest.raises(RuntimeError, match=r"ended with code 1:[\s\S]*tutorial_train.py"):
        measure(setup, Contender("original", ("original", str(tmp_path / "nowhere"))), tmp_path / "run")


def test_peak_memory_is_of_one_process():
    """A process that starts another one lends it its own ru_maxrss."""
    from training_child import peak_memory

    code = "from training_child import peak_memory; print(*peak_memory())"
    child = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    peak, used = child.stdout.split()
    assert used == "None" and 4e6 < int(peak) < 1e8
    assert peak_memory()[0] > 2e8  # torch is loaded here

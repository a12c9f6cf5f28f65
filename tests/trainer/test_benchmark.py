"""benchmarks/training/speed.py: what it builds, what it times, and how it judges."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .warm_python import WarmPython

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "training"
SMALL = {
    "resolution": 64,
    "image": (80, 64),
    "unet": (8, 16, 32, 32),
    "vae": (8, 8, 8, 8),
    "text": (16, 1, 2),
    "vision": (16, 2, 2),
    "image_dim": 16,
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
    monkeypatch.syspath_prepend(str(BENCHMARKS.parent))  # gpu.py
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def processes_are_forks(monkeypatch):
    """Of this process, which has the libraries already; elsewhere of a server, which imports them first."""
    import training_processes

    monkeypatch.setattr(training_processes, "_method", "fork")


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


def test_the_written_model_and_images_are_a_training(tmp_path, small):
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
        num_workers=0,
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


@pytest.mark.usefixtures("processes_are_forks")
def test_sdxl_is_cached_measured_and_profiled(tmp_path, small, monkeypatch, capsys):
    """The command itself, at widths that are a matter of seconds."""
    import speed
    import training_models

    sdxl = dataclasses.replace(
        training_models.SIZES["tiny-sdxl"], **{**SMALL, "unet": (64, 64, 64), "text_2": (24, 1, 2)}
    )
    monkeypatch.setattr(training_models, "SIZES", {"tiny-sdxl": sdxl})
    few = ["--device", "cpu", "--rounds", "1", "--warmup", "1", "--steps", "1", "--batch-size", "1", "--profile"]
    extra = ["--extra", "mixed_precision=bf16", "--extra", "no_such_key=1"]
    file = tmp_path / "figures.json"
    assert speed.main(["--size", "tiny-sdxl", *few, *extra, "--json", str(file)]) == 1
    out = capsys.readouterr().out
    assert "ms a step while profiled" in out and "convolution" in out
    assert "Not measured: ours, cache, no_such_key=1 ended with code 1:" in out
    result = json.loads(file.read_text())
    assert [row["name"] for row in result["rows"]] == ["ours, cache", "ours, cache, mixed_precision=bf16"]
    assert all(row["wall"] > 0 and row["ready"] > 0 and row["met"] is None for row in result["rows"])
    assert {"text_encoder", "text_encoder_2"} <= result["flops"].keys() and result["transformers"]
    (profiled,) = result["runs"]["ours, cache, @profile"]
    assert profiled["profile"]["busy"] is None and profiled["profile"]["calls"] > 100


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
        num_workers=0,
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
    from speed import missed_bars
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


def budgeted(seconds, *, failing=(), rounds=2):
    """The names of the runs, and what is missing, when every run takes ten seconds of a clock by hand."""
    import training_runs

    class ByHand(training_runs.Budget):
        left = seconds

    budget, order = ByHand(None), []

    def run(setup, contender, scratch, limit):
        assert limit == budget.left
        order.append(contender.name)
        if budget.left is not None:
            ByHand.left = budget.left - 10
        if contender.name in failing:
            raise training_runs.ChildError(f"{contender.name} failed")
        return measured(1)

    setup = training_runs.Setup(Path(), Path(), 64, 4, 1, 5, 0, "cpu", 1)
    contenders = [training_runs.Contender(name, (), extra=name.isupper()) for name in ("a", "b", "C", "D")]
    return order, training_runs.alternate(setup, contenders, rounds, Path(), budget, run)


def test_rounds_rotate_and_extras_come_once_at_the_end():
    order, found = budgeted(None)
    assert order == ["a", "b", "b", "a", "C", "D"]
    assert not found.missing and [len(runs) for runs in found.runs.values()] == [2, 2, 1, 1]


def test_a_failing_contender_is_not_the_end_of_the_others():
    order, found = budgeted(None, failing=("a", "C"))
    assert order == ["a", "b", "b", "C", "D"]
    assert found.missing == ["a failed", "C failed"] and set(found.runs) == {"b", "D"}


def test_other_losses_make_the_figures_not_count():
    import training_runs

    setup = training_runs.Setup(Path(), Path(), 64, 4, 1, 5, 0, "cpu", 1)
    contenders = [training_runs.Contender(name, ()) for name in ("a", "b")]
    losses = {"a": [1.0], "b": [2.0]}
    found = training_runs.alternate(
        setup, contenders, 1, Path(), run=lambda s, contender, *rest: measured(1, losses=losses[contender.name])
    )
    assert found.missing == [
        "these figures do not count. b: its mean loss is 2.0000, but another contender's is 1.0000."
    ]


def test_a_budget_leaves_out_what_would_not_end(monkeypatch):
    import training_runs

    now = iter(range(0, 10_000, 5))
    monkeypatch.setattr(training_runs.time, "perf_counter", lambda: next(now))  # a run takes 10 s of it
    order, found = budgeted(15)
    assert order == ["a", "b"]
    assert found.missing == [
        "round 2: left out, for want of time",
        "C: left out, for want of time",
        "D: left out, for want of time",
    ]


def test_the_budget_counts_from_its_begin():
    import time

    from training_runs import Budget

    budget = Budget(100, time.perf_counter() - 90)
    assert budget.allows(5) and not budget.allows(15) and 9 < budget.left < 10.1
    assert Budget(None).allows(1e9) and Budget(None).left is None


def test_an_extra_contender_has_no_bar_and_the_ratio_of_the_first_round():
    from training_runs import ORIGINAL, Contender, Setup
    from training_table import rows_of

    setup = Setup(Path(), Path(), 64, 4, 1, 5, 0, "cuda", 0)
    contenders = [Contender(ORIGINAL, ()), Contender("extra", (), True, True), Contender("failed", ())]
    found = {ORIGINAL: [measured(10), measured(40)], "extra": [measured(5)]}
    _, extra = rows_of(found, contenders, setup, judged=True)
    assert (extra.name, extra.wall_ratio, extra.bar) == ("extra", 2.0, None)


def test_a_setting_replaces_the_common_one():
    from training_runs import Setup, ours

    setup = Setup(Path("base"), Path("data"), 64, 4, 1, 5, 0, "cuda", 0)
    arguments = ours(setup, "mixed_precision=fp8 @contiguous").arguments
    assert [text for text in arguments if text.startswith("mixed_precision")] == ["mixed_precision=fp8"]
    assert "@contiguous" in arguments


def test_every_try_still_changes_the_trainer(warm_python: WarmPython, monkeypatch: pytest.MonkeyPatch):
    """They replace parts of the trainer by name; in a process of their own."""
    code = (
        "from training_tries import TRIES; import torch\n"
        "from ipadapter_trainer.training.adapted_unet import AdaptedUNet as D\n"
        "from ipadapter_trainer.training import setup as s\n"
        "before = D._unet_precision, s.prepare_unet, torch.backends.cudnn.benchmark\n"
        "for change in TRIES.values(): change()\n"
        "after = D._unet_precision, s.prepare_unet, torch.backends.cudnn.benchmark\n"
        "print(sum(a is not b for a, b in zip(before, after)))"
    )
    monkeypatch.chdir(BENCHMARKS)
    child = warm_python.start(code, [])
    out, err = child.communicate()
    assert (child.returncode, out) == (0, "3\n"), err


def test_what_a_profile_says():
    from training_profile import covered, kind_of, profile_text

    assert covered([(0, 10), (5, 12), (20, 21)]) == 13
    kinds = {
        "void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16>": "memory format",
        "sm90_xmma_fprop_implicit_gemm_bf16bf16": "convolution",
        "nvjet_sm90_tst_128x256_64x4_1x2": "matrix product",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop": "attention",
        "void at::native::RowwiseMomentsCUDAKernel<float>": "norm",
        "Memcpy HtoD (Pinned -> Device)": "copy to or from the host",
        "void at::native::vectorized_elementwise_kernel<4>": "elementwise",
    }
    assert {name: kind_of(name) for name in kinds} == kinds
    profile = {"ms": 50.0, "calls": 3000, "busy": 0.875, "kinds": [("norm", 30.0, 100)], "kernels": [("k", 10.0, 50)]}
    text = profile_text("ours", profile)
    assert "the GPU is busy 88% of it" in text and "100.0%" in text and "33.3%" in text


@pytest.mark.usefixtures("processes_are_forks")
def test_a_process_is_ended_at_its_limit(tmp_path):
    import time

    from training_processes import ChildError, run_process

    with pytest.raises(ChildError, match="sleeper was ended after 1 s"):
        run_process(time.sleep, (60,), name="sleeper", log=tmp_path / "log", device="cpu", limit=1)
    assert run_process(time.sleep, (0,), name="short", log=tmp_path / "log", device="cpu", limit=60) < 60


def test_gpu_py_keeps_going_and_prints_every_part(tmp_path, monkeypatch, capsys):
    import gpu

    def part(code, **more):
        return gpu.Part(lambda args, limit: ["-c", code], **{"limit": 60, **more})

    parts = {
        "good": part("print('a table')"),
        "bad": part("print('half a table'); raise SystemExit('the reason')"),
        "slow": part("import time; print('begun', flush=True); time.sleep(60)", limit=1),
        "without": gpu.Part(lambda args, limit: None, limit=1, needs="--comfyui"),
    }
    monkeypatch.setattr(gpu, "PARTS", parts)
    assert gpu.main(["--out", str(tmp_path), "--parts", "good,bad,slow,without"]) == 1
    out = capsys.readouterr().out
    assert "=== good: done" in out and "a table" in out
    assert "=== bad: exit code 1" in out and "half a table" in out and "the reason" in out
    assert "=== slow: ended at its time limit" in out and "begun" in out
    assert "it needs --comfyui" in out
    assert (tmp_path / "bad.log").read_text().strip() == "the reason"
    assert gpu.main(["--out", str(tmp_path), "--parts", "good"]) == 0


def test_gpu_py_trains_the_emoji_model_within_its_limit(tmp_path, capsys, monkeypatch):
    import gpu

    seen = []
    monkeypatch.setattr(
        gpu, "run", lambda name, command, out, limit: seen.append(command) or gpu.Outcome(name, 0, 1.0, "")
    )
    assert sum(part.limit for part in gpu.PARTS.values()) <= 12 * 60
    options = ["--parts", "emoji", "--out", str(tmp_path), "--limit", "emoji=200"]
    assert gpu.main(options) == 1
    assert "it needs --images" in capsys.readouterr().out and not seen
    assert gpu.main([*options, "--images", "pictures.zip", "--drawings", "drawings.zip"]) == 0
    assert gpu.main([*options, "--images", "pictures.zip", "--check"]) == 0
    full, check = seen
    assert full[1].endswith("emoji.py") and full[-2:] == ["--budget", "180"]
    assert full[full.index("--drawings") + 1] == "drawings.zip"
    assert check[-1] == "--check" and "--drawings" not in check


@pytest.mark.parametrize(
    ("arguments", "words"), [(["--parts", "all"], "there is no part all"), (["--limit", "comfyui"], "PART=SECONDS")]
)
def test_gpu_py_refuses(arguments, words, capsys):
    import gpu

    with pytest.raises(SystemExit):
        gpu.main(arguments)
    assert words in capsys.readouterr().err


def test_the_check_of_gpu_py_runs_a_training(tmp_path, capsys, warm_python, monkeypatch):
    import gpu

    monkeypatch.setattr(sys, "executable", str(warm_python.executable))
    long = ["--limit", "training-sdxl=600"]  # other tests may keep the CPU busy
    assert gpu.main(["--check", "--parts", "training-sdxl", "--out", str(tmp_path), *long]) == 0
    out = capsys.readouterr().out
    assert "=== training-sdxl: done" in out and "ours, cache, gradient_checkpointing=true" in out
    assert json.loads((tmp_path / "training-sdxl.json").read_text())["size"]["name"] == "tiny-sdxl"


def test_wrong_input(tmp_path, capsys):
    import speed

    with pytest.raises(SystemExit):
        speed.main(["--original", str(tmp_path)])
    assert "has no tutorial_train.py" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        speed.main(["--warmup", "0"])
    assert "--warmup must be at least 1" in capsys.readouterr().err


@pytest.mark.usefixtures("processes_are_forks")
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

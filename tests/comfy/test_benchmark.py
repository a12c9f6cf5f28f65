"""benchmarks/comfyui/overhead.py: every case acts, and what a GPU would print can be printed on the CPU."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "comfyui"
FRAMES = 3


@pytest.fixture(scope="module")
def benchmark(comfyui):
    """The benchmark's modules, with few frames, and this repository's pack as they load it."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(BENCHMARKS))
    import overhead_cases
    import overhead_device
    import overhead_host
    import overhead_models
    import overhead_runs

    patch.setattr(overhead_cases, "IMAGES", FRAMES)
    packs = overhead_cases.Packs(overhead_host.load_ours(), None)
    yield SimpleNamespace(
        cases=overhead_cases, device=overhead_device, models=overhead_models, runs=overhead_runs, packs=packs
    )
    patch.undo()


def test_the_calls_of_each_case(benchmark):
    """Six in each of the 16 layers for each image prompt, masked or not, and for 3 frames no more than for one."""
    cases, model = benchmark.cases, benchmark.models.new_unet("sd15", 32)
    names = (cases.ONE, cases.THREE, cases.MASK, cases.REGIONS, cases.FACE, cases.FRAMES)
    found, latents = {}, []
    for case in cases.cases(benchmark.packs, model, "sd15", torch.float32, names):
        run = functools.partial(benchmark.models.sample, family="sd15", size=8, images=case.images)
        made = case.models(model)
        latents.append(run(made["ours"], steps=1))
        inside = {name: benchmark.runs.calls_in_layers(each, run) for name, each in made.items()}
        found[case.name] = sum(inside["ours"].values()) - sum(inside["base"].values())
        assert not torch.allclose(latents[-1], run(model, steps=1), atol=1e-3), case.name
    assert list(found.values()) == [96, 288, 96, 384, 96, 96]
    assert latents[-1].shape == (FRAMES, 4, 8, 8)


def test_old_names_have_no_face_prompt(benchmark):
    cases, model = benchmark.cases, benchmark.models.new_unet("sd15", 32)
    packs = cases.Packs(benchmark.packs.ours, None, old_names=True)
    made = list(cases.cases(packs, model, "sd15", torch.float32, (cases.ONE, cases.FACE, cases.FRAMES)))
    assert [case.name for case in made] == [cases.ONE, cases.FRAMES]
    run = functools.partial(benchmark.models.sample, family="sd15", size=8, images=FRAMES, steps=1)
    assert not torch.allclose(run(made[1].models(model)["ours"]), run(model), atol=1e-3)


def test_the_rows_of_a_device(benchmark, capsys):
    cases, device = benchmark.cases, benchmark.device
    settings = device.DeviceSettings(
        torch.device("cpu"), 32, torch.float32, (("sd15", 8, (cases.ONE, cases.FRAMES)),), 3, 2, profile=True
    )
    rows = {row.name: row for row in device.rows_on_device(benchmark.packs, settings)}
    for name in (cases.ONE, cases.FRAMES):
        launches, held = rows[f"SD1.5 {name}: launches"], rows[f"SD1.5 {name}: held by the MODEL"]
        assert launches.ours > launches.base > 100 and held.ours > held.base == 0
        assert rows[f"SD1.5 {name}: step"].ours > 0
        assert rows[f"SD1.5 {name}: added to a step"].base == 0
    assert rows[f"SD1.5 {cases.FRAMES}: held by the MODEL"].ours > rows[f"SD1.5 {cases.ONE}: held by the MODEL"].ours
    printed = capsys.readouterr().out
    assert "+16.0 launches" in printed and "scaled_dot_product" in printed


def test_steps_and_attention_are_timed(benchmark):
    device, cpu = benchmark.device, torch.device("cpu")

    def run(steps, callback):
        for _ in range(steps):
            torch.ones(300, 300) @ torch.ones(300, 300)
            callback(None)

    assert len(device.steps_of_a_run(run, 4, cpu)) == 3
    kernels = device.kernels_of_a_step(run, cpu)
    assert kernels["aten::mm"][0] == 1 and kernels["aten::ones"][0] == 2
    lines = device.attention_alone(device.DeviceSettings(cpu, dtype=torch.float32), repeats=1)
    assert lines.count("PyTorch's choice") == 2 and "not possible" in lines


def test_cuda_without_a_gpu_is_refused(comfyui):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, str(BENCHMARKS / "overhead.py"), "--comfyui", str(comfyui), "--device", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "finds no CUDA device" in done.stderr

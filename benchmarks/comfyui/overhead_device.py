"""The measurements on a GPU: steps of real size, kernels and memory. Import it after `start_comfyui`."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch
from overhead_cases import FACE, FRAMES, MASK, ONE, REGIONS, THREE, Case, Packs, cases
from overhead_measure import held_bytes
from overhead_models import REAL_WIDTH, half_precision_unets, new_unet, sample
from overhead_runs import LABELS, check_effect
from overhead_table import Row
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

ONE_ADAPTER_AT_MOST = 1.0  # % of a step
NO_KERNELS = ("Activity Buffer Request", "Context Sync", "Event Sync", "Stream Sync", "Lazy Function Loading")
WAYS = {
    "PyTorch's choice": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
Kernels = dict[str, tuple[float, float]]  # by name, in one step: how many, and their microseconds


@dataclass(frozen=True)
class DeviceSettings:
    """`parts`: a family, the size of its latents (128 for 1024 px), and its cases. Of `steps` in a run the first is not
    timed.
    """

    device: torch.device
    width: int = REAL_WIDTH
    dtype: torch.dtype = torch.float16
    parts: tuple[tuple[str, int, tuple[str, ...]], ...] = (
        ("sdxl", 128, (ONE, THREE, MASK, REGIONS, FACE)),
        ("sd15", 32, (FRAMES,)),
    )
    steps: int = 8
    rounds: int = 4
    profile: bool = False


def rows_on_device(packs: Packs, settings: DeviceSettings) -> Iterator[Row]:
    """All cases of each part; the UNets have all layers of their family."""
    for family, size, names in settings.parts:
        unet = new_unet(family, settings.width, settings.dtype, device=settings.device)
        for case in cases(packs, unet, family, settings.dtype, names, settings.device):
            run = functools.partial(sample, family=family, size=size, images=case.images)
            yield from _rows_of_case(f"{LABELS[family]} {case.name}", case, unet, run, settings)
        _free(settings.device)


def _rows_of_case(
    label: str, case: Case, unet: Any, run: Callable[..., Any], settings: DeviceSettings
) -> Iterator[Row]:
    models: dict[str, Any] = {}
    peaks: dict[str, int] = {}
    for name, build in {"base": lambda base: base, **case.builders}.items():
        with half_precision_unets() if settings.dtype == torch.float16 else contextlib.nullcontext():
            models[name], peaks[name] = _build_and_weigh(build, unet, run, settings.device)
    check_effect({name: run(each, steps=3) for name, each in models.items()})
    times = _alternate({n: functools.partial(run, m) for n, m in models.items()}, settings)
    yield _row(f"{label}: step", "ms", {name: statistics.median(ts) * 1e3 for name, ts in times.items()})
    added = {
        name: (statistics.median(t / base for t, base in zip(ts, times["base"], strict=True)) - 1) * 100
        for name, ts in times.items()
    }
    bar = {"at_most": ONE_ADAPTER_AT_MOST} if case.name == ONE and settings.device.type == "cuda" else {}
    yield _row(f"{label}: added to a step", "%", added, **bar)
    kernels = {name: kernels_of_a_step(functools.partial(run, each), settings.device) for name, each in models.items()}
    counts = {name: sum(count for count, _ in each.values()) for name, each in kernels.items()}
    busy = {name: sum(time for _, time in each.values()) / 1e3 for name, each in kernels.items()}
    yield _row(f"{label}: launches", "a step", counts)
    yield _row(f"{label}: the device is busy", "ms a step", busy)
    if peaks["base"]:
        yield _row(f"{label}: peak memory beside the UNet", "MB", {name: each / 1e6 for name, each in peaks.items()})
    held = {name: held_bytes(each, unet) / 1e6 for name, each in models.items()}
    yield _row(f"{label}: held by the MODEL", "MB", held)
    if settings.profile:
        for name in case.builders:
            print(f"\n{label}, {name}: kernels added to a step")
            print(_added_kernels(kernels["base"], kernels[name]), flush=True)


def _row(name: str, unit: str, figures: Mapping[str, float], **bars: float) -> Row:
    ours, peer = figures["ours"], figures.get("peer")
    ratio = ours / peer if peer and unit != "%" else None
    return Row(name, unit, ours, peer, figures["base"], ratio, **bars)


def _alternate(runs: Mapping[str, Callable[..., Any]], settings: DeviceSettings) -> dict[str, list[float]]:
    """Seconds of a step, the median of a run, in each round; the order rotates from round to round."""
    names, seconds = list(runs), {name: list[float]() for name in runs}
    for number in range(settings.rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(statistics.median(steps_of_a_run(runs[name], settings.steps, settings.device)))
    return seconds


def steps_of_a_run(run: Callable[..., Any], steps: int, device: torch.device) -> list[float]:
    """Seconds between the same point of one step and the next, on the device's own clock where it has one."""
    marks: list[Any] = []

    def mark(*_: Any) -> None:
        if device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            marks.append(event)
        else:
            marks.append(time.perf_counter())

    gc.collect()
    run(steps=steps, callback=mark)
    if device.type == "cuda":
        _wait(device)
        return [first.elapsed_time(then) / 1e3 for first, then in itertools.pairwise(marks)]
    return [then - first for first, then in itertools.pairwise(marks)]


def kernels_of_a_step(run: Callable[..., Any], device: torch.device, steps: int = 2) -> Kernels:
    """What the device does in one step in the middle of a run; on the CPU the operators."""
    profiler, seen = _profiler(device), []

    def switch(*_: Any) -> None:
        seen.append(1)
        if len(seen) in (1, 1 + steps):
            _wait(device)
        if len(seen) == 1:
            profiler.start()
        elif len(seen) == 1 + steps:
            profiler.stop()

    run(steps=steps + 2, callback=switch)
    return _kernels(profiler, device, steps)


def _profiler(device: torch.device) -> profile:
    return profile(activities=[ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU])


def _kernels(profiler: profile, device: torch.device, times: int) -> Kernels:
    """What was recorded, divided by `times`."""
    kind = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    counts: Counter[str] = Counter()
    micros: Counter[str] = Counter()
    for event in profiler.events() or ():
        if event.device_type == kind and event.name not in NO_KERNELS:
            counts[event.name] += 1
            micros[event.name] += event.time_range.elapsed_us() if device.type == "cuda" else event.self_cpu_time_total
    return {name: (count / times, micros[name] / times) for name, count in counts.items()}


def _added_kernels(base: Kernels, own: Kernels, most: int = 20) -> str:
    """The kernels that `own` has more of, or spends more time in, as lines."""
    lines: list[tuple[float, float, str]] = []
    for name in {*base, *own}:
        (count, time), (count_0, time_0) = own.get(name, (0.0, 0.0)), base.get(name, (0.0, 0.0))
        if count != count_0:
            lines.append((time - time_0, count - count_0, name))
    lines.sort(reverse=True)
    shown = [f"{count:+8.1f} launches {time:+10.1f} us  {name[:110]}" for time, count, name in lines[:most]]
    total = sum(own[name][1] for name in own) - sum(base[name][1] for name in base)
    return "\n".join([*shown, f"all kernels: {total:+.1f} us of {sum(t for _, t in base.values()):.1f} us"])


def _build_and_weigh(
    build: Callable[[Any], Any], unet: Any, run: Callable[..., Any], device: torch.device
) -> tuple[Any, int]:
    """The MODEL, and the bytes of the GPU's memory that it and a run take at the highest point, beside what is there
    before: the UNet's weights, and models that were built before. What ComfyUI may drop before the run, as the weights
    of an applied adapter, is dropped.
    """
    if device.type != "cuda":
        return build(unet), 0
    run(unet, steps=1)  # the UNet is on the device
    _drop_all_but(unet, device)
    before = torch.cuda.memory_allocated()
    model = build(unet)
    _drop_all_but(unet, device)
    torch.cuda.reset_peak_memory_stats()
    run(model, steps=2)
    return model, torch.cuda.max_memory_allocated() - before


def _drop_all_but(unet: Any, device: torch.device) -> None:
    management = comfy.model_management
    keep = [loaded for loaded in management.current_loaded_models if loaded.model and loaded.model.model is unet.model]
    management.free_memory(1e30, device, keep_loaded=keep)
    _free(device)


def _free(device: torch.device) -> None:
    gc.collect()
    _wait(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def attention_alone(settings: DeviceSettings, repeats: int = 50) -> str:
    """What the attention to 16 tokens costs by each of PyTorch's ways on both grids of SDXL at 1024 px, as lines."""
    lines = ["\nAttention to 16 tokens alone, fp16, a call of it in us: on the device, and to issue it"]
    for heads, queries in ((10, 4096), (20, 1024)):
        options = {"device": settings.device, "dtype": settings.dtype}
        query = torch.randn(2, queries, heads, 64, **options).transpose(1, 2)
        key, value = torch.randn(2, 2, heads, 16, 64, **options)
        for name, way in WAYS.items():
            with contextlib.nullcontext() if way is None else sdpa_kernel(way):
                try:
                    busy, issue = _time_of_attention(query, key, value, repeats, settings.device)
                    figures = f"{busy:8.1f} {issue:8.1f}"
                except RuntimeError as error:
                    figures = f"not possible: {str(error).splitlines()[0][:80]}"
            lines.append(f"{queries} queries, {heads} heads, {name:<20} {figures}")
    return "\n".join(lines)


def _time_of_attention(*tensors: Any) -> tuple[float, float]:
    """Microseconds of kernels, and of the host without waiting for them."""
    query, key, value, repeats, device = tensors
    for _ in range(3):
        scaled_dot_product_attention(query, key, value)
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        scaled_dot_product_attention(query, key, value)
    issue = (time.perf_counter() - start) / repeats * 1e6
    _wait(device)
    with _profiler(device) as profiler:
        for _ in range(repeats):
            scaled_dot_product_attention(query, key, value)
        _wait(device)
    return sum(micros for _, micros in _kernels(profiler, device, repeats).values()), issue

"""The measurements, as rows of the table. Import it after `start_comfyui`."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from overhead_cases import FACE, FRAMES, REGIONS, Contender, Packs, cases
from overhead_measure import (
    ATTENTION,
    MATMULS,
    SYNCS,
    Counting,
    Duration,
    alternate,
    held_bytes,
    median,
    paired_ratio,
    total,
)
from overhead_models import REAL_WIDTH, half_precision_unets, new_adapter, new_unet, sample
from overhead_table import Row

LABELS = {"sd15": "SD1.5", "sdxl": "SDXL"}
WINDOW_END = 0.9  # of the schedule; a window is what makes a step look at its sigma
HELD_LIMITS = {torch.float16: 12.0, torch.float32: 22.0}  # MB, SDXL with 16 tokens
FILE_DTYPES = (torch.float16, torch.float32)
APPLY_SHARE = 0.25  # of the peer's time
CALLS_SHARE = 0.5  # of the peer's added calls


@dataclass(frozen=True)
class Settings:
    """`width` channels in the sampled UNets' first level, latents of `size` by `size`, `steps` in a run; how often
    runs, Apply and clones are timed.
    """

    width: int = 64
    size: int = 16
    steps: int = 4
    repeats: int = 7
    apply_repeats: int = 3
    clone_repeats: int = 5


def rows_of_apply(packs: Packs, settings: Settings) -> Iterator[Row]:
    """Time of Apply and of a clone, and bytes held after Apply: SDXL at its real width, plus adapter, 16 tokens."""
    model = new_unet("sdxl", REAL_WIDTH, meta=True)
    for dtype in FILE_DTYPES:
        contenders = packs.contenders(new_adapter(packs.ours, model, "sdxl", dtype))
        actions: dict[str, Callable[[], Any]] = {
            name: functools.partial(each.apply, model) for name, each in contenders.items()
        }
        actions["with projection"] = functools.partial(contenders["ours"].apply_with_projection, model)
        times = alternate(actions, settings.apply_repeats)
        file = f"{_short(dtype)} file"
        # The published adapters are fp16 files, so the bar is on those.
        share = APPLY_SHARE if dtype == torch.float16 and not packs.old_names else None
        yield from _time_rows(f"SDXL Apply, {file}", "s", times, share, ours="ours")
        yield from _time_rows(f"SDXL Apply + projection, {file}", "s", times, ours="with projection")
        if dtype == torch.float16:
            yield from _rows_of_clones(model, contenders, settings)
            builders = {name: each.apply for name, each in contenders.items()}
            for model_dtype, limit in HELD_LIMITS.items():
                yield _row_of_held("SDXL held after Apply", "sdxl", builders, model_dtype, limit)


def _rows_of_clones(model: Any, contenders: Mapping[str, Contender], settings: Settings) -> Iterator[Row]:
    """ComfyUI clones a model in every node that patches it. Older versions deep-copy all that hangs on it."""
    models = {"base": model, **{name: each.apply(model) for name, each in contenders.items()}}
    times = alternate({name: each.clone for name, each in models.items()}, settings.clone_repeats)
    yield from _time_rows("SDXL clone", "ms", times)
    added = {name: held_bytes(each.clone(), each) / 1e6 for name, each in models.items()}
    yield Row("SDXL new bytes in a clone", "MB", added["ours"], added.get("peer"), added["base"])


def _row_of_held(
    name: str,
    family: str,
    builders: Mapping[str, Callable[[Any], Any]],
    dtype: torch.dtype,
    limit: float | None = None,
) -> Row:
    """What the patched MODEL keeps in memory beside the base model's, for an adapter file in fp16."""
    model, held = new_unet(family, REAL_WIDTH, dtype, meta=True), {}
    for pack, build in builders.items():
        with half_precision_unets() if dtype == torch.float16 else contextlib.nullcontext():
            held[pack] = held_bytes(build(model), model) / 1e6
    ours, peer = held["ours"], held.get("peer")
    ratio = ours / peer if peer else None
    return Row(f"{name}, {_short(dtype)} model", "MB", ours, peer, 0, ratio, at_most=limit)


def rows_of_cases(packs: Packs, settings: Settings) -> Iterator[Row]:
    """Calls, time of a step and bytes held of a face prompt, four regions and an image for each frame, on SD1.5."""
    model, real = new_unet("sd15", settings.width), new_unet("sd15", REAL_WIDTH, torch.float16, meta=True)
    names = (FACE, REGIONS, FRAMES)
    sampled = cases(packs, model, "sd15", torch.float32, names)
    for case, of_real_width in zip(sampled, cases(packs, real, "sd15", torch.float16, names), strict=True):
        few = case.images > 1
        how = replace(settings, size=settings.size // 2, steps=2, repeats=3) if few else settings
        label, models = f"SD1.5 {case.name}", case.models(model)
        run = functools.partial(sample, family="sd15", size=how.size, images=case.images)
        check_effect({name: run(each, steps=how.steps) for name, each in models.items()})
        inside = {name: calls_in_layers(each, run) for name, each in models.items()}
        yield _count(f"{label}: added calls in the layers", "a forward", _added(inside))
        yield from _rows_of_steps(f"{label}: step", models, run, how)
        yield _row_of_held(f"{label}: held after Apply", "sd15", of_real_width.builders, torch.float16)


def rows_of_sampling(packs: Packs, family: str, settings: Settings) -> Iterator[Row]:
    """Counts and times of sampling with a narrow UNet that has all layers of its family."""
    model = new_unet(family, settings.width)
    contenders = packs.contenders(new_adapter(packs.ours, model, family, torch.float32))
    models = {"base": model, **{name: each.apply(model) for name, each in contenders.items()}}
    windowed = {"base": model, **{name: each.apply(model, WINDOW_END) for name, each in contenders.items()}}
    run = functools.partial(sample, family=family, size=settings.size)
    check_effect({name: run(each, steps=settings.steps) for name, each in models.items()})
    yield from _rows_of_counts(LABELS[family], models, windowed, run)
    yield from _rows_of_steps(f"{LABELS[family]} step", models, run, settings)


def _rows_of_steps(name: str, models: Mapping[str, Any], run: Callable[..., Any], settings: Settings) -> Iterator[Row]:
    actions = {pack: functools.partial(run, each, steps=settings.steps) for pack, each in models.items()}
    times = alternate(actions, settings.repeats)
    steps = {
        pack: [Duration(d.cpu / settings.steps, d.wall / settings.steps) for d in ds] for pack, ds in times.items()
    }
    yield from _time_rows(name, "ms", steps, 1.0)


def _rows_of_counts(
    label: str, models: Mapping[str, Any], windowed: Mapping[str, Any], run: Callable[..., Any]
) -> Iterator[Row]:
    whole = {name: calls_in_layers(each, run, kernels=False) for name, each in models.items()}
    inside = {name: calls_in_layers(each, run) for name, each in models.items()}
    inside_windowed = {name: calls_in_layers(each, run) for name, each in windowed.items()}
    steps = {name: calls_of_a_step(each, run) for name, each in windowed.items()}
    patched = {name: len(_replacements(each)) for name, each in models.items()}
    fired = _added(whole, (ATTENTION,))
    added = _added(inside)
    yield Row(f"{label} layers patched", "", patched["ours"], patched.get("peer"), patched["base"])
    yield Row(f"{label} layers that fire", "", fired["ours"], fired.get("peer"), fired["base"])
    yield _count(f"{label} added calls in the layers", "a forward", added, ratio_at_most=CALLS_SHARE)
    yield _count(f"{label} the same, composite calls whole", "a forward", _added(whole))
    each = {name: count / fired[name] for name, count in added.items() if fired[name]}
    yield _count(f"{label} added calls in a layer that fires", "a forward", each)
    yield _count(f"{label} added calls of a whole step, window", "a step", _added(steps))
    yield _count(f"{label} added matmuls beside the attention", "a forward", _added(inside, MATMULS), at_most=0)
    syncs = {name: max(_added(calls, SYNCS)[name] for calls in (inside, inside_windowed)) for name in models}
    yield _count(f"{label} added host syncs in the layers", "a forward", syncs, at_most=0)
    yield _count(f"{label} added host syncs of a whole step, window", "a step", _added(steps, SYNCS), at_most=1)


def calls_in_layers(model: Any, run: Callable[..., Any], *, kernels: bool = True) -> Counter[str]:
    """Calls of operators in one forward pass of the diffusion model, both branches in one batch.

    `kernels`: see `Counting`.
    """
    network = model.model.diffusion_model
    original, counting, forwards = network.forward, Counting(kernels=kernels), []

    def forward(*args: Any, **kwargs: Any) -> Any:
        forwards.append(args)
        with counting:
            return original(*args, **kwargs)

    network.forward = forward
    try:
        run(model, steps=1)
    finally:
        del network.forward  # the class's own again
    if len(forwards) != 1:
        raise RuntimeError(f"{len(forwards)} forward passes in one step: the branches were not batched; free memory.")
    return counting.calls


def calls_of_a_step(model: Any, run: Callable[..., Any], few: int = 2, many: int = 6) -> Counter[str]:
    """Calls of operators that each further step of a run adds; what a run does once drops out."""
    counts = []
    for steps in (few, many):
        with Counting(kernels=True) as counting:
            run(model, steps=steps)
        counts.append(counting.calls)
    return Counter({name: (counts[1][name] - counts[0][name]) / (many - few) for name in counts[1]})


def _added(calls: Mapping[str, Counter[str]], names: tuple[str, ...] | None = None) -> dict[str, float]:
    """How many more calls than the base model's, for each contender."""
    return {name: total(each, names) - total(calls["base"], names) for name, each in calls.items()}


def _count(name: str, unit: str, counts: Mapping[str, float], **bars: float) -> Row:
    ours, peer = counts["ours"], counts.get("peer")
    return Row(name, unit, ours, peer, counts.get("base"), ours / peer if peer else None, **bars)


def _time_rows(
    name: str,
    unit: str,
    times: Mapping[str, list[Duration]],
    ratio_at_most: float | None = None,
    ours: str = "ours",
) -> Iterator[Row]:
    """A row of CPU time, which is judged, and one of wall time, which other programs on the machine disturb."""
    scale = {"s": 1.0, "ms": 1e3}[unit]
    medians = {each: median(durations) for each, durations in times.items()}
    ratio = paired_ratio(times[ours], times["peer"]) if "peer" in times else None
    for clock in ("cpu", "wall"):
        figures = {each: getattr(duration, clock) * scale for each, duration in medians.items()}
        yield Row(
            name,
            f"{unit} {clock}",
            figures[ours],
            figures.get("peer"),
            figures.get("base"),
            getattr(ratio, clock) if ratio else None,
            ratio_at_most=ratio_at_most if clock == "cpu" else None,
        )


def _replacements(model: Any) -> Mapping[Any, Any]:
    return model.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})


def check_effect(latents: Mapping[str, torch.Tensor]) -> None:
    """A contender that changes nothing, or breaks the image, would be cheap for the wrong reason."""
    for name, latent in latents.items():
        if not latent.isfinite().all():
            raise RuntimeError(f"{name}: the sampled latents are not finite, so its figures would mean nothing.")
        if name != "base" and torch.allclose(latent, latents["base"], rtol=1e-3, atol=1e-3):
            raise RuntimeError(f"{name}: the adapter changed nothing, so its figures would mean nothing.")


def _short(dtype: torch.dtype) -> str:
    return {torch.float16: "fp16", torch.float32: "fp32"}[dtype]

"""The measurements, as rows of the table. Import it after `start_comfyui`."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
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
from overhead_models import REAL_WIDTH, OldNames, Ours, Peer, half_precision_unets, new_adapter, new_unet, sample
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


@dataclass(frozen=True, eq=False)
class Packs:
    """This repository's pack, and the peer's package or None."""

    ours: SimpleNamespace
    peer: ModuleType | None
    old_names: bool = False

    def appliers(self, model: Any, family: str, dtype: torch.dtype) -> tuple[Ours | OldNames, Peer | None]:
        """Both packs' Apply with the same adapter, whose weights have this dtype."""
        adapter = new_adapter(self.ours, model, family, dtype)
        ours = OldNames if self.old_names else Ours
        return ours(self.ours, adapter), self.peer and Peer(self.peer, self.ours, adapter)


def rows_of_apply(packs: Packs, settings: Settings) -> Iterator[Row]:
    """Time of Apply and of a clone, and bytes held after Apply: SDXL at its real width, plus adapter, 16 tokens."""
    model = new_unet("sdxl", REAL_WIDTH, meta=True)
    for dtype in FILE_DTYPES:
        ours, peer = packs.appliers(model, "sdxl", dtype)
        actions: dict[str, Callable[[], Any]] = {
            "ours": lambda ours=ours: ours.apply(model),
            "with projection": lambda ours=ours: ours.apply_with_projection(model),
        }
        if peer:
            actions["peer"] = lambda peer=peer: peer.apply(model)
        times = alternate(actions, settings.apply_repeats)
        file = f"{_short(dtype)} file"
        # The published adapters are fp16 files, so the bar is on those.
        share = APPLY_SHARE if dtype == torch.float16 and not packs.old_names else None
        yield from _time_rows(f"SDXL Apply, {file}", "s", times, share, ours="ours")
        yield from _time_rows(f"SDXL Apply + projection, {file}", "s", times, ours="with projection")
        if dtype == torch.float16:
            yield from _rows_of_clones(model, ours, peer, settings)
            yield from _rows_of_held(ours, peer)


def _rows_of_clones(model: Any, ours: Ours, peer: Peer | None, settings: Settings) -> Iterator[Row]:
    """ComfyUI clones a model in every node that patches it. Older versions deep-copy all that hangs on it."""
    models = {"base": model, "ours": ours.apply(model)} | ({"peer": peer.apply(model)} if peer else {})
    times = alternate({name: each.clone for name, each in models.items()}, settings.clone_repeats)
    yield from _time_rows("SDXL clone", "ms", times)
    added = {name: held_bytes(each.clone(), each) / 1e6 for name, each in models.items()}
    yield Row("SDXL new bytes in a clone", "MB", added["ours"], added.get("peer"), added["base"])


def _rows_of_held(ours: Ours, peer: Peer | None) -> Iterator[Row]:
    """What the patched MODEL keeps in memory beside the base model's, for an adapter file in fp16."""
    for dtype, limit in HELD_LIMITS.items():
        model = new_unet("sdxl", REAL_WIDTH, dtype, meta=True)
        held = held_bytes(ours.apply(model), model) / 1e6
        held_by_peer = None
        if peer and dtype == torch.float16:
            with half_precision_unets():
                held_by_peer = held_bytes(peer.apply(model), model) / 1e6
        elif peer:
            held_by_peer = held_bytes(peer.apply(model), model) / 1e6
        ratio = held / held_by_peer if held_by_peer else None
        yield Row(f"SDXL held after Apply, {_short(dtype)} model", "MB", held, held_by_peer, 0, ratio, at_most=limit)


def rows_of_sampling(packs: Packs, family: str, settings: Settings) -> Iterator[Row]:
    """Counts and times of sampling with a narrow UNet that has all layers of its family."""
    model = new_unet(family, settings.width)
    ours, peer = packs.appliers(model, family, torch.float32)
    models = {"base": model, "ours": ours.apply(model)} | ({"peer": peer.apply(model)} if peer else {})
    windowed = {"base": model, "ours": ours.apply(model, WINDOW_END)} | (
        {"peer": peer.apply(model, WINDOW_END)} if peer else {}
    )
    run = functools.partial(sample, family=family, size=settings.size)
    _check_effect({name: run(each, steps=settings.steps) for name, each in models.items()})
    yield from _rows_of_counts(LABELS[family], models, windowed, run)
    times = alternate(
        {name: functools.partial(run, each, steps=settings.steps) for name, each in models.items()}, settings.repeats
    )
    steps = {
        name: [Duration(d.cpu / settings.steps, d.wall / settings.steps) for d in ds] for name, ds in times.items()
    }
    yield from _time_rows(f"{LABELS[family]} step", "ms", steps, 1.0)


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


def _check_effect(latents: Mapping[str, torch.Tensor]) -> None:
    """A contender that changes nothing, or breaks the picture, would be cheap for the wrong reason."""
    for name, latent in latents.items():
        if not latent.isfinite().all():
            raise RuntimeError(f"{name}: the sampled latents are not finite, so its figures would mean nothing.")
        if name != "base" and torch.allclose(latent, latents["base"], rtol=1e-3, atol=1e-3):
            raise RuntimeError(f"{name}: the adapter changed nothing, so its figures would mean nothing.")


def _short(dtype: torch.dtype) -> str:
    return {torch.float16: "fp16", torch.float32: "fp32"}[dtype]

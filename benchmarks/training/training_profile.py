"""A profile of training steps: the share of the time in which the device is busy, and the kernels that it runs."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

SHOWN = 25
# By words in a kernel's name, the first that fits. Names are cuDNN's, cuBLAS's, PyTorch's, Triton's and the CPU's.
KINDS = (
    ("attention", ("flash", "fmha", "attention", "sdpa", "softmax")),
    ("memory format", ("nchwtonhwc", "nhwctonchw", "transpose", "permute")),
    ("convolution", ("conv", "implicit_gemm", "fprop", "dgrad", "wgrad", "xmma")),
    ("matrix product", ("gemm", "nvjet", "cutlass", "matmul", "addmm", "::mm", "::bmm", "::linear", "splitk")),
    ("norm", ("norm", "rowwisemoments", "computefused", "gammabeta", "internalgradients", "computebackward")),
    ("optimizer", ("adam", "multi_tensor", "foreach")),
    ("copy to or from the host", ("htod", "dtoh")),
    ("copy, cast or concatenation", ("memcpy", "memset", "copy", "catarray", "::cat", "fill", "_to_copy")),
    ("elementwise", ("elementwise", "reduce", "::mul", "::add", "silu", "gelu", "triton")),
)


class Profile:
    """torch.profiler over some steps: of kernels on a GPU, of operators on the CPU."""

    def __init__(self) -> None:
        self._profiler: Any = None
        self._gpu = False
        self._start = self.wall = 0.0

    def start(self) -> None:
        """Begin."""
        import torch  # noqa: PLC0415
        from torch.profiler import ProfilerActivity, profile  # noqa: PLC0415

        self._gpu = torch.cuda.is_available()
        # Only kernels: recording every operator as well would slow down the CPU, and so change the result.
        self._profiler = profile(activities=[ProfilerActivity.CUDA if self._gpu else ProfilerActivity.CPU])
        self._profiler.start()
        self._start = time.perf_counter()

    def stop(self) -> None:
        """End, when the device has done all queued work."""
        import torch  # noqa: PLC0415

        if self._gpu:
            torch.cuda.synchronize()
        self.wall = time.perf_counter() - self._start
        self._profiler.stop()

    def summary(self, steps: int) -> dict[str, Any]:
        """Per step: milliseconds of wall time, kernels, the share of the time in which the device is busy (None on the
        CPU), and the milliseconds and calls by kind and by kernel, most first.
        """
        rows: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
        spans: list[tuple[float, float]] = []
        for event in self._profiler.events():
            on_device = "cuda" in str(event.device_type).lower()
            if on_device != self._gpu:
                continue
            begin, end = event.time_range.start, event.time_range.end
            spans.append((begin, end))
            took = end - begin if self._gpu else event.self_cpu_time_total
            rows[event.name][0] += took
            rows[event.name][1] += 1
        kinds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
        for name, (took, count) in rows.items():
            kinds[kind_of(name)][0] += took
            kinds[kind_of(name)][1] += count
        return {
            "ms": self.wall * 1e3 / steps,
            "calls": sum(count for _, count in rows.values()) / steps,
            "busy": covered(spans) / 1e6 / self.wall if self._gpu else None,
            "kinds": _per_step(kinds, steps),
            "kernels": _per_step(rows, steps)[:SHOWN],
        }


def _per_step(rows: Mapping[str, list[float]], steps: int) -> list[tuple[str, float, float]]:
    found = [(name, took / 1e3 / steps, count / steps) for name, (took, count) in rows.items()]
    return sorted(found, key=lambda row: -row[1])


def kind_of(kernel: str) -> str:
    """What a kernel does, by its name."""
    name = kernel.lower()
    return next((kind for kind, words in KINDS if any(word in name for word in words)), "other")


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals: kernels of two streams at once count once."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def profile_text(name: str, profile: Mapping[str, Any]) -> str:
    """A `Profile.summary` as a table."""
    busy = "" if profile["busy"] is None else f"; the GPU is busy {profile['busy']:.0%} of it"
    lines = [f"{name}: {profile['ms']:.1f} ms a step while profiled, {profile['calls']:,.0f} calls{busy}"]
    total = sum(took for _, took, _ in profile["kinds"]) or 1.0
    for title, rows in (("kind", profile["kinds"]), ("kernel", profile["kernels"])):
        lines.append(f"{'ms a step':>10}  {'share':>6}  {'calls':>8}  {title}")
        lines += [f"{took:>10.2f}  {took / total:>6.1%}  {count:>8,.0f}  {row[:110]}" for row, took, count in rows]
    return "\n".join(lines)

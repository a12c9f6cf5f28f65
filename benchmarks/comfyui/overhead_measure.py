"""How the overhead is measured: CPU and wall time, calls of torch's operators, bytes that an object keeps alive."""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# On an accelerator each of these waits until the device has done all work queued before it.
SYNCS = ("aten._local_scalar_dense", "aten.item", "aten.nonzero", "aten.equal", "aten.is_nonzero")
MATMULS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten.matmul", "aten.linear", "aten.einsum")
ATTENTION = "aten.scaled_dot_product_attention"


@dataclass(frozen=True)
class Duration:
    """Seconds: `cpu` of this process, which other programs do not lengthen much, and `wall`."""

    cpu: float
    wall: float


class Counting(TorchDispatchMode):
    """Counts the calls of torch's operators by name, such as "aten.mm".

    In inference mode, in which ComfyUI runs, a composite operator (linear, matmul, reshape, to) is one call. With
    `kernels` the calls that it consists of are counted in its place, as torch shows them outside inference mode.
    """

    def __init__(self, *, kernels: bool = False) -> None:
        super().__init__()
        self.kernels = kernels
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.kernels:
            with self:
                result = function.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        self.calls[str(function).rpartition(".")[0]] += 1
        return function(*args, **kwargs)


def total(calls: Counter[str], names: tuple[str, ...] | None = None) -> int:
    """How many calls, of all operators or of these."""
    return sum(calls.values()) if names is None else sum(calls[name] for name in names)


def timed(action: Callable[[], Any]) -> Duration:
    """The time of one call. Its result is dropped, and garbage collected, outside the clock."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    result = action()
    duration = Duration(time.process_time() - cpu, time.perf_counter() - wall)
    del result
    gc.collect()
    return duration


def alternate(actions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[Duration]]:
    """The times of all actions in every round, after one untimed round. The order rotates from round to round, so
    that neither a slow moment of the machine nor a warm cache always meets the same action.
    """
    names = list(actions)
    for name in names:
        timed(actions[name])
    durations: dict[str, list[Duration]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            durations[name].append(timed(actions[name]))
    return durations


def median(durations: list[Duration]) -> Duration:
    """The median of each clock."""
    return Duration(statistics.median(d.cpu for d in durations), statistics.median(d.wall for d in durations))


def paired_ratio(durations: list[Duration], others: list[Duration]) -> Duration:
    """The median, over the rounds, of one time divided by the other of the same round; in the clocks' fields."""
    pairs = list(zip(durations, others, strict=True))
    return Duration(
        statistics.median(one.cpu / other.cpu for one, other in pairs),
        statistics.median(one.wall / other.wall for one, other in pairs),
    )


def storages(root: object) -> dict[tuple[str, int], int]:
    """Every distinct storage that `root` keeps alive: (device, address) -> bytes. Meta tensors have none.

    Follows containers, attributes, closures, defaults and bound objects; not classes and Python modules, which live
    without `root`, and not weak references.
    """
    found: dict[tuple[str, int], int] = {}
    seen = {id(root)}
    alive: list[object] = [root]  # an id is unique only while its object lives
    stack: list[object] = [root]
    while stack:
        item = stack.pop()
        if isinstance(item, torch.Tensor) and item.device.type != "meta" and item.layout == torch.strided:
            storage = item.untyped_storage()
            found[str(item.device), storage.data_ptr()] = storage.nbytes()
        for child in _children(item):
            if id(child) not in seen:
                seen.add(id(child))
                alive.append(child)
                stack.append(child)
    return found


def held_bytes(patched: object, base: object) -> int:
    """Bytes that `patched` keeps alive and `base` does not."""
    of_base = storages(base)
    return sum(size for place, size in storages(patched).items() if place not in of_base)


def _children(item: object) -> Iterator[object]:
    if isinstance(item, type | ModuleType | BuiltinFunctionType | str | bytes | int | float | None | torch.dtype):
        return
    if isinstance(item, Mapping):
        yield from item.keys()
        yield from item.values()
    elif isinstance(item, list | tuple | set | frozenset | deque):
        yield from item
    elif isinstance(item, MethodType):
        yield from (item.__self__, item.__func__)
    elif isinstance(item, FunctionType):
        yield from (item.__closure__ or (), item.__defaults__, item.__kwdefaults__)
    elif isinstance(item, CellType):
        try:
            yield item.cell_contents
        except ValueError:  # an empty cell
            return
    elif isinstance(item, functools.partial):
        yield from (item.func, item.args, item.keywords)
    yield from getattr(item, "__dict__", {}).values()
    for cls in type(item).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__"):
                yield getattr(item, name, None)

"""Training steps as CUDA graphs: the kernels of a step are recorded once, and then launched all together.

A step of SD1.5's size launches thousands of small kernels, and Python asks for them more slowly than a fast GPU
computes them. The kernels are the same as without a graph, and so are the results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MAX_GRAPHS = 8  # each keeps its inputs and its gradients' sums; batches of further shapes run without one


@dataclass(frozen=True, eq=False)
class BatchTensors:
    """The tensors of a batch by name, each [B, ...]."""

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))


Backward = Callable[[BatchTensors], Tensor]
"""Adds the gradients of a batch to the parameters' and returns the loss, detached."""


@dataclass(frozen=True, eq=False)
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: BatchTensors
    loss: Tensor


class GraphedBackward:
    """A `Backward` that is recorded as a CUDA graph, one for each set of shapes.

    The first batch of each set runs as it is: in it, libraries choose their kernels and parameters get gradients.
    Zero the gradients with `set_to_none=False`, since a graph adds to the same tensors in each replay.
    """

    def __init__(self, backward: Backward, device: torch.device) -> None:
        self._backward, self._device = backward, device
        self._graphs: dict[Any, _Graph | None] = {}  # None: the first batch of these shapes was seen
        self._pool: Any = torch.cuda.graph_pool_handle()  # of all graphs, since only one runs at a time

    def __call__(self, batch: BatchTensors) -> Tensor:
        shapes = tuple((name, value.shape, value.dtype) for name, value in sorted(batch.tensors.items()))
        if shapes not in self._graphs:
            if len(self._graphs) < MAX_GRAPHS:
                self._graphs[shapes] = None
            return self._backward(batch)
        graph = self._graphs[shapes]
        if graph is None:
            graph = self._graphs[shapes] = self._record(batch)
        for name, value in batch.tensors.items():
            graph.inputs.tensors[name].copy_(value, non_blocking=True)
        graph.graph.replay()
        return graph.loss.clone()  # the next replay writes to the same place

    def _record(self, batch: BatchTensors) -> _Graph:
        tensors = batch.tensors.items()
        inputs = BatchTensors({name: torch.empty_like(value, device=self._device) for name, value in tensors})
        graph = torch.cuda.CUDAGraph()
        # thread_local: the thread of the data loader that pins memory may go on meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            loss = self._backward(inputs)
        return _Graph(graph, inputs, loss)

"""Torch Compile: a model with an image prompt runs in compiled graphs of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.patcher_extension
import torch
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY, TORCH_COMPILE_KWARGS, apply_torch_compile_factory

from ..ipadapter_core import AdapterError
from .run import Options

_APPLY_MODEL = comfy.patcher_extension.WrappersMP.APPLY_MODEL
_GRAPHS = 32  # of one function: with a mask, with two prompts, another size. Torch runs what is new uncompiled after 8.


@dataclass
class OwnGraphs:
    """A backend of torch.compile: the named one, equal only to another OwnGraphs of the same settings.

    Torch keeps the compiled graphs of a function together, whoever compiled it, and takes the first whose guards hold
    and whose backend is equal. Torch Compile Model drops all guards on the transformer options. So its graphs keep the
    patches of the run in which they were made; and where the attention ends a graph, as most do, every block is a call
    of the same function, and the graph of one block, with its patch, runs in others too. With all guards kept, and
    apart from those graphs, neither happens.
    """

    backend: str | Callable[..., Any]
    mode: str | None
    options: dict[str, Any]
    dynamic: bool | None

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        compiler: Callable[..., Any] = torch._dynamo.lookup_backend(self.backend)
        if self.backend == "inductor":
            mode = torch._inductor.list_mode_options(self.mode, self.dynamic) if self.mode else {}
            return compiler(graph, inputs, config_patches={**mode, **self.options})
        mode = {"mode": self.mode} if self.mode and self.mode != "default" else {}
        return compiler(graph, inputs, **mode, **({"options": self.options} if self.options else {}))


def with_own_graphs(model_options: Options, options: Options) -> Options:
    """The transformer options of a run with image prompts: of a compiled model, with graphs that notice every change
    of the patches and of the image prompts. All guards are kept in them.
    """
    wrappers = options.get("wrappers", {})
    compiled = wrappers.get(_APPLY_MODEL, {}).get(COMPILE_KEY)
    if not compiled:
        return options
    own = [_with_more_graphs(apply_torch_compile_factory(_recompiled(wrapper, model_options))) for wrapper in compiled]
    return {**options, "wrappers": {**wrappers, _APPLY_MODEL: {**wrappers[_APPLY_MODEL], COMPILE_KEY: own}}}


def _with_more_graphs(wrapper: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapper with a higher limit of torch on graphs, for as long as it runs."""
    config = torch._dynamo.config

    def run(*args: Any, **kwargs: Any) -> Any:
        with config.patch(cache_size_limit=max(_GRAPHS, config.cache_size_limit)):
            return wrapper(*args, **kwargs)

    return run


def _recompiled(wrapper: Callable[..., Any], model_options: Options) -> dict[str, Any]:
    """The modules that ComfyUI's wrapper puts into the model, compiled for us."""
    closure = inspect.getclosurevars(wrapper).nonlocals if inspect.isfunction(wrapper) else {}
    modules = closure.get("compiled_module_dict")
    settings = model_options.get(TORCH_COMPILE_KWARGS)
    if not modules or not settings:
        raise AdapterError(
            "The model is compiled in a way that Apply IP Adapter does not know. Use ComfyUI's own Torch Compile "
            "node, or take it out."
        )
    options = {name: value for name, value in (settings["options"] or {}).items() if name != "guard_filter_fn"}
    backend = OwnGraphs(settings["backend"], settings["mode"], options, settings["dynamic"])
    return {
        name: torch.compile(
            module._orig_mod, backend=backend, fullgraph=settings["fullgraph"], dynamic=settings["dynamic"]
        )
        for name, module in modules.items()
    }

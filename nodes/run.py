"""What happens once in a run of the sampler, before its first step."""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import comfy.patcher_extension
import comfy.samplers
from torch import Tensor

from ..ipadapter_core.branches import names_by_uuid
from .calls import RUN, Grid, Options, Run, grid_of
from .graphs import with_own_graphs
from .patch import SitePatch, refuse_late_patch
from .steps import Application

Conds = Mapping[str, list[dict[str, Any]]]

_log = logging.getLogger("ip_adapter_kit")


def start_run(
    executor: Any,
    guider: Any,
    sigmas: Tensor,
    extra_args: Options,
    callback: Any,
    noise: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """SAMPLER_SAMPLE wrapper: note which cond is positive and which negative, for all adapters of the model."""
    model_options = dict(extra_args.get("model_options") or {})
    options = model_options.get("transformer_options", {})
    patches = options.get("patches_replace", {}).get("attn2", {})
    _refuse_shadowed(patches)
    if any(isinstance(patch, SitePatch) for patch in patches.values()):
        options = with_own_graphs(model_options, options)
    conds = getattr(guider, "conds", None) or {}
    if conds:
        guider.conds = conds = _one_name_each(conds)
    _check_applications(guider, options, sigmas, noise)
    run = Run(names_by_uuid(conds), grid_of(noise.shape), _corners(conds), len(noise), sigmas)
    model_options["transformer_options"] = {**options, RUN: run}
    return executor(guider, sigmas, {**extra_args, "model_options": model_options}, callback, noise, *args, **kwargs)


def _check_applications(guider: Any, options: Options, sigmas: Tensor, noise: Tensor) -> None:
    """Log what has no effect in this run. A second pass may leave out a window on purpose: no reason to stop."""
    wrappers = options.get("wrappers", {}).get(comfy.patcher_extension.WrappersMP.APPLY_MODEL, {})
    sampling = guider.model_patcher.get_model_object("model_sampling")
    # Guiders with several scales have a `cfg` that they do not use.
    own = getattr(type(guider), "set_cfg", None) is comfy.samplers.CFGGuider.set_cfg
    cfg = guider.cfg if own else math.inf
    patches = options.get("patches_replace", {}).get("attn2", {})
    for application in (item for items in wrappers.values() for item in items if isinstance(item, Application)):
        _warn_of_replaced(application, patches)
        for sentence in application.check_run(sigmas[:-1], sampling, len(noise), grid_of(noise.shape), cfg):
            _log.warning("%s: %s", application.node, sentence)


def _warn_of_replaced(application: Application, patches: Mapping[Any, Any]) -> None:
    """Log the layers that another pack took after us. Whether it passes their calls on cannot be known."""
    others = [patches.get(place) for place in application.pairs if not _holds(patches.get(place), application)]
    if others:
        _log.warning(
            "%s: %s of another pack took %d of its %d layers after it; unless it passes their calls on, the image "
            "prompt does not act there. Connect its node before %s.",
            application.node,
            getattr(others[0], "__qualname__", type(others[0]).__qualname__),
            len(others),
            len(application.pairs),
            application.node,
        )


def _holds(patch: Any, application: Application) -> bool:
    while isinstance(patch, SitePatch):
        if patch.application is application:
            return True
        patch = patch.previous
    return False


def _one_name_each(conds: Conds) -> Conds:
    """ComfyUI copies a cond with an area into the guider's other lists, uuid and all: give the copies their own."""
    names = names_by_uuid(conds)

    def own(cond: dict[str, Any]) -> dict[str, Any]:
        return {**cond, "uuid": uuid.uuid4()} if len(names.get(cond.get("uuid"), ())) > 1 else cond

    return {name: items and [own(cond) for cond in items] for name, items in conds.items()}


def _corners(conds: Conds) -> dict[Hashable, Grid]:
    """uuid -> (top, left) of the conds that have an area, which is (height, width, top, left)."""
    every: Iterable[dict[str, Any]] = (cond for items in conds.values() for cond in items or ())
    return {
        cond["uuid"]: (int(cond["area"][2]), int(cond["area"][3]))
        for cond in every
        if "uuid" in cond and len(cond.get("area") or ()) == 4
    }


def _refuse_shadowed(patches: Mapping[Any, Any]) -> None:
    """Apply takes over what stands for all blocks of a transformer: what stands there now came later, and ComfyUI
    would not call it, because it looks for a block's own patch first.
    """
    ours = {place[:2] for place, patch in patches.items() if isinstance(patch, SitePatch)}
    if any(place in ours for place in patches):
        refuse_late_patch()

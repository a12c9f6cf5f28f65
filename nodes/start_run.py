"""Once per run of the sampler: find out which conds are positive, and check the image prompts of the model."""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

import comfy.patcher_extension
import comfy.samplers
import torch
from torch import Tensor

from ..ipadapter_core import AdapterError, resize_mask
from ..ipadapter_core.branches import names_by_uuid
from .application import Application
from .graphs import with_own_graphs
from .patch import SitePatch, refuse_late_patch
from .run import REGION, RUN, Grid, Options, Run, grid_of

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
    """SAMPLER_SAMPLE wrapper: makes the Run for all image prompts of the model."""
    model_options = dict(extra_args.get("model_options") or {})
    options = model_options.get("transformer_options", {})
    patches = options.get("patches_replace", {}).get("attn2", {})
    _refuse_shadowed(patches)
    if any(isinstance(patch, SitePatch) for patch in patches.values()):
        options = with_own_graphs(model_options, options)
    conds = getattr(guider, "conds", None) or {}
    if conds:
        guider.conds = conds = _extend_masks(_one_name_each(conds), len(noise))
    _check_applications(guider, options, sigmas, noise)
    run = Run(names_by_uuid(conds), grid_of(noise.shape), _corners(conds), len(noise), sigmas)
    model_options["transformer_options"] = {**options, RUN: run}
    return executor(guider, sigmas, {**extra_args, "model_options": model_options}, callback, noise, *args, **kwargs)


def _check_applications(guider: Any, options: Options, sigmas: Tensor, noise: Tensor) -> None:
    """Log what has no effect in this run. It is no error: a second pass may leave out a window on purpose."""
    wrappers = options.get("wrappers", {}).get(comfy.patcher_extension.WrappersMP.APPLY_MODEL, {})
    sampling = guider.model_patcher.get_model_object("model_sampling")
    # Guiders with several scales have a `cfg` that they do not use.
    own = getattr(type(guider), "set_cfg", None) is comfy.samplers.CFGGuider.set_cfg
    cfg = guider.cfg if own else math.inf
    patches = options.get("patches_replace", {}).get("attn2", {})
    for application in (item for items in wrappers.values() for item in items if isinstance(item, Application)):
        _warn_of_replaced(application, patches)
        if application.attn_mask is not None and application.checked:
            _check_mask(application, application.attn_mask, len(noise), grid_of(noise.shape))
        for warning in _warnings(application, sigmas[:-1], sampling, len(noise), cfg):
            _log.warning("%s: %s", application.node, warning)


def _check_mask(application: Application, mask: Tensor, batch: int, size: Grid) -> None:
    """Raises AdapterError when the masks of the sampled latents hide all of the image prompt."""
    used = mask[:batch]
    if resize_mask(used, size).any():
        return
    if used.any():
        raise AdapterError(
            f"{application.mask_name} is 0 at every place of the {size[0]} x {size[1]} latent: its area is too small. "
            "Grow the mask."
        )
    raise AdapterError(
        f"{application.mask_name} has {len(mask)} masks, and the first {len(used)}, for the images that are sampled, "
        "are 0 everywhere. Put the masks into the order of the images."
    )


def _warnings(application: Application, sigmas: Tensor, model_sampling: Any, batch: int, cfg: float) -> Iterator[str]:
    """What of an application has no effect in a run over these sigmas, with a batch of latents."""
    masks = 0 if application.attn_mask is None else len(application.attn_mask)
    if masks > batch:
        unused = f"mask {masks} is" if masks == batch + 1 else f"masks {batch + 1} to {masks} are"
        yield (
            f"{application.mask_name} has {masks} masks, one for each latent, and {batch} "
            f"{'is' if batch == 1 else 'are'} sampled: {unused} not used. Sample {masks} latents, or leave masks out."
        )
    if not application.is_always_active:
        first, last = application.window(model_sampling)
        if not any(last <= sigma <= first for sigma in sigmas.tolist()):
            yield (
                f"The image prompt acts in none of these {len(sigmas)} steps: none lies between start_at "
                f"{application.start_at:g} and end_at {application.end_at:g}."
            )
    images = application.rows[0]
    if images > batch:
        unused = f"image {images} acts" if images == batch + 1 else f"images {batch + 1} to {images} act"
        remedy = "turn one_each off" if application.checked else "connect fewer images and weights"
        yield (
            f"The image prompt has {images} images, one for each latent, and {batch} "
            f"{'is' if batch == 1 else 'are'} sampled: {unused} in none. Sample {images} latents, or {remedy}."
        )
    if application.schedule is not None:
        yield from application.schedule.notes(batch if application.schedule.over == "frames" else len(sigmas))
    if application.negative and cfg == 1.0:
        yield f"{application.negative} acts in the negative branch, which cfg 1 leaves out. Set cfg above 1."


def _warn_of_replaced(application: Application, patches: Mapping[Any, Any]) -> None:
    """Log the layers that another pack patched after us. Its patch may or may not call ours."""
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

    def with_own_uuid(cond: dict[str, Any]) -> dict[str, Any]:
        return {**cond, "uuid": uuid.uuid4()} if len(names.get(cond.get("uuid"), ())) > 1 else cond

    return {name: items and [with_own_uuid(cond) for cond in items] for name, items in conds.items()}


def _extend_masks(conds: Conds, images: int) -> Conds:
    """ComfyUI repeats the masks of a cond for more images; those of Image Prompt Regions have the last for all further
    ones, as its image prompts do.
    """

    def extended(cond: dict[str, Any]) -> dict[str, Any]:
        mask = cond.get("mask")
        if REGION not in cond or not isinstance(mask, Tensor) or not 1 < len(mask) < images:
            return cond
        return {**cond, "mask": torch.cat([mask, mask[-1:].expand(images - len(mask), *mask.shape[1:])])}

    return {name: items and [extended(cond) for cond in items] for name, items in conds.items()}


def _corners(conds: Conds) -> dict[Hashable, Grid]:
    """uuid -> (top, left) of the conds that have an area, which is (height, width, top, left)."""
    every: Iterable[dict[str, Any]] = (cond for items in conds.values() for cond in items or ())
    return {
        cond["uuid"]: (int(cond["area"][2]), int(cond["area"][3]))
        for cond in every
        if "uuid" in cond and len(cond.get("area") or ()) == 4
    }


def _refuse_shadowed(patches: Mapping[Any, Any]) -> None:
    """A patch for a whole transformer that is found here was added after ours. ComfyUI would ignore it, because it
    calls the patch of the single block.
    """
    transformers = {place[:2] for place, patch in patches.items() if isinstance(patch, SitePatch)}
    if any(place in transformers for place in patches):
        refuse_late_patch()

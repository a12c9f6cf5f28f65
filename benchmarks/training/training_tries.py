"""Changes to the training code that can be compared in one run, such as `--settings @contiguous`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

TRY = "@"  # before a name among a contender's settings
PROFILE = "profile"  # not a change: the measured steps are profiled


def _contiguous() -> None:
    """The UNet's convolutions in PyTorch's own memory format instead of channels_last."""
    import torch  # noqa: PLC0415

    from ipadapter_trainer.training import setup  # noqa: PLC0415

    tune = setup.prepare_unet

    def prepare_unet(base_model: Any, **options: Any) -> None:
        tune(base_model, **options)
        base_model.unet.to(memory_format=torch.contiguous_format)

    setup.prepare_unet = prepare_unet


def _autocast() -> None:
    """The UNet under autocast, as the adapter is."""
    from ipadapter_trainer.training.adapted_unet import AdaptedUNet  # noqa: PLC0415

    AdaptedUNet._unet_precision = lambda self: nullcontext()  # type: ignore[method-assign]


def _cudnn_benchmark() -> None:
    """cuDNN tries its kernels for every shape and takes the fastest."""
    import torch  # noqa: PLC0415

    torch.backends.cudnn.benchmark = True


TRIES: Mapping[str, Callable[[], None]] = {
    "autocast": _autocast,
    "contiguous": _contiguous,
    "cudnn_benchmark": _cudnn_benchmark,
}

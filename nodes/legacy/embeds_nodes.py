"""The old nodes around EMBEDS: tensors of image features before the projector, times their weight."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor

from ...ipadapter_core import AdapterError
from ...ipadapter_core.image_prompt import combine_features
from ..files import version
from ..prompt_files import OLD_SUFFIX, files_below, read_old_features
from . import fields as f
from .execute import OldPrompt, apply_old
from .old_features import encode_with_mask, unconditional
from .old_node import Embeds, IPAdapterWire, OldNode
from .wires import open_pipeline


class IPAdapterEmbeds(OldNode):
    TITLE = "IPAdapter Embeds"
    REPLACED_BY = "Apply IP Adapter"
    UNFOLD: ClassVar[bool] = False

    @classmethod
    def inputs(cls) -> Sequence[Any]:
        return [
            *f.model_and_adapter(),
            f.embeds("pos_embed"),
            f.number("weight", 1.0, -1, 3),
            f.weight_type(),
            *f.window(),
            f.scaling(),
            f.embeds("neg_embed", optional=True),
            f.wire(io.Mask, "attn_mask", optional=True),
            f.wire(io.ClipVision, "clip_vision", optional=True),
        ]

    @classmethod
    def apply_ipadapter(
        cls,
        model: Any,
        ipadapter: Any,
        pos_embed: Tensor,
        weight: Any,
        weight_type: str,
        start_at: float,
        end_at: float,
        neg_embed: Tensor | None = None,
        attn_mask: Tensor | None = None,
        clip_vision: Any = None,
        embeds_scaling: str = "V only",
    ) -> tuple[Any, ...]:
        prompt = OldPrompt(
            pos_embed=pos_embed,
            neg_embed=neg_embed,
            weight=weight,
            weight_type=weight_type,
            start_at=start_at,
            end_at=end_at,
            attn_mask=attn_mask,
            embeds_scaling=embeds_scaling,
            unfold=cls.UNFOLD,
        )
        return apply_old(model, open_pipeline(ipadapter, clip_vision=clip_vision), cls.TITLE, prompt)


class IPAdapterEmbedsBatch(IPAdapterEmbeds):
    TITLE = "IPAdapter Embeds Batch"
    UNFOLD = True


class IPAdapterEncoder(OldNode):
    TITLE = "IPAdapter Encoder"
    REPLACED_BY = "Encode Image Prompt"
    FUNCTION = "encode"

    @classmethod
    def inputs(cls) -> Sequence[Any]:
        return [
            f.wire(IPAdapterWire, "ipadapter"),
            f.image("image"),
            f.number("weight", 1.0, -1.0, 3.0, 0.01),
            f.wire(io.Mask, "mask", optional=True),
            f.wire(io.ClipVision, "clip_vision", optional=True),
        ]

    @classmethod
    def outputs(cls) -> Sequence[Any]:
        return [Embeds.Output(display_name="pos_embed"), Embeds.Output(display_name="neg_embed")]

    @classmethod
    def encode(
        cls, ipadapter: Any, image: Tensor, weight: float, mask: Tensor | None = None, clip_vision: Any = None
    ) -> tuple[Tensor, Tensor]:
        pipeline = open_pipeline(ipadapter, clip_vision=clip_vision)
        positive = encode_with_mask(pipeline, image, mask)
        return positive * weight, unconditional(pipeline, positive)


class IPAdapterCombineEmbeds(OldNode):
    TITLE = "IPAdapter Combine Embeds"
    REPLACED_BY = "Combine Image Prompts"
    FUNCTION = "batch"

    @classmethod
    def inputs(cls) -> Sequence[Any]:
        return [
            f.embeds("embed1"),
            f.choice("method", [*f.OLD_COMBINES, "max", "min"]),
            *(f.embeds(f"embed{index}", optional=True) for index in range(2, 6)),
        ]

    @classmethod
    def outputs(cls) -> Sequence[Any]:
        return [Embeds.Output()]

    @classmethod
    def batch(
        cls,
        embed1: Tensor,
        method: str,
        embed2: Tensor | None = None,
        embed3: Tensor | None = None,
        embed4: Tensor | None = None,
        embed5: Tensor | None = None,
    ) -> tuple[Tensor]:
        given = [embed for embed in (embed1, embed2, embed3, embed4, embed5) if embed is not None]
        for embed in given[1:]:
            if embed.shape[1:] != embed1.shape[1:]:
                raise AdapterError(
                    f"The embeds are of shapes {tuple(embed1.shape)} and {tuple(embed.shape)}. Encode them "
                    "with the same kind of adapter and the same image encoder."
                )
        return (combine_features(torch.cat(given), method),)


class IPAdapterSaveEmbeds(OldNode):
    TITLE = "IPAdapter Save Embeds"
    REPLACED_BY = "Save Image Prompt"
    FUNCTION = "save"
    OUTPUT = True

    @classmethod
    def inputs(cls) -> Sequence[Any]:
        return [f.embeds("embeds"), io.String.Input("filename_prefix", default="IP_embeds")]

    @classmethod
    def outputs(cls) -> Sequence[Any]:
        return []

    @classmethod
    def save(cls, embeds: Tensor, filename_prefix: str) -> tuple[None]:
        output = folder_paths.get_output_directory()
        try:
            if not Path(output, filename_prefix).resolve().is_relative_to(Path(output).resolve()):
                raise AdapterError(
                    f"filename_prefix {filename_prefix!r} leads out of the output folder. Use a name, such as anna."
                )
            folder, name, counter, *_ = folder_paths.get_save_image_path(filename_prefix, output)
            # ComfyUI reads the number where an underscore follows it, and older versions nowhere else.
            while (path := Path(folder) / f"{name}_{counter:05}{OLD_SUFFIX}").exists():
                counter += 1
            torch.save(embeds, path)
        except AdapterError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            raise AdapterError(
                f"filename_prefix {filename_prefix[:80]!r}: not saved ({getattr(error, 'strerror', None) or error}). "
                "Change it, or free some space."
            ) from error
        return (None,)


class IPAdapterLoadEmbeds(OldNode):
    TITLE = "IPAdapter Load Embeds"
    REPLACED_BY = "Load Image Prompt"
    FUNCTION = "load"

    @classmethod
    def inputs(cls) -> Sequence[Any]:
        return [f.choice("embeds", list(_saved()))]

    @classmethod
    def outputs(cls) -> Sequence[Any]:
        return [Embeds.Output()]

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        """Another file of the same name is loaded again. ComfyUI gives None for a name that comes over a wire."""
        path = _saved().get(str(inputs.get("embeds")))
        return str(path and version(path))

    @classmethod
    def load(cls, embeds: str) -> tuple[Tensor | None]:
        path = _saved().get(str(embeds))
        if path is None:  # it may come over a wire
            raise AdapterError(
                f"There are no embeds {str(embeds)[:80]!r} in the input folder. Choose one of its {OLD_SUFFIX} files."
            )
        return (read_old_features(path).image,)


def _saved() -> dict[str, Path]:
    """The files of the input folder, by the names in the list."""
    folder = Path(folder_paths.get_input_directory())
    return dict(sorted((str(path.relative_to(folder)), path) for path in files_below(folder, OLD_SUFFIX)))


NODES = [
    IPAdapterEmbeds,
    IPAdapterEmbedsBatch,
    IPAdapterEncoder,
    IPAdapterCombineEmbeds,
    IPAdapterSaveEmbeds,
    IPAdapterLoadEmbeds,
]

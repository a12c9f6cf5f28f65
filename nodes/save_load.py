"""SaveImagePrompt and LoadImagePrompt: image prompts that outlive the graph."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui
from safetensors import SafetensorError

from ..ipadapter_core import AdapterError
from ..ipadapter_core.branches import branch_rows
from .file_names import relative_name
from .files import version
from .node import NONE, Node
from .prompt_files import (
    FOLDER,
    OLD_SUFFIX,
    find_prompts,
    list_prompts,
    prompt_path,
    read_old_features,
    read_prompt,
    write_prompt,
)
from .prompt_math import shapes_of
from .types import ImagePrompt, ImagePromptType, node_schema

_NONE = f"{NONE}make one with Save Image Prompt"  # what an empty list shows


class SaveImagePrompt(Node):
    """An image prompt -> a file in output/image_prompts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="SaveImagePrompt",
            display_name="Save Image Prompt",
            description="Saves an image prompt in output/image_prompts. Load Image Prompt then needs neither the "
            "image nor the image encoder.",
            is_output_node=True,
            inputs=[
                ImagePromptType.Input("image_prompt", tooltip="The image prompt to save."),
                io.String.Input(
                    "filename_prefix",
                    default="prompt",
                    tooltip="File name in output/image_prompts; a number is appended. It may include a folder: "
                    "portraits/anna.",
                ),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, image_prompt: ImagePrompt, filename_prefix: str = "prompt") -> io.NodeOutput:
        prefix = relative_name(filename_prefix.strip() or "prompt", "filename_prefix", f"output/{FOLDER}")
        output = Path(folder_paths.get_output_directory())
        root = (output / FOLDER).resolve()
        if not (root / prefix.parent).resolve().is_relative_to(root):
            raise AdapterError(
                f"output/{FOLDER}/{prefix.parent} is a link to another place, where files are not saved. Change "
                "filename_prefix."
            )
        try:
            folder, name, number, *_ = folder_paths.get_save_image_path(str(prefix), str(output / FOLDER))
            path = Path(folder) / f"{name}_{number:05}_.safetensors"
            write_prompt(path, image_prompt)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise AdapterError(
                f"output/{FOLDER}/{str(prefix)[:80]}: not saved ({reason}). Free some space, or change filename_prefix."
            ) from error
        saved = path.relative_to(output).as_posix()
        return io.NodeOutput(ui=ui.PreviewText(f"output/{saved}"))


class LoadImagePrompt(Node):
    """A file -> the image prompt in it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="LoadImagePrompt",
            display_name="Load Image Prompt",
            description="Loads an image prompt from Save Image Prompt, or an .ipadpt file of ComfyUI_IPAdapter_plus.",
            inputs=[
                io.Combo.Input(
                    "image_prompt_name",
                    options=list_prompts() or [_NONE],
                    tooltip="A file in output/image_prompts or in input; put .ipadpt files and files from elsewhere "
                    "in input. Press R after saving a new file.",
                ),
                ImagePromptType.Input(
                    "negative",
                    optional=True,
                    tooltip="The images of this prompt become the negative ones. Needed for .ipadpt files of plus "
                    "adapters, which have none: encode a black image, or load the saved neg_embed with a second node "
                    "of this kind.",
                ),
            ],
            outputs=[
                ImagePromptType.Output(
                    display_name="image_prompt",
                    tooltip="Connect to Apply IP Adapter, with the adapter that it was encoded for.",
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, image_prompt_name: str | None = None, negative: object = None) -> str:
        """Another file of the same name is loaded again. None comes over a wire."""
        prompts = find_prompts()
        return str(version(prompts[image_prompt_name])) if image_prompt_name in prompts else ""

    @classmethod
    def execute(cls, image_prompt_name: str, negative: ImagePrompt | None = None) -> io.NodeOutput:
        path = prompt_path(image_prompt_name)
        is_old = path.suffix.lower() == OLD_SUFFIX
        prompt = ImagePrompt(read_old_features(path)) if is_old else read_prompt(path)
        if negative is not None:
            prompt = _with_negative(prompt, negative)
        return io.NodeOutput(prompt)


def _with_negative(prompt: ImagePrompt, negative: ImagePrompt) -> ImagePrompt:
    images, unwanted = prompt.positive, negative.positive
    if prompt.adapter and negative.adapter and prompt.adapter != negative.adapter:
        raise AdapterError(
            f"The file was encoded with {prompt.adapter}, negative with {negative.adapter}. Use one adapter for both."
        )
    if shapes_of(images) != shapes_of(unwanted):
        raise AdapterError(
            f"The file has features of {shapes_of(images)}, negative of {shapes_of(unwanted)}. Use one adapter and its "
            "image encoder for both."
        )
    branch_rows(len(images), len(unwanted), one_each=prompt.one_each, swapped=False)
    adapter = prompt.adapter or negative.adapter
    return dataclasses.replace(prompt, negative=unwanted, adapter=adapter, has_negative=True)

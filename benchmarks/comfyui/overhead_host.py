"""A real ComfyUI in this process, and custom node packs loaded into it as packages."""

from __future__ import annotations

import asyncio
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
OURS, PEER = "overhead_ip_adapter_kit", "overhead_peer"  # the packs' names as packages


def start_comfyui(folder: Path, scratch: Path, device: str = "cpu") -> str:
    """Import the ComfyUI of this folder; it writes into `scratch` only. Returns its version."""
    sys.path.insert(0, str(folder))
    # PyTorch's attention: one call in a layer, the same for everybody, and the one most installations use.
    of_device = ["--cpu"] if device == "cpu" else []
    arguments, sys.argv = sys.argv, ["main.py", *of_device, "--use-pytorch-cross-attention"]
    try:
        import comfy.options  # noqa: PLC0415

        comfy.options.enable_args_parsing()
        import comfy.cli_args  # noqa: PLC0415
        import folder_paths  # noqa: PLC0415
    finally:
        sys.argv = arguments
    folder_paths.models_dir = str(scratch / "models")
    folder_paths.set_temp_directory(str(scratch / "temp"))
    folder_paths.set_output_directory(str(scratch / "output"))
    folder_paths.set_input_directory(str(scratch / "input"))
    for name in ("models/ipadapter", "models/clip_vision", "temp", "output", "input"):
        (scratch / name).mkdir(parents=True, exist_ok=True)
    version = importlib.util.spec_from_file_location("overhead_comfyui_version", folder / "comfyui_version.py")
    return _execute(version).__version__


def load_ours() -> SimpleNamespace:
    """This repository's node classes and modules."""
    entry = import_package(OURS, ROOT)
    extension = asyncio.run(entry.comfy_entrypoint())
    classes = asyncio.run(extension.get_node_list())
    modules = {name: sys.modules[f"{OURS}.nodes.{name}"] for name in ("apply", "encode", "types")}
    modules["wires"] = sys.modules[f"{OURS}.nodes.legacy.wires"]
    return SimpleNamespace(
        core=sys.modules[f"{OURS}.ipadapter_core"], **modules, **{cls.__name__: cls for cls in classes}
    )


def load_peer(folder: Path) -> ModuleType:
    """ComfyUI_IPAdapter_plus, by its own entry point as ComfyUI loads it."""
    return import_package(PEER, folder)


def import_package(name: str, folder: Path) -> ModuleType:
    """The folder of a custom node pack as a package of this name."""
    return _execute(
        importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
    )


def _execute(spec: importlib.machinery.ModuleSpec | None) -> ModuleType:
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module

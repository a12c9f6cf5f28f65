"""A real ComfyUI, named by COMFYUI_PATH, in this process; without it these tests are skipped. It runs on the CPU, or
for test_gpu.py on the GPU with COMFYUI_DEVICE=cuda."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
COMFYUI = os.environ.get("COMFYUI_PATH", "")
DEVICE = os.environ.get("COMFYUI_DEVICE", "")
DYNAMIC = DEVICE == "cuda" and bool(os.environ.get("COMFYUI_DYNAMIC_VRAM"))  # weights streamed, as by default on NVIDIA
PACK = "pack_of_any_name"
WIDTH, CONTEXT, EMBEDS = 32, 64, 48  # channels of the tiny UNet's first level, of its text, of the image features
VISION = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "image_size": 32,
    "patch_size": 16,
    "projection_dim": 48,
    "num_channels": 3,
    "hidden_act": "quick_gelu",
}


@pytest.fixture(scope="session")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of ComfyUI, imported with temporary folders for what it writes."""
    if not COMFYUI:
        pytest.skip("COMFYUI_PATH is not set: these tests need a ComfyUI checkout and its requirements")
    folder = Path(COMFYUI).resolve()
    sys.path.insert(0, str(folder))
    # ComfyUI's default attention of the CPU asks for free memory in every call, which breaks compiled graphs.
    of_device = [] if DEVICE == "cuda" else ["--cpu"]
    arguments, sys.argv = sys.argv, ["main.py", *of_device, "--use-pytorch-cross-attention"]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args
        import folder_paths

        import nodes  # noqa: F401
    finally:
        sys.argv = arguments
    if DYNAMIC:
        _stream_weights()
    out = tmp_path_factory.mktemp("comfyui")
    folder_paths.models_dir = str(out / "models")
    folder_paths.set_temp_directory(str(out / "temp"))
    folder_paths.set_output_directory(str(out / "output"))
    for name in ("ipadapter", "clip_vision"):
        (out / "models" / name).mkdir(parents=True)
    folder_paths.folder_names_and_paths["clip_vision"] = ([str(out / "models" / "clip_vision")], {".safetensors"})
    return folder


def _stream_weights() -> None:
    """What ComfyUI's main.py does at start on an NVIDIA GPU."""
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher
    import comfy_aimdo.control

    comfy_aimdo.control.init()
    devices = comfy.model_management.get_all_torch_devices()
    assert comfy_aimdo.control.init_devices((device.index, 0) for device in devices)
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True


def import_pack(name: str = PACK) -> ModuleType:
    """The pack as a package of this name."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def pack(comfyui: Path) -> SimpleNamespace:
    """The node classes and the pack's modules."""
    entry = import_pack()
    extension = asyncio.run(entry.comfy_entrypoint())
    classes = asyncio.run(extension.get_node_list())
    modules = {
        name.removeprefix(f"{PACK}.").rpartition(".")[2]: module
        for name, module in list(sys.modules.items())
        if name.startswith((f"{PACK}.nodes.", f"{PACK}.ipadapter_core."))
    }
    core = sys.modules[f"{PACK}.ipadapter_core"]
    # `classes` are our own; those under the old pack's names have their own tests.
    own = [cls for cls in classes if ".legacy." not in cls.__module__]
    return SimpleNamespace(**modules, **{cls.__name__: cls for cls in classes}, classes=own, core=core)


@pytest.fixture(scope="session")
def face_models() -> ModuleType:
    """face_models.py, which writes small face models and draws what they take for faces."""
    pytest.importorskip("insightface", reason="insightface is not installed (extra: face)")
    spec = importlib.util.spec_from_file_location("face_models", Path(__file__).with_name("face_models.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def randomise(module: torch.nn.Module, seed: int, scale: float = 0.08) -> None:
    """Small random weights: ComfyUI's modules start uninitialised."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(False)
        noise = torch.randn(parameter.shape, generator=generator) * scale
        parameter.copy_(noise + 1.0 if "norm" in name and name.endswith("weight") else noise)


def new_model(
    family: str = "sd15",
    width: int = WIDTH,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    cast: torch.dtype | None = None,
    device: str = "cpu",
    **shape: Any,
) -> Any:
    """A tiny random UNet in the shape of SD1.5 or SDXL, but for what `shape` changes of its config, as a MODEL. Its
    weights have `dtype`, and it calculates in `cast` if that is given, on `device`.
    """
    import comfy.model_base
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    shapes = {
        "sd15": {
            "channel_mult": [1, 2, 4, 4],
            "num_res_blocks": [2] * 4,
            "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
            "transformer_depth_middle": 1,
            "transformer_depth_output": [1] * 9 + [0] * 3,
            "use_linear_in_transformer": False,
            "adm_in_channels": None,
        },
        "sdxl": {
            "channel_mult": [1, 2, 4],
            "num_res_blocks": [2] * 3,
            "transformer_depth": [0, 0, 2, 2, 10, 10],
            "transformer_depth_middle": 10,
            "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
            "use_linear_in_transformer": True,
            "adm_in_channels": 2816,
            "num_classes": "sequential",
        },
    }
    config = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": width,
        "context_dim": CONTEXT,
        "use_spatial_transformer": True,
        "legacy": False,
        "use_temporal_attention": False,
        "use_temporal_resblock": False,
        **shapes[family],
        **shape,
    }
    supported = {"sd15": comfy.supported_models.SD15, "sdxl": comfy.supported_models.SDXL}[family](config)
    supported.unet_config.update(num_heads=2, num_head_channels=-1)
    supported.set_inference_dtype(dtype, cast)
    base = {"sd15": comfy.model_base.BaseModel, "sdxl": comfy.model_base.SDXL}[family]
    home = torch.device("cpu")
    model = base(supported, model_type=comfy.model_base.ModelType.EPS, device=home)
    randomise(model.diffusion_model, seed)
    model.eval()
    patcher = comfy.model_patcher.ModelPatcher
    if device != "cpu":
        patcher = getattr(comfy.model_patcher, "CoreModelPatcher", patcher)
    return patcher(model, load_device=torch.device(device), offload_device=home)


def new_adapter(pack: SimpleNamespace, model: Any, seed: int = 1, kind: str = "base", name: str = "a") -> Any:
    """A random adapter that fits the model, as Load IP Adapter gives it."""
    import comfy.ops

    sites = pack.core.cross_attention_sites(model.get_model_object("diffusion_model"))
    widths = [site.dim for site in sites]
    options = {"resampler_dim": CONTEXT, "dim_head": 16, "depth": 1} if kind == "plus" else {}
    options |= {"lora_rank": 3} if kind == "faceid" else {}
    spec = pack.core.new_spec(kind, widths, sites[0].cross_attention_dim, image_dim=EMBEDS, num_tokens=4, **options)
    adapter = pack.core.IPAdapter(spec, operations=comfy.ops.manual_cast)
    randomise(adapter, seed, scale=0.3)
    return pack.types.manage(f"{name}.safetensors", adapter.eval())


def new_prompt(pack: SimpleNamespace, ip_adapter: Any, seed: int = 2, images: int = 1, weight: float = 1.0) -> Any:
    """An image prompt of random features."""
    features = torch.randn(images, EMBEDS, generator=torch.Generator().manual_seed(seed))
    encoded = pack.types.EncodedImages(features, weights=(weight,) * images)
    return pack.types.ImagePrompt(encoded, adapter=ip_adapter.name)


def tokens_of(pack: SimpleNamespace, ip_adapter: Any, prompt: Any) -> Any:
    """The tokens of both branches as they act in the model: joined."""
    tokens = pack.types.project(ip_adapter, prompt)
    count = len(prompt.positive)
    positive, negative = pack.branches.join_images(tokens[:count], tokens[count:])
    return SimpleNamespace(positive=positive, negative=negative)


def conds(batch_width: int = CONTEXT, seed: int = 3) -> tuple[Any, Any]:
    """Positive and negative CONDITIONING of random text states."""
    generator = torch.Generator().manual_seed(seed)
    made = [
        [[torch.randn(1, 7, batch_width, generator=generator), {"pooled_output": torch.zeros(1, 1280)}]]
        for _ in range(2)
    ]
    return made[0], made[1]


def sample(
    model: Any,
    *,
    size: tuple[int, int] = (16, 16),
    batch: int = 1,
    steps: int = 2,
    cfg: float = 4.0,
    positive: Any = None,
    negative: Any = None,
) -> torch.Tensor:
    """The latents that ComfyUI's KSampler makes, always from the same noise."""
    import comfy.sample

    text = conds()
    latent = torch.zeros(batch, 4, *size)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(4))
    return comfy.sample.sample(
        model, noise, steps, cfg, "euler", "normal", positive or text[0], negative or text[1], latent, seed=5
    )


@pytest.fixture(scope="session")
def world(pack: SimpleNamespace) -> SimpleNamespace:
    """Builders for the tests, and one tiny SD1.5 with an adapter and a prompt."""

    def apply(model: Any, ip_adapter: Any, prompt: Any, **options: Any) -> Any:
        return pack.ApplyIPAdapter.execute(model, ip_adapter, prompt, **options).args[0]

    with torch.inference_mode():
        model = new_model()
        adapter = new_adapter(pack, model)
        prompt = new_prompt(pack, adapter)
        base = sample(model)
    return SimpleNamespace(
        model=model,
        adapter=adapter,
        prompt=prompt,
        base=base,
        apply=apply,
        randomise=randomise,
        sample=sample,
        conds=conds,
        new_model=new_model,
        new_adapter=lambda *a, **k: new_adapter(pack, *a, **k),
        new_prompt=lambda *a, **k: new_prompt(pack, *a, **k),
        tokens=lambda *a: tokens_of(pack, *a),
    )


@pytest.fixture(scope="session")
def encoder(world: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """ComfyUI's own CLIP vision model, tiny: 32 px images in 16 px patches, 5 tokens of 48, projected to 48."""
    import comfy.clip_vision

    config = tmp_path_factory.mktemp("vision") / "config.json"
    settings = {
        "model_type": "clip_vision_model",
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "image_size": 32,
        "patch_size": 16,
        "projection_dim": 48,
        "num_channels": 3,
        "hidden_act": "quick_gelu",
    }
    config.write_text(json.dumps(settings))
    with torch.inference_mode():
        encoder = comfy.clip_vision.ClipVisionModel(str(config))
        world.randomise(encoder.model, seed=31)
    return encoder


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    """Nodes run under inference mode."""
    with torch.inference_mode():
        yield


@pytest.fixture
def spy() -> Callable[[Any], list[dict[str, Any]]]:
    """Record the options of every attn2 call of a model; returns the growing list."""

    def attach(model: Any) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def patch(n: torch.Tensor, context: torch.Tensor, value: torch.Tensor, options: dict[str, Any]) -> Any:
            calls.append(options)
            return n, context, value

        model.set_model_attn2_patch(patch)
        return calls

    return attach


@pytest.fixture(scope="session")
def copy_pack() -> Callable[[Path], Path]:
    """Copy what a user installs into a folder."""

    def copy(folder: Path) -> Path:
        shutil.copy(ROOT / "__init__.py", (folder.mkdir(parents=True, exist_ok=True) or folder) / "__init__.py")
        for part in ("nodes", "ipadapter_core", "web", "locales", "assets", "example_workflows", "subgraphs"):
            unneeded = shutil.ignore_patterns("__pycache__", "pictures.zip", "judges.safetensors")
            shutil.copytree(ROOT / part, folder / part, ignore=unneeded)
        return folder

    return copy


@dataclass(frozen=True)
class Server:
    """A started ComfyUI with the pack in custom_nodes/a-folder."""

    address: str
    log: Path

    def read(self, path: str) -> bytes:
        with urllib.request.urlopen(f"{self.address}{path}", timeout=60) as response:
            return response.read()

    def get(self, path: str) -> Any:
        return json.loads(self.read(path))

    def run(self, graph: dict[str, Any]) -> Any:
        """Queue a graph; returns its history entry. urllib's HTTPError when it is refused."""
        body = json.dumps({"prompt": graph}).encode()
        request = urllib.request.Request(f"{self.address}/prompt", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            prompt = json.load(response)["prompt_id"]
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            entry = self.get(f"/history/{prompt}").get(prompt)
            if entry and (entry["status"]["completed"] or entry["status"]["status_str"] == "error"):
                return entry
            time.sleep(0.3)
        raise TimeoutError(prompt)


@pytest.fixture(scope="session")
def server(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of its own process, with the pack under a name of no meaning."""
    with started_server(comfyui, tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture
def caching_server(comfyui: Path, tmp_path: Path) -> Iterator[Server]:
    """One that keeps the results of several prompts."""
    with started_server(comfyui, tmp_path, "--cache-lru", "30") as started:
        yield started


@contextmanager
def started_server(comfyui: Path, base: Path, *options: str) -> Iterator[Server]:
    if not (ROOT / "assets" / "emoji" / "adapter.safetensors").is_file():
        pytest.skip("assets/emoji holds no adapter")
    pack = base / "custom_nodes" / "a-folder"
    for part in ("nodes", "ipadapter_core", "web", "locales", "example_workflows", "assets", "subgraphs"):
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, pack / part, ignore=shutil.ignore_patterns("__pycache__", "pictures.zip"))
    shutil.copy(ROOT / "__init__.py", pack / "__init__.py")
    (base / "input").mkdir()
    _write_image(base / "input" / "reference.png")
    shutil.copy(comfyui / "input" / "example.png", base / "input")  # ComfyUI comes with it
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "main.py", "--cpu", "--port", str(port), "--base-directory", str(base)]
    command += ["--disable-auto-launch", "--disable-api-nodes", "--database-url", "sqlite:///:memory:", *options]
    started = Server(f"http://127.0.0.1:{port}", base / "log.txt")
    with started.log.open("w") as stream:
        process = subprocess.Popen(command, cwd=comfyui, stdout=stream, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            assert process.poll() is None, started.log.read_text()
            try:
                started.get("/system_stats")
                break
            except OSError:
                time.sleep(0.5)
        yield started
    finally:
        process.terminate()
        process.wait(30)


def _write_image(path: Path) -> None:
    from PIL import Image

    pixels = (torch.rand(80, 100, 3, generator=torch.Generator().manual_seed(61)) * 255).byte().numpy()
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folders(comfyui, tmp_path, monkeypatch):
    """Empty models/ipadapter and models/clip_vision folders."""
    import folder_paths

    places = {}
    for name in ("ipadapter", "clip_vision"):
        (tmp_path / name).mkdir()
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(tmp_path / name)], set()))
        places[name] = tmp_path / name
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return places


@pytest.fixture
def encoder_state(comfyui):
    """The state dict of a ViT-H-shaped but narrow CLIP vision model."""
    import comfy.clip_model
    import comfy.ops

    config = {**VISION, "num_hidden_layers": 32, "model_type": "clip_vision_model"}
    with torch.device("cpu"):
        model = comfy.clip_model.CLIPVisionModelProjection(config, torch.float32, "cpu", comfy.ops.manual_cast)
    return {key: torch.zeros_like(tensor) for key, tensor in model.state_dict().items()}


@pytest.fixture
def narrow(comfyui, tmp_path, monkeypatch):
    """ComfyUI's loader takes a narrow encoder for ViT-H, whose layers it counts; let it be built with its widths."""
    import comfy.clip_vision

    config = tmp_path / "narrow.json"
    config.write_text(json.dumps({**VISION, "num_hidden_layers": 32, "model_type": "clip_vision_model"}))
    original = comfy.clip_vision.ClipVisionModel
    monkeypatch.setattr(comfy.clip_vision, "ClipVisionModel", lambda _: original(str(config)))


@pytest.fixture
def sound_state(encoder_state):
    generator = torch.Generator().manual_seed(21)
    return {
        key: torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
        for key, tensor in encoder_state.items()
    }


@pytest.fixture
def vision() -> dict[str, Any]:
    """The config of `sound_state`, but for its 32 layers."""
    return VISION

"""The published models that the configs name: their local folders, their files and their repositories."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from ..settings.shipped import config_names, find_config, read_config
from .weight_names import VOCABULARY, WEIGHT_SUFFIXES, missing_files

_TOKENIZER = ("special_tokens_map.json", "tokenizer_config.json", *VOCABULARY)


@dataclass(frozen=True)
class PublishedModel:
    """A model on the Hugging Face Hub. Its local copy is `models/REPOSITORY NAME`, with the repository's own paths.

    `files` are all files that are used; `path` is the file or folder inside the copy that a setting names.
    """

    name: str
    use: str
    repository: str
    gigabytes: float
    files: tuple[str, ...]
    path: str = ""

    @property
    def size(self) -> str:
        """The size of the download, such as "4.3 GB"."""
        return show_size(self.gigabytes)

    @property
    def folder(self) -> Path:
        """The local copy of the repository."""
        return Path("models") / self.repository.split("/")[1]

    @property
    def place(self) -> Path:
        """The value of base_model, image_encoder or init_from."""
        return self.folder / self.path

    def missing(self) -> list[str]:
        """The missing files, see `missing_files`."""
        return missing_files(self.folder, self.files)

    def lacking(self) -> list[str]:
        """The missing configs and weights, without which the model cannot be loaded."""
        needed = ("config.json", "scheduler_config.json")
        return [f for f in self.missing() if Path(f).name in needed or Path(f).suffix in WEIGHT_SUFFIXES]


def _base(name: str, use: str, owner: str, gigabytes: float, text_encoders: int, *more: str) -> PublishedModel:
    suffixes = ("", "_2")[:text_encoders]
    files = [
        "model_index.json",
        "scheduler/scheduler_config.json",
        *more,
        *(f"tokenizer{suffix}/{file}" for suffix in suffixes for file in _TOKENIZER),
        *(f"text_encoder{suffix}/{file}" for suffix in suffixes for file in ("config.json", "model.safetensors")),
        *(
            f"{part}/{file}"
            for part in ("unet", "vae")
            for file in ("config.json", "diffusion_pytorch_model.safetensors")
        ),
    ]
    return PublishedModel(name, use, f"{owner}/{name}", gigabytes, tuple(files))


def _encoder(name: str, use: str, path: str, gigabytes: float) -> PublishedModel:
    files = (f"{path}/config.json", f"{path}/model.safetensors")
    return PublishedModel(name, use, "h94/IP-Adapter", gigabytes, files, path)


def _adapter(config: str, repository: str, path: str, gigabytes: float) -> PublishedModel:
    use = f"adapter: init_from for {config}"
    return PublishedModel(Path(path).stem, use, f"h94/{repository}", gigabytes, (path,), path)


_PROCESSOR = "feature_extractor/preprocessor_config.json"
_CLIP = "clip-vit-large-patch14"
_CLIP_FILES = ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", *_TOKENIZER)

PUBLISHED_MODELS: Sequence[PublishedModel] = (
    _base("stable-diffusion-v1-5", "base_model of sd15-*", "stable-diffusion-v1-5", 4.3, 1, _PROCESSOR),
    # Stability AI withdrew its SD2 repositories in November 2025; this is the mirror that others use.
    _base("stable-diffusion-2-1", "base_model of sd2-*", "sd2-community", 5.2, 1, _PROCESSOR),
    _base("stable-diffusion-xl-base-1.0", "base_model of sdxl-*", "stabilityai", 13.9, 2),
    _encoder(
        "clip-vit-h",
        "image_encoder of every config but faceid and portrait; CLIP ViT-H/14",
        "models/image_encoder",
        2.5,
    ),
    _encoder(
        "clip-vit-bigg", "image_encoder of the published ip-adapter_sdxl; ViT-bigG/14", "sdxl_models/image_encoder", 3.7
    ),
    PublishedModel(_CLIP, "clip of `ipadapter eval`", f"openai/{_CLIP}", 1.7, _CLIP_FILES),
    _adapter("sd15-base", "IP-Adapter", "models/ip-adapter_sd15.safetensors", 0.04),
    _adapter("sd15-plus and sd15-plus-finetune", "IP-Adapter", "models/ip-adapter-plus_sd15.safetensors", 0.1),
    _adapter("sd15-full", "IP-Adapter", "models/ip-adapter-full-face_sd15.safetensors", 0.04),
    _adapter("sd15-faceid", "IP-Adapter-FaceID", "ip-adapter-faceid_sd15.bin", 0.1),
    _adapter("sd15-faceid-plus", "IP-Adapter-FaceID", "ip-adapter-faceid-plus_sd15.bin", 0.16),
    _adapter("sd15-faceid-plusv2", "IP-Adapter-FaceID", "ip-adapter-faceid-plusv2_sd15.bin", 0.16),
    _adapter("sd15-portrait", "IP-Adapter-FaceID", "ip-adapter-faceid-portrait_sd15.bin", 0.06),
    _adapter("sdxl-base", "IP-Adapter", "sdxl_models/ip-adapter_sdxl_vit-h.safetensors", 0.7),
    _adapter("sdxl-plus", "IP-Adapter", "sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors", 0.85),
    _adapter("sdxl-faceid", "IP-Adapter-FaceID", "ip-adapter-faceid_sdxl.bin", 1.1),
    _adapter("sdxl-faceid-plusv2", "IP-Adapter-FaceID", "ip-adapter-faceid-plusv2_sdxl.bin", 1.5),
    _adapter("sdxl-portrait", "IP-Adapter-FaceID", "ip-adapter-faceid-portrait_sdxl.bin", 0.75),
)


def model_at(path: Path) -> PublishedModel | None:
    """The published model whose place is `path`."""
    return next((model for model in PUBLISHED_MODELS if model.place == path), None)


def models_of(names: Iterable[str]) -> list[PublishedModel]:
    """The models with these names or places, and those that configs with these names use; each once.

    Raises ConfigError for an unknown name, suggesting the nearest one.
    """
    by_name = {key: model for model in PUBLISHED_MODELS for key in (model.name, model.place.as_posix())}
    found: dict[str, PublishedModel] = {}
    for name in names:
        if (key := Path(name).as_posix()) in by_name:
            models = [by_name[key]]
        elif name in config_names() or name.endswith(".toml"):
            values = read_config(find_config(name))
            places = [Path(str(values.get(key))) for key in ("base_model", "image_encoder", "init_from")]
            models = [model for model in PUBLISHED_MODELS if model.place in places]
            if not models:
                raise ConfigError(f"{name} names none of the models that `ipadapter models` lists.")
        else:
            near = difflib.get_close_matches(name, [*by_name, *config_names()], n=1)
            hint = f"Did you mean {near[0]}?" if near else "`ipadapter models` lists them, `ipadapter new` the configs."
            raise ConfigError(f"{name}: no such model or config. {hint}")
        found |= {model.name: model for model in models}
    return list(found.values())


def repository_of(name: str) -> str:
    """The repository of the model with this name."""
    return next(model.repository for model in PUBLISHED_MODELS if model.name == name)


def download_command(models: Iterable[PublishedModel]) -> str:
    """The command that downloads these models, and its size."""
    chosen = list(models)
    names, size = " ".join(model.name for model in chosen), sum(model.gigabytes for model in chosen)
    return f"`ipadapter models {names} --download` ({show_size(size)})"


def show_size(gigabytes: float) -> str:
    """4.3 -> "4.3 GB", 0.1 -> "100 MB"."""
    return f"{gigabytes:.1f} GB" if gigabytes >= 1 else f"{gigabytes * 1000:.0f} MB"

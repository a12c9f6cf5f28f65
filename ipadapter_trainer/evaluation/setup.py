"""Load what an evaluation needs, and refuse what does not fit together before anything is generated."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from ipadapter_core import IPAdapter, check_compatible, export_state

from ..data.examples import Example, fingerprint
from ..data.face_embeds import with_faces
from ..errors import EvaluationError
from ..files.opening import adapter_to_use
from ..models.base_model import BaseModel
from ..models.generate import initial_latents
from ..models.image_features import encode_images
from ..settings.eval_config import EvalConfig
from ..settings.fields import parse_size
from .clip import ClipModel, load_clip
from .generate_images import load_model
from .prompts import Prompt, Prompts, open_prompts, read_examples


@dataclass(frozen=True, eq=False)
class Setup:
    """An evaluation, ready to generate. `size` is (height, width)."""

    config: EvalConfig
    base_model: BaseModel
    adapter: IPAdapter
    clip: ClipModel
    examples: Sequence[Example]
    prompts: Prompts
    size: tuple[int, int]
    digest: str  # of everything that the score of an image depends on, besides its prompt, number and weight

    @property
    def image_folder(self) -> Path:
        """Folder of the saved images."""
        return self.config.output / "images" / self.digest

    @property
    def saved_prompts(self) -> list[Prompt]:
        """The prompts whose images are saved."""
        return list(self.prompts.by_index.values())[: self.config.sample_images]


def load_setup(config: EvalConfig, device: torch.device, progress_bar: bool = False) -> Setup:
    """Load models and prompts. Raises TrainerError and AdapterError when something is wrong or does not fit."""
    examples = read_examples(config.data, config.data_root, require_caption=config.text == "caption")
    adapter = adapter_to_use(config.adapter, config.shortcut)
    spec = adapter.spec
    if spec.face_dim is not None:
        examples = with_faces(examples, config.face_embeds, config.image_root, spec.face_dim)
    elif config.face_embeds is not None:
        raise EvaluationError(f"A {spec.kind} adapter takes no face embeddings; leave face_embeds out.")
    base_model = load_model(config, device, needs_image_encoder=spec.image_dim is not None)
    check_compatible(spec, base_model.sites, config.adapter.name)
    side = base_model.sample_size
    size = (side, side) if config.size is None else parse_size(config.size)
    initial_latents(base_model, 1, 0, size)  # refuses a size that is not a whole number of latents
    clip = load_clip(config.clip, device)
    # Encode one image, so that a wrong image encoder fails before all prompts are read.
    faces = None if spec.face_dim is None else torch.zeros(1, spec.face_dim)
    features = encode_images(base_model, spec, [Image.new("RGB", (64, 64))], faces)
    adapter.to(device)
    adapter.encode(*(feature.to(device, torch.float32) for feature in features))
    prompts = open_prompts(
        examples,
        clip,
        limit=config.limit,
        seed=config.seed,
        caption_prefix=config.caption_prefix,
        face_dim=spec.face_dim,
        progress_bar=progress_bar,
    )
    digest = _digest(config, base_model, adapter, clip, examples, size)
    return Setup(config, base_model, adapter, clip, examples, prompts, size, digest)


def _digest(
    config: EvalConfig,
    base_model: BaseModel,
    adapter: IPAdapter,
    clip: ClipModel,
    examples: Sequence[Example],
    size: tuple[int, int],
) -> str:
    weights = hashlib.sha256()
    for key, tensor in sorted(export_state(adapter).items()):
        weights.update(key.encode() + tensor.detach().cpu().contiguous().float().numpy().tobytes())
    parts = {
        "adapter": [weights.hexdigest(), adapter.spec.kind, getattr(adapter.projector, "shortcut", None)],
        "base_model": [base_model.fingerprint(), base_model.vae_fingerprint(), base_model.text_fingerprint()],
        "image_encoder": None if adapter.spec.image_dim is None else base_model.encoder_fingerprint(),
        "dtype": str(base_model.dtype),
        "clip": [clip.fingerprint(), config.caption_prefix],
        "data": fingerprint(examples, config.image_root),
        "generation": [config.text, config.num_inference_steps, config.guidance_scale, config.seed, *size],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

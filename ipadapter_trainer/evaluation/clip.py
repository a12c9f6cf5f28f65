"""The CLIP that measures generated images: CLIP-I and CLIP-T."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from ipadapter_core.published_encoders import CLIP_L

from ..data.preprocess import tokenize
from ..errors import EvaluationError
from ..models.hub import find_model, refuse_missing
from ..models.image_encoder import ImageEncoder, published_encoder
from ..models.parts import freeze, load_part, load_tokenizer, read_json, weight_files
from ..models.weight_files import weights_fingerprint

CLIP_SCORE_SCALE = 2.5
_CHUNK = 64  # texts or images at once
_SOURCE = "its page; the paper's is https://huggingface.co/openai/clip-vit-large-patch14"
_WHAT = (
    "clip takes a folder or Hub id of a whole CLIP (transformers' CLIPModel: both encoders, their projections and "
    "the tokenizer). The paper's: openai/clip-vit-large-patch14 (`ipadapter models clip-vit-large-patch14 --download`)."
)


class ClipModel:
    """A frozen CLIP in float32; `load_clip` makes it. `name` is for messages; `is_vit_l` is the function's result."""

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer, encoder: ImageEncoder, device: torch.device) -> None:
        self._model: Any = freeze(model, device, torch.float32)
        self._tokenizer, self._encoder, self._device = tokenizer, encoder, device
        self.is_vit_l = is_vit_l(model.config)
        is_other = encoder.name == CLIP_L.name and not self.is_vit_l
        self.name = f"{encoder.name} of another kind" if is_other else encoder.name

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB images of any size, through CLIP's own preprocessing -> unit embeddings, float32 [B, D] on the CPU."""

        def embed(chunk: list[Any]) -> Any:
            pixels = self._encoder.processor(images=chunk, return_tensors="pt").pixel_values
            return self._model.get_image_features(pixel_values=pixels.to(self._device))

        return self._embed(images, embed)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts, cut to the text encoder's length (77 tokens) -> unit embeddings, float32 [B, D] on the CPU."""
        return self._embed(texts, lambda chunk: self._model.get_text_features(self._tokenize(chunk).to(self._device)))

    def fingerprint(self) -> str:
        """16 hex digits of the weights, the preprocessing and the tokens of a text."""
        ids = self._tokenize(["The quick brown fox, 13 naïve façades; 50%!"]).tolist()
        parts = [weights_fingerprint(weight_files(self._encoder.path)), self._encoder.fingerprint, ids]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def vision_fingerprint(self) -> str:
        """As `BaseModel.encoder_fingerprint` of the same vision encoder."""
        return self._encoder.fingerprint

    def _tokenize(self, texts: Sequence[str]) -> Tensor:
        text_config: Any = self._model.config.text_config
        longest = int(min(self._tokenizer.model_max_length, text_config.max_position_embeddings))
        return tokenize([self._tokenizer], texts, longest)[0]

    @torch.no_grad()
    def _embed(self, items: Sequence[Any], features: Callable[[list[Any]], Any]) -> Tensor:
        embeds: list[Tensor] = []
        for start in range(0, len(items), _CHUNK):
            output = features(list(items[start : start + _CHUNK]))
            # transformers returns a tensor before version 5, an output object since.
            embeds.append(output if isinstance(output, Tensor) else output.pooler_output)
        return F.normalize(torch.cat(embeds), dim=-1).cpu()


def is_vit_l(config: CLIPConfig) -> bool:
    """Whether this is OpenAI's ViT-L/14 at 224 px, the paper's measure. LAION's has the same sizes and another
    activation function.
    """
    vision: Any = config.vision_config
    return published_encoder(vision, config.projection_dim) == CLIP_L and vision.hidden_act == "quick_gelu"


def load_clip(folder: Path | None, device: torch.device | str = "cpu") -> ClipModel:
    """Load a transformers CLIPModel from a folder or by its Hub id.

    Raises EvaluationError when none is named, and for a folder that is missing or holds another model, such as half a
    CLIP; BaseModelError for damaged files and missing weights.
    """
    if folder is None:
        raise EvaluationError(f"clip is missing. {_WHAT}")
    refuse_missing(folder)
    folder = find_model(folder)
    if not (folder / "config.json").is_file():
        what = "no config.json in it" if folder.is_dir() else "no such folder"
        raise EvaluationError(f"clip={folder}: {what}. {_WHAT}")
    found = read_json(folder / "config.json", _SOURCE).get("model_type")
    if found != "clip":
        half = {"clip_vision_model": ", its vision half alone", "clip_text_model": ", its text half alone"}
        raise EvaluationError(f"clip={folder}: holds a {found!r}{half.get(str(found), '')}, expected 'clip'. {_WHAT}")
    model = load_part(CLIPModel, folder, _SOURCE)
    tokenizer = load_tokenizer(folder, int(model.config.text_config.vocab_size), _SOURCE)
    return ClipModel(model, tokenizer, ImageEncoder(folder), torch.device(device))


def clip_i(generated: Tensor, prompts: Tensor) -> Tensor:
    """CLIP-I of the paper (arXiv 2308.06721, section 4.2): the cosine of unit embeddings [B, D] of generated images
    and of their image prompts, [B] in [-1, 1].
    """
    return (generated * prompts).sum(-1)


def clip_t(generated: Tensor, captions: Tensor) -> Tensor:
    """CLIP-T of the paper: CLIPScore, 2.5 max(cosine, 0) (arXiv 2104.08718, section 3), of unit embeddings [B, D] of
    generated images and of the captions of their image prompts, [B] in [0, 2.5].

    The factor brings the cosines of ViT-L/14, 0.17 to 0.24, to the paper's 0.42 to 0.61.
    """
    return CLIP_SCORE_SCALE * (generated * captions).sum(-1).clamp(min=0)

"""Text states and SDXL's time ids, which condition the UNet besides the image prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.preprocess import tokenize
from ..errors import TrainerError
from .base_model import BaseModel


@dataclass(frozen=True, eq=False)
class TextStates:
    """Encoded texts. `pooled` is None for models with one text encoder."""

    states: Tensor  # [B, L, D]
    pooled: Tensor | None = None  # [B, P], the second text encoder's text_embeds

    def __len__(self) -> int:
        return len(self.states)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TextStates:
        """The same on another device, and in another dtype when one is given."""
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        return TextStates(self.states.to(device, dtype), pooled)

    def index(self, rows: Tensor) -> TextStates:
        """The states of some rows (indices or a mask)."""
        return TextStates(self.states[rows], None if self.pooled is None else self.pooled[rows])

    def expand(self, count: int) -> TextStates:
        """One row as `count` rows, without a copy."""
        pooled = None if self.pooled is None else self.pooled.expand(count, -1)
        return TextStates(self.states.expand(count, -1, -1), pooled)

    @staticmethod
    def cat(parts: Sequence[TextStates]) -> TextStates:
        """Several batches as one."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return TextStates(torch.cat([part.states for part in parts]), torch.cat(pooled) if pooled else None)


@torch.no_grad()
def encode_tokens(base_model: BaseModel, text_input_ids: Tensor, text_input_ids_2: Tensor | None = None) -> TextStates:
    """Token ids, int64 [B, L], one tensor per tokenizer -> text states [B, L, D].

    One text encoder: its last hidden states. Two (SDXL, arXiv 2307.01952, section 2.1): the penultimate hidden
    states of both, concatenated along the channels, and the pooled, projected embedding of the second.

    Raises TrainerError when the number of tensors is not that of the text encoders.
    """
    ids = (text_input_ids,) if text_input_ids_2 is None else (text_input_ids, text_input_ids_2)
    encoders = base_model.text_encoders
    if len(ids) != len(encoders):
        raise TrainerError(
            f"{base_model.name} has {len(encoders)} text encoders, token ids for {len(ids)} were given. Tokenize with "
            "each of its tokenizers."
        )
    on_device = [base_model.to_device(part) for part in ids]
    if not base_model.is_sdxl:
        return TextStates(encoders[0](on_device[0]).last_hidden_state)
    outputs = [encoder(part, output_hidden_states=True) for encoder, part in zip(encoders, on_device, strict=True)]
    states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return TextStates(states, outputs[-1].text_embeds)


def encode_prompts(base_model: BaseModel, prompts: Sequence[str]) -> TextStates:
    """Prompts -> text states; equal prompts are encoded once."""
    number = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    rows = torch.tensor([number[prompt] for prompt in prompts], device=base_model.device)
    ids = tokenize(base_model.tokenizers, list(number), base_model.text_length)
    return encode_tokens(base_model, *ids).index(rows)


def time_ids(original_size: Tensor, crop_coords_top_left: Tensor, target_size: Tensor) -> Tensor:
    """SDXL's size conditioning (section 2.2): (height, width), (top, left), (height, width), each [B, 2] in pixels,
    -> float32 [B, 6].
    """
    return torch.cat([part.float() for part in (original_size, crop_coords_top_left, target_size)], dim=1)


def added_conditions(text: TextStates, time_ids: Tensor | None) -> dict[str, Tensor] | None:
    """`added_cond_kwargs` of a diffusers UNet; None for models without.

    The time ids stay in float32: bfloat16 cannot represent all whole numbers above 256.

    Raises TrainerError when SDXL's time ids are missing.
    """
    if text.pooled is None:
        return None
    if time_ids is None:
        raise TrainerError("SDXL needs time ids: the sizes and the crop of the images (conditioning.time_ids).")
    return {"text_embeds": text.pooled, "time_ids": time_ids.to(text.pooled.device, torch.float32)}

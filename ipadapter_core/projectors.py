"""Image features -> image tokens. Parameter names are those of the published files."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import split_heads
from .errors import AdapterError
from .operations import Operations


class ImageProjection(nn.Module):
    """Base: one Linear to all tokens, then LayerNorm (paper section 3.2.1). image_embeds [B, E] -> [B, T, D]."""

    def __init__(
        self, image_dim: int, cross_attention_dim: int, num_tokens: int = 4, *, operations: Operations = nn
    ) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.proj = operations.Linear(image_dim, num_tokens * cross_attention_dim)
        self.norm = operations.LayerNorm(cross_attention_dim)

    def forward(self, image_embeds: Tensor) -> Tensor:
        return self.norm(self.proj(image_embeds).unflatten(-1, (self.num_tokens, -1)))


class FullProjection(nn.Module):
    """Full face: one MLP for every encoder token. Hidden states [B, T, E] -> [B, T, D]; T = 257 for ViT-H at 224."""

    def __init__(
        self, image_dim: int, cross_attention_dim: int, hidden_dim: int | None = None, *, operations: Operations = nn
    ) -> None:
        super().__init__()
        hidden_dim = hidden_dim or image_dim
        self.proj = nn.Sequential(
            operations.Linear(image_dim, hidden_dim),
            nn.GELU(),
            operations.Linear(hidden_dim, cross_attention_dim),
            operations.LayerNorm(cross_attention_dim),
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.proj(hidden_states)


class FaceIDProjection(nn.Module):
    """FaceID and portrait: an MLP from the face embedding to all tokens. face_embeds [B, F] -> [B, T, D].

    Several faces [B, n, F] become n * T tokens.
    """

    def __init__(
        self,
        face_dim: int,
        cross_attention_dim: int,
        num_tokens: int = 4,
        hidden_dim: int | None = None,
        *,
        operations: Operations = nn,
    ) -> None:
        super().__init__()
        hidden_dim = hidden_dim or 2 * face_dim
        self.num_tokens = num_tokens
        self.proj = nn.Sequential(
            operations.Linear(face_dim, hidden_dim),
            nn.GELU(),
            operations.Linear(hidden_dim, num_tokens * cross_attention_dim),
        )
        self.norm = operations.LayerNorm(cross_attention_dim)

    def forward(self, face_embeds: Tensor) -> Tensor:
        tokens = self.norm(self.proj(face_embeds).unflatten(-1, (self.num_tokens, -1)))
        return tokens.flatten(1, -2)


class PerceiverAttention(nn.Module):
    """Latents attend to the image features and to themselves. x [B, L, d], latents [B, T, d] -> [B, T, d]."""

    def __init__(self, dim: int, heads: int, dim_head: int, *, operations: Operations = nn) -> None:
        super().__init__()
        inner_dim = heads * dim_head
        self.heads = heads
        self.norm1 = operations.LayerNorm(dim)
        self.norm2 = operations.LayerNorm(dim)
        self.to_q = operations.Linear(dim, inner_dim, bias=False)
        self.to_kv = operations.Linear(dim, 2 * inner_dim, bias=False)
        self.to_out = operations.Linear(inner_dim, dim, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        normed = self.norm2(latents)
        both = torch.cat([self.norm1(x), normed], dim=1)
        query = split_heads(self.to_q(normed), self.heads)
        key, value = (split_heads(part, self.heads) for part in self.to_kv(both).chunk(2, dim=-1))
        # 1/sqrt(d) once equals the d^-1/4 on each side of the original up to rounding.
        out = F.scaled_dot_product_attention(query, key, value)
        return self.to_out(out.transpose(1, 2).flatten(2))


def feed_forward(dim: int, multiple: int = 4, *, operations: Operations = nn) -> nn.Sequential:
    """LayerNorm, Linear, GELU, Linear; no biases. [B, T, d] -> [B, T, d]."""
    return nn.Sequential(
        operations.LayerNorm(dim),
        operations.Linear(dim, multiple * dim, bias=False),
        nn.GELU(),
        operations.Linear(multiple * dim, dim, bias=False),
    )


class PerceiverResampler(nn.Module):
    """The common part of plus and FaceID-plus: latents refined by image features.

    `resample`: latents [B, T, d], image features [B, L, E] -> [B, T, D].
    """

    def __init__(
        self,
        image_dim: int,
        cross_attention_dim: int,
        *,
        dim: int,
        depth: int = 4,
        heads: int = 12,
        dim_head: int = 64,
        operations: Operations = nn,
    ) -> None:
        super().__init__()
        self.proj_in = operations.Linear(image_dim, dim)
        self.proj_out = operations.Linear(dim, cross_attention_dim)
        self.norm_out = operations.LayerNorm(cross_attention_dim)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(dim, heads, dim_head, operations=operations),
                    feed_forward(dim, operations=operations),
                ]
            )
            for _ in range(depth)
        )

    def resample(self, latents: Tensor, features: Tensor) -> Tensor:
        x = self.proj_in(features)
        for layer in self.layers:
            attention, mlp = layer.children()
            latents = attention(x, latents) + latents
            latents = mlp(latents) + latents
        return self.norm_out(self.proj_out(latents))


class Resampler(PerceiverResampler):
    """Plus: learned queries read the penultimate hidden states. [B, L, E] -> [B, T, D]; [B, E] counts as L = 1."""

    def __init__(
        self,
        image_dim: int,
        cross_attention_dim: int,
        num_tokens: int = 16,
        *,
        dim: int,
        depth: int = 4,
        heads: int = 12,
        dim_head: int = 64,
        operations: Operations = nn,
    ) -> None:
        super().__init__(
            image_dim, cross_attention_dim, dim=dim, depth=depth, heads=heads, dim_head=dim_head, operations=operations
        )
        self.latents = nn.Parameter(torch.randn(1, num_tokens, dim) * dim**-0.5)

    def forward(self, features: Tensor) -> Tensor:
        features = features.unsqueeze(1) if features.ndim == 2 else features
        # A raw Parameter is not cast by comfy.ops, so it is cast here.
        latents = self.latents.to(device=features.device, dtype=features.dtype)
        return self.resample(latents.expand(features.shape[0], -1, -1), features)


class FaceIDPlusProjection(FaceIDProjection):
    """FaceID-plus: face tokens are the latents of a resampler over CLIP features of the face crop.

    face_embeds [B, F], clip_features [B, L, E] -> [B, T, D]. v2 (`shortcut`) returns
    face tokens + shortcut_scale * resampled, v1 the resampled tokens alone. The keys of both versions are the same,
    so `shortcut` is None where the file does not say; `forward` then raises AdapterError instead of guessing.
    """

    def __init__(
        self,
        face_dim: int,
        image_dim: int,
        cross_attention_dim: int,
        num_tokens: int = 4,
        *,
        hidden_dim: int | None = None,
        depth: int = 4,
        heads: int | None = None,
        dim_head: int = 64,
        shortcut: bool | None = None,
        operations: Operations = nn,
    ) -> None:
        super().__init__(face_dim, cross_attention_dim, num_tokens, hidden_dim, operations=operations)
        self.shortcut = shortcut
        self.shortcut_scale = 1.0
        self.perceiver_resampler = PerceiverResampler(
            image_dim,
            cross_attention_dim,
            dim=cross_attention_dim,
            depth=depth,
            heads=heads or cross_attention_dim // dim_head,
            dim_head=dim_head,
            operations=operations,
        )

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - also takes the CLIP features
        self, face_embeds: Tensor, clip_features: Tensor, shortcut_scale: float | None = None
    ) -> Tensor:
        if self.shortcut is None:
            raise AdapterError(
                "This FaceID-plus file does not say whether it is v1 or v2 (their keys are the same). Set "
                "shortcut=True for a 'plusv2' file, shortcut=False for v1."
            )
        face_tokens = super().forward(face_embeds)
        resampled = self.perceiver_resampler.resample(face_tokens, clip_features)
        scale = self.shortcut_scale if shortcut_scale is None else shortcut_scale
        return face_tokens + scale * resampled if self.shortcut else resampled

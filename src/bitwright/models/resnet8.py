"""The MLPerf Tiny image-classification network (Banbury et al., 2021), a ResNet-8 for 32×32 images.

Its input is RGB from 0 to 255, not normalised. Parameter names are ``conv.N``, ``bn.N`` and ``fc``.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ResNet8(nn.Module):
    """Three stages of one residual block; TensorFlow's padding and BatchNorm epsilon, biases in every convolution."""

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.conv = nn.ModuleList(
            [
                nn.Conv2d(3, 16, 3, padding=1),
                nn.Conv2d(16, 16, 3, padding=1),
                nn.Conv2d(16, 16, 3, padding=1),
                nn.Conv2d(16, 32, 3, stride=2),
                nn.Conv2d(32, 32, 3, padding=1),
                nn.Conv2d(16, 32, 1, stride=2),
                nn.Conv2d(32, 64, 3, stride=2),
                nn.Conv2d(64, 64, 3, padding=1),
                nn.Conv2d(32, 64, 1, stride=2),
            ]
        )
        self.bn = nn.ModuleList([nn.BatchNorm2d(channels, eps=1e-3) for channels in (16, 16, 16, 32, 32, 64, 64)])
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [n, 3, 32, 32] to logits [n, num_classes]."""
        x = F.relu(self.bn[0](self.conv[0](x)))
        x = F.relu(x + self._branch(x, 1, 1))
        x = F.relu(self.conv[5](x) + self._branch(_pad_same(x), 3, 3))
        x = F.relu(self.conv[8](x) + self._branch(_pad_same(x), 6, 5))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits

    def _branch(self, x: Tensor, conv: int, bn: int) -> Tensor:
        out = F.relu(self.bn[bn](self.conv[conv](x)))
        result: Tensor = self.bn[bn + 1](self.conv[conv + 1](out))
        return result


def _pad_same(x: Tensor) -> Tensor:
    """Pad as TensorFlow's 'same' does for a 3×3 kernel at stride 2 on an even size: right and below only."""
    return F.pad(x, (0, 1, 0, 1))

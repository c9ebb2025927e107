"""The CIFAR ResNet of He et al. (2016), section 4.2, with the parameter-free option-A shortcut.

Parameter names are those of the public CIFAR-10 checkpoints (``conv1``, ``bn1``, ``layer1.0.conv1`` …, ``linear``).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bitwright.errors import BitwrightError


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut that drops every second pixel and pads the new channels with zeros."""

    def __init__(self, inputs: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - inputs

    def shortcut(self, x: Tensor) -> Tensor:
        """Return the input at the block's output shape: half of the new channels before, half behind."""
        if self.stride == 1 and self.new_channels == 0:
            return x
        before = self.new_channels // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new_channels - before))

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, inputs, H, W] to [n, channels, H/stride, W/stride]."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet of depth 6n+2 for 32×32 images of so many channels: three stages of n blocks with 16, 32 and 64 channels."""

    def __init__(self, depth: int = 20, num_classes: int = 10, channels: int = 3):
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise BitwrightError(f"cifar_resnet: depth {depth} is not 6n+2; use 20, 32, 44, 56 or 110")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [n, channels, 32, 32] to logits [n, num_classes]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def _stage(inputs: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    rest = [BasicBlock(channels, channels, 1) for _ in range(blocks - 1)]
    return nn.Sequential(BasicBlock(inputs, channels, stride), *rest)

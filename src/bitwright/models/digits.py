"""A small convolutional network for 8×8 grey digits, with layers that differ much in size and in work."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class DigitsCNN(nn.Module):
    """Six sites of 216 to 8,640 weights, one of them depthwise, each convolution with BatchNorm; 17,576 weights.

    >>> import torch
    >>> DigitsCNN()(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 24, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.conv2 = nn.Conv2d(24, 32, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False)
        self.bn3 = nn.BatchNorm2d(32)
        self.pointwise = nn.Conv2d(32, 40, 1, bias=False)
        self.bn4 = nn.BatchNorm2d(40)
        self.conv3 = nn.Conv2d(40, 24, 3, padding=1, bias=False)
        self.bn5 = nn.BatchNorm2d(24)
        self.fc = nn.Linear(24, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [n, 1, 8, 8] to logits [n, num_classes]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        x = F.relu(self.bn3(self.depthwise(x)))
        x = F.relu(self.bn4(self.pointwise(x)))
        x = F.relu(self.bn5(self.conv3(x)))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits

"""scikit-learn's digits: 1,797 real scans of 8x8 pixels, embedded in that package."""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.errors import DataError

TEST = 450
TEST_SEED = 20250
MEAN, STD = (0.305,), (0.376,)


def read_digits() -> tuple[Tensor, Tensor]:
    """Return (images, float32 [1797, 1, 8, 8] in 0 … 1; labels, int64 [1797])."""
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415  (an extra, and slow to import)
    except ImportError:
        raise DataError("data: digits come with scikit-learn, which is not installed; type `pip install 'bitwright[demo]'`") from None
    digits = load_digits()
    return torch.from_numpy(digits.images).float().div_(16).unsqueeze(1), torch.from_numpy(digits.target).long()


def digits_test_index() -> tuple[Tensor, Tensor]:
    """Return the positions of the train and of the test images; the same always, whatever the seed of a run."""
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(TEST_SEED))
    return order[TEST:], order[:TEST]

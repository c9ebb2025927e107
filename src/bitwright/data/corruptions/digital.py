"""Digital corruptions: brightness, contrast, saturation, large pixels, JPEG and elastic distortion."""

from __future__ import annotations

import io

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitwright.data.corruptions.draws import Draws
from bitwright.data.corruptions.severities import (
    BRIGHTNESS,
    CONTRAST,
    ELASTIC_TRANSFORM,
    JPEG_COMPRESSION,
    PIXELATE,
    SATURATE,
    scale_of,
)
from bitwright.data.corruptions.windows import blur, look_up, resample
from bitwright.data.packs import require_pillow


def brightness(images: Tensor, severity: int, draws: Draws) -> Tensor:
    """Raise the value (HSV): with hue and saturation kept, a pixel is scaled; a black one turns grey."""
    value = images.amax(1, keepdim=True)
    raised = (value + BRIGHTNESS[scale_of(images)][severity - 1]).clamp_(max=1)
    return torch.where(value > 0, images * (raised / value.clamp_min(1e-12)), raised)


def contrast(images: Tensor, severity: int, draws: Draws) -> Tensor:
    """Bring every channel nearer to its mean."""
    mean = images.double().mean((2, 3), keepdim=True).to(images.dtype)
    return (images - mean) * CONTRAST[scale_of(images)][severity - 1] + mean


def saturate(images: Tensor, severity: int, draws: Draws) -> Tensor:
    """Change the saturation (HSV); an image of one channel has none and stays as it is.

    A pixel without any saturation has hue 0, so what is added to it makes it red, as in the published programs.
    """
    if images.shape[1] == 1:
        return images.clone()
    factor, added = SATURATE[scale_of(images)][severity - 1]
    value = images.amax(1, keepdim=True)
    below = value - images
    most = below.amax(1, keepdim=True)
    saturation = most / value.clamp_min(1e-12)
    wanted = (saturation * factor + added).clamp_(0, 1) * value
    red = torch.tensor([0.0, 1.0, 1.0], device=images.device).view(1, 3, 1, 1)
    share = torch.where(most > 0, below / most.clamp_min(1e-12), red)
    return value - share * wanted


def pixelate(images: Tensor, severity: int, draws: Draws) -> Tensor:
    """Average the image over fewer, larger pixels."""
    share = PIXELATE[scale_of(images)][severity - 1]
    for dim in (3, 2):
        images = resample(images, dim, *_coarse(images.shape[dim], max(1, int(images.shape[dim] * share))))
    return images


def _coarse(length: int, fewer: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return, for each of ``length`` pixels, which ones it is the mean of when only ``fewer`` are kept, and their weights."""
    wide = length / fewer
    steps = np.full(length, fewer / length)
    steps[0] /= 2
    kept = np.minimum(steps.cumsum().astype(np.int64), fewer - 1)  # summed up as Pillow does, which decides ties
    first = np.floor(kept * wide + 0.5).astype(np.int64)  # a pixel counts where its middle lies, as in Pillow's box filter
    last = np.minimum(np.floor((kept + 1) * wide + 0.5).astype(np.int64), length)
    offsets = np.arange(int((last - first).max()))
    inside = first[:, None] + offsets < last[:, None]
    return np.minimum(first[:, None] + offsets, length - 1), inside / inside.sum(1, keepdims=True)


def jpeg_compression(images: Tensor, severity: int, draws: Draws) -> Tensor:
    """Encode and decode every image as JPEG, by Pillow's codec on the CPU; raises `DataError` without Pillow."""
    require_pillow()
    quality = int(JPEG_COMPRESSION[scale_of(images)][severity - 1])
    pixels = images.detach().cpu().mul(255).round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    decoded = np.stack([_recoded(image, quality) for image in pixels])
    return torch.from_numpy(decoded).permute(0, 3, 1, 2).to(images.device).to(images.dtype).div_(255)


def _recoded(image: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    """Return uint8 [H, W, C] after one round through the codec."""
    from PIL import Image  # noqa: PLC0415  (an extra)

    file = io.BytesIO()
    Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(file, "JPEG", quality=quality)
    return np.array(Image.open(file)).reshape(image.shape)


def elastic_transform(images: Tensor, severity: int, draws: Draws) -> Tensor:
    """Move the pixels as on a rubber sheet; small images are also sheared, turned and moved as a whole.

    Differs: for large images, as in ``imagecorruptions``, without the affine part that ImageNet-C has.
    """
    side = min(images.shape[-2:])
    strength, smoothing, jitter = ELASTIC_TRANSFORM[scale_of(images)][severity - 1]
    if jitter:
        images = _affine(images, draws.uniform(2, (3, 2), -jitter * side, jitter * side))
    if not strength:
        return images
    height, width = images.shape[-2:]
    draw = draws.uniform(0, (2, height, width), -1, 1)
    moves = blur(draw, (smoothing * height, smoothing * width), "reflect", truncate=3) * (strength * height)
    rows = torch.arange(height, device=images.device)[:, None] + moves[:, 1]
    columns = torch.arange(width, device=images.device) + moves[:, 0]
    return look_up(images, rows, columns, "reflect")


def _affine(images: Tensor, moves: Tensor) -> Tensor:
    """Map the image affinely so that three corners of a square of a third of its side move as given, [N, 3, (x, y)] in pixels."""
    height, width = images.shape[-2:]
    reach = max(1, min(height, width) // 3)
    middle = torch.tensor([float(height // 2), float(width // 2)], device=images.device)
    corners = middle + torch.tensor([[reach, reach], [reach, -reach], [-reach, -reach]], device=images.device)
    moved = corners + moves
    # columns of the linear part: where the unit steps along x and along y end up
    along_x, along_y = ((moved[:, i] - moved[:, j]) / (2 * reach) for i, j in ((1, 2), (0, 1)))
    offset = moved[:, 2] - along_x * corners[2, 0] - along_y * corners[2, 1]
    a, c = along_x[:, 0, None, None], along_x[:, 1, None, None]
    b, d = along_y[:, 0, None, None], along_y[:, 1, None, None]
    x = torch.arange(width, device=images.device)[None, None, :] - offset[:, 0, None, None]
    y = torch.arange(height, device=images.device)[None, :, None] - offset[:, 1, None, None]
    scale = a * d - b * c
    return look_up(images, (a * y - c * x) / scale, (d * x - b * y) / scale, "mirror")

"""Draw the contact sheets of all corruptions in docs/images: the photographs that come with scikit-learn, corrupted.

    python benchmarks/contact_sheet.py            # needs the extras demo and images

The photographs (china.jpg by danielbuechele and flower.jpg by vultilion, both of Flickr and under CC BY 2.0) are cut, scaled to 224
and to 32 pixels, and corrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_sample_images

from bitwright.data.corruptions import CORRUPTIONS, corrupt

SHEETS = {"large": (224, 96, (1, 3, 5), 192), "small": (32, 64, (1, 2, 3, 4, 5), 256)}
"""Of each scale: pixels of an image, pixels of it on the sheet, severities, and colours that the file keeps."""
LABEL, HEAD, GAP = 128, 18, 4


def photographs(size: int) -> torch.Tensor:
    """Return two photographs as float [2, 3, size, size] in 0 … 1."""
    found = []
    for picture, (left, top, side) in zip(load_sample_images().images, ((150, 20, 400), (110, 0, 427)), strict=True):
        cut = Image.fromarray(picture).crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
        found.append(np.asarray(cut))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 255


def thumbnail(image: torch.Tensor, side: int) -> Image.Image:
    """Return an image, float [3, H, W], at its size on the sheet."""
    picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
    return picture.resize((side, side), Image.Resampling.NEAREST if side > picture.width else Image.Resampling.BOX)


def sheet(names: Sequence[str], size: int, side: int, severities: Sequence[int]) -> Image.Image:
    """Return a sheet: a row a corruption, in turn on either photograph; the clean image, then the severities."""
    images, step = photographs(size), side + GAP
    columns = ("clean", *map(str, severities))
    page = Image.new("RGB", (LABEL + step * len(columns), HEAD + step * len(names)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for column, text in enumerate(columns):
        draw.text((LABEL + column * step, 2), text, "black", font)
    for row, name in enumerate(names):
        image, top = images[row % 2][None], HEAD + row * step
        draw.text((4, top + side // 2 - 8), name, "black", font)
        shown = [image, *(corrupt(image, name, severity, seeds=[row]) for severity in severities)]
        for column, each in enumerate(shown):
            page.paste(thumbnail(each[0], side), (LABEL + column * step, top))
    return page


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent / "docs" / "images")
    for scale, (size, side, severities, colours) in SHEETS.items():
        page = sheet(CORRUPTIONS, size, side, severities)
        file = folder / f"corruptions-{scale}.png"
        page.quantize(colours, dither=Image.Dither.NONE).save(file, optimize=True)
        print(file, page.size, f"{file.stat().st_size / 1000:.0f} KB")

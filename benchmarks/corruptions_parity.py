"""Compare our corruptions with those of `imagecorruptions`, the published program, on the same images.

The package is a reference for this script alone. It wants an environment of its own, apart from the one the tests run in:

    python3 -m venv /tmp/parity
    /tmp/parity/bin/pip install -e . imagecorruptions 'setuptools<81'
    BITWRIGHT_DATA=… /tmp/parity/bin/python benchmarks/corruptions_parity.py                # all; hours on one core
    BITWRIGHT_DATA=… /tmp/parity/bin/python benchmarks/corruptions_parity.py fog --scale small

Its version 1.1.2 has three functions that fail with today's NumPy and scikit-image (fog, glass_blur, gaussian_blur): two renamed
arguments are put right here. At 32 pixels its functions run with the constants of CIFAR-10-C put in place of their own; where
CIFAR-10-C does something else there (elastic_transform has an affine part, frost is cut from photographs at a fifth of their size),
this script does that with OpenCV, scikit-image and SciPy. A deterministic corruption is compared pixel by pixel; of a random one
the mean squared error it makes is compared. Rows for other corruptions in the CSV are kept.
"""

# ruff: noqa: NPY002, NPY201  (the package draws from the legacy generator, and asks for a name that is gone)
from __future__ import annotations

import argparse
import ast
import csv
import inspect
import os
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from imagecorruptions import corruptions as reference
from PIL import Image
from record import RESULTS, environment, write
from scipy.ndimage import map_coordinates
from skimage.filters import gaussian

from bitwright.data import load_data
from bitwright.data.corruptions import CORRUPTIONS, DETERMINISTIC, SEVERITIES, corrupt, severities

Reference = Callable[[np.ndarray, int], np.ndarray]
DATA = {"small": ("cifar10", 32), "large": ("imagenette224", 224)}
IMAGES = {True: 100, False: 500}
"""How many images: of a deterministic corruption every pixel is compared, so fewer do."""
NAME = "corruptions-parity"


class Drawn:
    """NumPy as the loop of glass_blur sees it: pairs of small integers drawn many at a time, for one call a pixel takes minutes."""

    def __init__(self) -> None:
        self.random, self.pairs, self.range = self, iter(()), (0, 0)

    def __getattr__(self, name: str) -> object:
        """Return everything else as it is."""
        return getattr(np, name)

    def randint(self, low: int, high: int, size: tuple[int]) -> tuple[int, int]:
        """Return the next pair of integers in low … high - 1."""
        if self.range != (low, high):
            self.range, self.pairs = (low, high), iter(())
        pair = next(self.pairs, None)
        if pair is None:
            self.pairs = iter(np.random.randint(low, high, (100_000, *size)).tolist())
            pair = next(self.pairs)
        return pair


def mend() -> None:
    """Let the functions of the package that fail run again."""
    np.float_ = np.float64
    reference.gaussian = lambda image, sigma, multichannel=False, **rest: gaussian(
        image, sigma=sigma, channel_axis=-1 if multichannel else None, **rest
    )


class Constants(ast.NodeTransformer):
    """Puts other constants in the place of the first assignment to ``c``."""

    def __init__(self, value: str):
        self.value: str | None = value

    def visit_Assign(self, node: ast.Assign) -> ast.Assign:
        """Replace the first one."""
        if self.value is not None and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "c":
            node.value, self.value = ast.parse(self.value, mode="eval").body, None
        return node


def with_constants(name: str) -> Reference:
    """Return a function of the package with the constants for small images."""
    levels = getattr(severities, name.upper())["small"]
    table = f"[np.arange(1, stop, step) for stop, step in {levels}]" if name == "zoom_blur" else str(levels)
    tree = Constants(f"{table}[severity - 1]").visit(ast.parse(textwrap.dedent(inspect.getsource(getattr(reference, name)))))
    space = dict(vars(reference))
    exec(compile(ast.fix_missing_locations(tree), name, "exec"), space)  # noqa: S102  (the package's own source)
    return space[name]


def elastic_small(image: np.ndarray, severity: int) -> np.ndarray:
    """Shear, turn and move the image, then displace its pixels, as CIFAR-10-C does."""
    strength, smoothing, jitter = (32 * share for share in severities.ELASTIC_TRANSFORM["small"][severity - 1])
    x = np.asarray(image, np.float32) / 255
    corners = np.float32([[26, 26], [26, 6], [6, 6]])
    moved = corners + np.random.uniform(-jitter, jitter, corners.shape).astype(np.float32)
    x = cv2.warpAffine(x, cv2.getAffineTransform(corners, moved), (32, 32), borderMode=cv2.BORDER_REFLECT_101)
    if strength:
        noise = (np.random.uniform(-1, 1, (32, 32)) for _ in range(2))
        across, down = (gaussian(field, smoothing, mode="reflect", truncate=3) * strength for field in noise)
        rows, columns = np.mgrid[:32, :32]
        x = np.stack([map_coordinates(x[..., k], [rows + down, columns + across], order=1, mode="reflect") for k in range(3)], -1)
    return np.clip(x, 0, 1) * 255


def frost_small(image: np.ndarray, severity: int) -> np.ndarray:
    """Lay a piece of one of five photographs over the image, each at a fifth of its size, as CIFAR-10-C does."""
    share, strength = severities.FROST["small"][severity - 1]
    folder = Path(inspect.getfile(reference)).parent / "frost"
    files = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")
    ice = cv2.resize(cv2.imread(str(folder / files[np.random.randint(5)])), (0, 0), fx=0.2, fy=0.2)
    top, left = (np.random.randint(0, length - 32) for length in ice.shape[:2])
    return np.clip(share * np.asarray(image) + strength * ice[top : top + 32, left : left + 32, ::-1], 0, 255)


def reference_of(name: str, scale: str) -> Reference:
    """Return the independent implementation."""
    if name == "glass_blur":
        reference.np = Drawn()
    if scale == "large":
        return getattr(reference, name)
    return {"elastic_transform": elastic_small, "frost": frost_small}.get(name) or with_constants(name)


def images_of(scale: str, count: int, root: str) -> torch.Tensor:
    """Return the first test images, float [N, 3, H, W] in 0 … 1, whole numbers of 255ths."""
    name, _ = DATA[scale]
    split = load_data(name, root, held_out=100, seed=0, mean=[0.0] * 3, std=[1.0] * 3).test
    x, _ = split.batch(torch.arange(count))
    return (x * 255).round() / 255


def compare(name: str, scale: str, root: str, chosen: Sequence[int]) -> list[dict[str, object]]:
    """Return a row for each severity; the ratio's standard error takes the two programs' draws as independent."""
    fixed = name in DETERMINISTIC
    images = images_of(scale, IMAGES[fixed], root)
    pictures = [Image.fromarray(image) for image in (images * 255).byte().permute(0, 2, 3, 1).numpy()]
    function, rows = reference_of(name, scale), []
    for severity in chosen:
        np.random.seed(severity)
        theirs = np.stack([np.asarray(function(picture, severity), np.float32) for picture in pictures]) / 255
        ours = np.concatenate([corrupt(part, name, severity, seeds=range(k, k + len(part))).numpy() for k, part in parts(images)])
        theirs = theirs.transpose(0, 3, 1, 2)
        own, other = (float(((x - images.numpy()) ** 2).mean()) for x in (ours, theirs))
        row = {"corruption": name, "scale": scale, "severity": severity, "kind": "deterministic" if fixed else "random", "n": len(images)}
        row |= {"mean_absolute_difference_255": round(255 * float(np.abs(ours - theirs).mean()), 4) if fixed else ""}
        row |= {"mse_ours": f"{own:.6f}", "mse_reference": f"{other:.6f}", "ratio": round(own / other, 4)}
        spread = float(((theirs - images.numpy()) ** 2).mean((1, 2, 3)).std() / len(images) ** 0.5 / other)
        row |= {"ratio_error": "" if fixed else round(spread * 2**0.5, 4)}
        print(row, flush=True)
        rows.append({**row, **environment()})
    return rows


def parts(images: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """Return the images in batches of 50, each with the number of its first."""
    return [(k, images[k : k + 50]) for k in range(0, len(images), 50)]


def keep(rows: list[dict[str, object]]) -> None:
    """Write rows into the CSV in place of those of the same corruption, scale and severity."""
    new = {(row["corruption"], row["scale"], str(row["severity"])) for row in rows}
    path = RESULTS / f"{NAME}.csv"
    old = list(csv.DictReader(path.open())) if path.exists() else []
    rows = [row for row in old if (row["corruption"], row["scale"], row["severity"]) not in new] + rows
    write(NAME, sorted(rows, key=lambda row: (row["scale"], CORRUPTIONS.index(row["corruption"]), int(row["severity"]))))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=CORRUPTIONS)
    parser.add_argument("--scale", choices=tuple(DATA))
    parser.add_argument("--severities", type=int, nargs="+", default=SEVERITIES)
    arguments = parser.parse_args()
    mend()
    torch.set_num_threads(1)
    for chosen in arguments.names:
        for size in (arguments.scale,) if arguments.scale else tuple(DATA):
            keep(compare(chosen, size, os.environ["BITWRIGHT_DATA"], arguments.severities))

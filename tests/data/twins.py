"""The corruptions once more, one image at a time, with NumPy, SciPy and Pillow: slow, plain, and written apart from the package.

Each takes an image [H, W, C] in 0 … 1, a severity, the scale whose constants apply and NumPy's generator. Only the constants are
the package's own. Frost has no twin here: the published one is cut from photographs (see results/corruptions-parity.csv).
"""

from __future__ import annotations

import colorsys
import io
import math

import numpy as np
from PIL import Image
from scipy import ndimage

from bitwright.data.corruptions import severities


def constants(name, severity, scale):
    return getattr(severities, name.upper())[scale][severity - 1]


def gaussian(x, sigma, mode="nearest", truncate=4.0):
    sigma = tuple(np.broadcast_to(sigma, 2)) + (0,) * (x.ndim - 2)
    return ndimage.gaussian_filter(x, sigma, mode=mode, truncate=truncate)


def gaussian_noise(x, severity, scale, rng):
    return x + rng.normal(0, constants("gaussian_noise", severity, scale), x.shape)


def shot_noise(x, severity, scale, rng):
    photons = constants("shot_noise", severity, scale)
    return rng.poisson(x * photons) / photons


def impulse_noise(x, severity, scale, rng):
    x = x.copy()
    hit = rng.random(x.shape) < constants("impulse_noise", severity, scale)
    x[hit] = rng.integers(0, 2, hit.sum())
    return x


def speckle_noise(x, severity, scale, rng):
    return x + x * rng.normal(0, constants("speckle_noise", severity, scale), x.shape)


def gaussian_blur(x, severity, scale, rng):
    return gaussian(x, constants("gaussian_blur", severity, scale))


def defocus_blur(x, severity, scale, rng):
    radius, softness = constants("defocus_blur", severity, scale)
    half, soft = (8, 1) if radius <= 8 else (radius, 2)
    rows, columns = np.mgrid[-half : half + 1, -half : half + 1]
    kernel = (rows**2 + columns**2 <= radius**2) * 1.0
    tap = np.exp(-(np.arange(-soft, soft + 1) ** 2) / (2 * softness**2))
    kernel = ndimage.convolve(kernel / kernel.sum(), np.outer(tap, tap) / tap.sum() ** 2, mode="mirror")
    return np.stack([ndimage.correlate(x[..., c], kernel, mode="mirror") for c in range(x.shape[2])], -1)


def smeared(x, radius, sigma, angle):
    width = 2 * radius + 1
    weights = np.exp(-(np.arange(width) ** 2) / (2 * sigma**2))
    total = np.zeros_like(x)
    height, length = x.shape[:2]
    for i, weight in enumerate(weights / weights.sum()):
        down, across = (-math.ceil(i * f(math.radians(angle)) - 0.5) for f in (math.sin, math.cos))
        rows, columns = np.clip(np.arange(height) - down, 0, height - 1), np.clip(np.arange(length) - across, 0, length - 1)
        total += weight * x[rows][:, columns]
    return total


def motion_blur(x, severity, scale, rng):
    radius, sigma = constants("motion_blur", severity, scale)
    return smeared(x, radius, sigma, rng.uniform(-45, 45))


def zoomed(x, factor):
    height, width = x.shape[:2]
    h, w = math.ceil(height / factor), math.ceil(width / factor)
    top, left = (height - h) // 2, (width - w) // 2
    return ndimage.zoom(x[top : top + h, left : left + w], (factor, factor, 1), order=1)


def zoom_blur(x, severity, scale, rng):
    stop, step = constants("zoom_blur", severity, scale)
    layers = [x] + [zoomed(x, factor)[: x.shape[0], : x.shape[1]] for factor in np.arange(1, stop, step)]
    return np.mean(layers, 0)


def glass_blur(x, severity, scale, rng):
    sigma, reach, times = constants("glass_blur", severity, scale)
    x = np.floor(gaussian(x, sigma) * 255) / 255
    height, width = x.shape[:2]
    for _ in range(times):
        moves = rng.integers(-reach, reach, (height, width, 2)).tolist()
        place = list(range(height * width))
        for h in range(height - reach, reach, -1):
            for w in range(width - reach, reach, -1):
                down, across = moves[h][w]
                place[h * width + w] = place[(h + down) * width + w + across]
        x = x.reshape(height * width, -1)[place].reshape(x.shape)
    return gaussian(x, sigma)


def luminance(x):
    return x @ np.array([0.299, 0.587, 0.114]) if x.shape[2] == 3 else x[..., 0]


def snow(x, severity, scale, rng):
    mean, deviation, size, least, radius, sigma, share = constants("snow", severity, scale)
    flakes = zoomed(rng.normal(mean, deviation, (*x.shape[:2], 1)), size)
    flakes[flakes < least] = 0
    flakes = smeared(np.clip(flakes, 0, 1), radius, sigma, rng.uniform(-135, -45))[: x.shape[0], : x.shape[1]]
    x = share * x + (1 - share) * np.maximum(x, luminance(x)[..., None] * 1.5 + 0.5)
    return x + flakes + np.rot90(flakes, 2)


def plasma(size, fading, rng):
    field = np.zeros((size, size))
    step, reach = size, 100.0
    while step >= 2:
        half = step // 2
        for top in range(0, size, step):
            for left in range(0, size, step):
                far = field[(top + step) % size, left] + field[top, (left + step) % size] + field[(top + step) % size, (left + step) % size]
                field[top + half, left + half] = (field[top, left] + far) / 4 + reach * rng.uniform(-reach, reach)
        for top in range(0, size, half):
            for left in range(half if top % step == 0 else 0, size, step):
                around = ((top - half, left), (top + half, left), (top, left - half), (top, left + half))
                near = sum(field[row % size, column % size] for row, column in around)
                field[top, left] = near / 4 + reach * rng.uniform(-reach, reach)
        step, reach = half, reach / fading
    field -= field.min()
    return field / field.max()


def fog(x, severity, scale, rng):
    thickness, fading = constants("fog", severity, scale)
    size = 2 ** math.ceil(math.log2(max(x.shape[:2])))
    cloud = plasma(size, fading, rng)[: x.shape[0], : x.shape[1], None]
    return (x + thickness * cloud) * x.max() / (x.max() + thickness)


def by_pixel(x, change):
    """Apply a function of (hue, saturation, value) to every pixel."""
    return np.array([[colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*pixel))) for pixel in row] for row in x])


def brightness(x, severity, scale, rng):
    added = constants("brightness", severity, scale)
    return by_pixel(x, lambda h, s, v: (h, s, min(v + added, 1))) if x.shape[2] == 3 else x + added


def saturate(x, severity, scale, rng):
    factor, added = constants("saturate", severity, scale)
    return by_pixel(x, lambda h, s, v: (h, min(max(s * factor + added, 0), 1), v)) if x.shape[2] == 3 else x


def contrast(x, severity, scale, rng):
    mean = x.mean((0, 1))
    return (x - mean) * constants("contrast", severity, scale) + mean


def picture(x):
    pixels = np.round(x * 255).astype(np.uint8)
    return Image.fromarray(pixels if x.shape[2] == 3 else pixels[..., 0])


def pixels_of(image):
    x = np.asarray(image) / 255
    return x if x.ndim == 3 else x[..., None]


def pixelate(x, severity, scale, rng):
    share, size = constants("pixelate", severity, scale), x.shape[1::-1]
    small = picture(x).resize(tuple(int(length * share) for length in size), Image.Resampling.BOX)
    return pixels_of(small.resize(size, Image.Resampling.NEAREST))


def jpeg_compression(x, severity, scale, rng):
    file = io.BytesIO()
    picture(x).save(file, "JPEG", quality=constants("jpeg_compression", severity, scale))
    return pixels_of(Image.open(file))


def sampled(x, rows, columns, mode):
    return np.stack([ndimage.map_coordinates(x[..., c], [rows, columns], order=1, mode=mode) for c in range(x.shape[2])], -1)


def elastic_transform(x, severity, scale, rng):
    strength, smoothing, jitter = (share * x.shape[0] for share in constants("elastic_transform", severity, scale))
    rows, columns = np.mgrid[: x.shape[0], : x.shape[1]].astype(float)
    if jitter:
        reach, middle = x.shape[0] // 3, x.shape[0] // 2
        before = np.array([[middle + i * reach, middle + j * reach, 1.0] for i, j in ((1, 1), (1, -1), (-1, -1))])
        after = before[:, :2] + rng.uniform(-jitter, jitter, (3, 2))
        back = np.linalg.inv(np.vstack([np.linalg.solve(before, after).T, [0, 0, 1]]))
        across, down, _ = np.tensordot(back, np.stack([columns, rows, np.ones_like(rows)]), 1)
        x = sampled(x, down, across, "mirror")
    if not strength:
        return x
    down, across = (gaussian(rng.uniform(-1, 1, x.shape[:2]), smoothing, "reflect", 3) * strength for _ in range(2))
    return sampled(x, rows + down, columns + across, "reflect")


def canny(grey):
    """Mark the edges of grey levels: Sobel's gradient, the ridge of it, and weak parts that touch strong ones."""
    smooth, slope = [1, 2, 1], [-1, 0, 1]
    across, down = (ndimage.correlate(grey, np.outer(*pair) * 1.0, mode="nearest") for pair in ((smooth, slope), (slope, smooth)))
    size = np.abs(across) + np.abs(down)
    wide = np.pad(size, 1)
    ridge = np.zeros(grey.shape, bool)
    for h, w in zip(*np.nonzero(size > 50), strict=True):
        angle = math.degrees(math.atan2(down[h, w], across[h, w])) % 180
        i, j = (0, 1) if angle < 22.5 or angle > 157.5 else (1, 1) if angle < 67.5 else (1, 0) if angle < 112.5 else (1, -1)
        before, after = wide[h + 1 - i, w + 1 - j], wide[h + 1 + i, w + 1 + j]
        ridge[h, w] = size[h, w] > before and (size[h, w] > after if i * j else size[h, w] >= after)
    parts, _ = ndimage.label(ridge, np.ones((3, 3)))
    strong = np.unique(parts[ridge & (size > 150)])
    return ridge & np.isin(parts, strong)


def water(depth):
    """Return how strongly drops show."""
    edges = canny(depth)
    far = ndimage.distance_transform_edt(~edges) if edges.any() else np.full(depth.shape, 20.0)
    box = np.full((3, 3), 1 / 9)
    levels = np.floor(ndimage.correlate(np.minimum(far, 20), box, mode="mirror") + 1e-4).astype(int)
    first, pixels = (levels == levels.min()).sum(), levels.size
    if first < pixels:
        levels = np.round(((levels[..., None, None] >= levels).sum((2, 3)) - first) * 255 / (pixels - first))
    kernel = np.array([[-2.0, -1, 0], [-1, 1, 1], [0, 1, 2]])
    return ndimage.correlate(np.clip(ndimage.correlate(levels * 1.0, kernel, mode="mirror"), 0, 255), box, mode="mirror")


def spatter(x, severity, scale, rng):
    mean, deviation, sigma, least, strength, mud = constants("spatter", severity, scale)
    liquid = gaussian(rng.normal(mean, deviation, x.shape[:2]), sigma)
    liquid[liquid < least] = 0
    if mud:
        cover = gaussian((liquid > least) * 1.0, strength)[..., None]
        cover[cover < 0.8] = 0
        return x * (1 - cover) + cover * np.array([63, 42, 20]) / 255
    depth = np.floor(np.clip(liquid, 0, 1) * 255)
    shown = depth * water(depth)
    shown *= strength / max(shown.max(), 1e-9)
    return x + np.clip(shown[..., None] * np.array([175, 238, 238]) / 255, 0, 1)

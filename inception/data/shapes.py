"""A data set drawn by this file: ten classes that can only be told apart by looking at two scales at once.

A class is an outline (disc, ring, square, triangle or cross, about 20 pixels across) and a texture within it
(stripes or dots, about 4 pixels apart). Everything else is chance: place, size, rotation, colours, the
background's gradient, spots of clutter, noise. No single pixel says anything about the class, so a linear
classifier is near guessing; whoever sees only the texture, or only the outline, is right a fifth or half of the
time. That is what an Inception module, with its windows of several sizes side by side, is for.

Picture i depends on (seed, i) alone, not on how many are drawn.
"""

from __future__ import annotations

import math

import numpy as np

from inception.data.dataset import Dataset
from minigrad.random import Key, bits, uniform

_OUTLINES = ("disc", "ring", "square", "triangle", "cross")
_TEXTURES = ("striped", "dotted")
CLASSES = tuple(f"{texture} {outline}" for outline in _OUTLINES for texture in _TEXTURES)

_SIZE = 32  # pixels on a side
_BLOCK = 128  # pictures drawn at a time, so that the arrays stay in cache
_SPOTS = 4  # spots of clutter
_NOISE = 0.25  # from darkest to brightest, where black to white is 1
_SIDES = [(math.cos(angle), math.sin(angle)) for angle in (math.pi / 2, math.pi * 7 / 6, math.pi * 11 / 6)]

Array = np.ndarray


def load_shapes(train: int = 15000, test: int = 2000, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Draw `train` and `test` pictures, (N, 32, 32, 3), the classes in equal numbers."""
    return _draw_all(train, Key(seed).fold("shapes", "train"), "shapes train"), _draw_all(
        test, Key(seed).fold("shapes", "test"), "shapes test"
    )


def _draw_all(n: int, key: Key, name: str) -> Dataset:
    images = np.empty((n, _SIZE, _SIZE, 3), np.uint8)
    labels = np.arange(n) % len(CLASSES)
    for start in range(0, n, _BLOCK):
        block = slice(start, start + _BLOCK)
        images[block] = _draw(labels[block], key, np.arange(n)[block])
    return Dataset(images, labels, CLASSES, name)


def _draw(labels: Array, key: Key, rows: Array) -> Array:
    """The pictures numbered `rows`, each showing its class in `labels`: (N, 32, 32, 3) uint8."""
    n = len(rows)

    def chance(what: str, low: float, high: float, *shape: int) -> Array:
        """Uniform float32 in [low, high) of shape (N, *shape, 1, 1), ready to meet a grid of pixels."""
        numbers = low + (high - low) * uniform(key.fold(what), (n, *shape), rows=rows)
        return numbers.astype(np.float32)[..., None, None]

    axis = np.arange(_SIZE, dtype=np.float32) - (_SIZE - 1) / 2
    y, x = axis[:, None], axis[None, :]  # pixels from the middle of the picture

    # The three colours lie a quarter of the range apart in every channel, so all edges can be seen.
    ink = chance("ink", 0, 1, 3)  # (N, 3, 1, 1)
    paper = (ink + 0.5) % 1
    ground = (ink + np.where(chance("between", 0, 1, 3) < 0.5, 0.25, 0.75).astype(np.float32)) % 1

    slope = chance("slope", -0.008, 0.008, 3, 2)  # (N, 3, 2, 1, 1)
    picture = ground + slope[:, :, 0] * x + slope[:, :, 1] * y  # (N, 3, 32, 32)

    spot_x, spot_y = chance("spot x", -16, 16, _SPOTS), chance("spot y", -16, 16, _SPOTS)  # (N, spots, 1, 1)
    spot_radius, spot_colour = chance("spot radius", 1.5, 3.5, _SPOTS), chance("spot colour", 0, 1, _SPOTS, 3)
    for i in range(_SPOTS):
        cover = _coverage(np.hypot(x - spot_x[:, i], y - spot_y[:, i]) - spot_radius[:, i])  # (N, 32, 32)
        picture += cover[:, None] * (spot_colour[:, i] - picture)

    radius = chance("radius", 8, 12)  # (N, 1, 1)
    dx, dy = x - chance("x", -4, 4), y - chance("y", -4, 4)  # (N, 1, 32), (N, 32, 1)
    outline = np.empty((n, _SIZE, _SIZE), np.float32)
    u, v = _rotated(dx, dy, chance("outline angle", -0.3, 0.3))
    for i, distance in enumerate((_disc, _ring, _square, _triangle, _cross)):
        of_this = labels // len(_TEXTURES) == i
        outline[of_this] = distance(u[of_this], v[of_this], radius[of_this])

    u, v = _rotated(dx, dy, chance("texture angle", 0, 2 * math.pi))
    spacing = chance("spacing", 3.5, 5)
    dots = _wave(u / spacing) * _wave(v / spacing)
    texture = np.where((labels % len(_TEXTURES) == 0)[:, None, None], _wave(u / spacing), dots)
    filling = paper + texture[:, None] * (ink - paper)  # (N, 3, 32, 32)

    picture += _coverage(outline)[:, None] * (filling - picture)
    noise = bits(key.fold("noise"), (n, _SIZE * _SIZE * 3 // 8), rows=rows).view(np.uint8).reshape(picture.shape)
    picture = picture * 255 + (noise - np.float32(127.5)) * _NOISE
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def _rotated(x: Array, y: Array, angle: Array) -> tuple[Array, Array]:
    """The coordinates of the points (x, y) on axes turned by `angle` radians."""
    cos, sin = np.cos(angle), np.sin(angle)
    return cos * x + sin * y, cos * y - sin * x


def _wave(t: Array) -> Array:
    """A steep triangle wave between 0 and 1 of period 1."""
    return np.clip(4 * np.abs(t - np.rint(t)) - 0.5, 0, 1)


def _coverage(distance: Array) -> Array:
    """How much of a pixel lies inside an outline whose edge is `distance` pixels away (negative: inside)."""
    return np.clip(0.5 - distance, 0, 1)


# The signed distance in pixels from (u, v) to an outline around the origin, negative inside; r is about its radius.


def _disc(u: Array, v: Array, r: Array) -> Array:
    return np.hypot(u, v) - r


def _ring(u: Array, v: Array, r: Array) -> Array:
    return np.abs(np.hypot(u, v) - 0.75 * r) - 0.28 * r


def _square(u: Array, v: Array, r: Array) -> Array:
    return np.maximum(np.abs(u), np.abs(v)) - 0.85 * r


def _triangle(u: Array, v: Array, r: Array) -> Array:
    return np.maximum.reduce([a * u + b * v for a, b in _SIDES]) - 0.6 * r


def _cross(u: Array, v: Array, r: Array) -> Array:
    long, short = np.maximum(np.abs(u), np.abs(v)) - r, np.minimum(np.abs(u), np.abs(v)) - 0.38 * r
    return np.maximum(long, short)

"""From stored pictures to a network's input: random crops and mirror images, then normalised floats."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from minigrad import layout
from minigrad.random import Key, integers


def crop_and_flip(images: np.ndarray, key: Key, rows: np.ndarray, *, padding: int = 4) -> np.ndarray:
    """Shift each picture by up to `padding` pixels along each axis, black moving in, and mirror half of them.

        y[n, i, j] = x[n, i + dy[n] − padding, j + dx[n] − padding]    dy, dx uniform in 0 … 2·padding,

    and then j reversed if a fair coin says so.

    images   (N, H, W, 3) uint8
    key      the stream to draw from, for example one for each seed and epoch
    rows     (N,) int, each picture's index in the data set: what happens to it depends on key and index alone
    returns  (N, H, W, 3) uint8, a new array
    Source   He et al., arXiv:1512.03385, section 4.2
    """
    n, h, w, _ = images.shape
    dy, dx = integers(key.fold("crop"), 2 * padding + 1, (n, 2), rows=rows).T
    flipped = integers(key.fold("flip"), 2, n, rows=rows) == 1

    padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    windows = sliding_window_view(padded, (h, w), axis=(1, 2))  # (N, 2p+1, 2p+1, 3, H, W), a view
    crops = windows.transpose(0, 1, 2, 4, 5, 3)[np.arange(n), dy, dx]  # (N, H, W, 3)
    crops[flipped] = crops[flipped][:, :, ::-1]
    return crops


def normalise(images: np.ndarray, mean: np.ndarray, std: np.ndarray, dtype: Any = np.float32) -> np.ndarray:
    """Scale pixels to [0, 1], subtract the mean and divide by the standard deviation of each channel.

        y = x · 1/(255·std) − mean/std        one product and one sum per value, both in `dtype`

    images     (N, H, W, 3) uint8
    mean, std  (3,), of pixels in [0, 1]
    returns    (N, 3, H, W) of `dtype` in channels-last memory
    """
    n, h, w, _ = images.shape
    # A row of pixels is one long vector, so that NumPy's inner loop is not over three channels.
    scale = np.tile(1 / (255 * np.asarray(std)), w).astype(dtype)  # (W·3,)
    shift = np.tile(np.asarray(mean) / np.asarray(std), w).astype(dtype)
    y = images.reshape(n * h, w * 3) * scale
    y -= shift
    return layout.images(y.reshape(n * h * w, 3), n, h, w)

"""Patches: what each output pixel of a convolution sees, for a block of them at a time, and the way back."""

from __future__ import annotations

import numpy as np

from minigrad.kernels.numpy_.blocks import Block, Source, matrix, scratch
from minigrad.layout import Array, Window


def im2col(source: Source, window: Window, part: Block) -> Array:
    """The patches that a block's output pixels see: (pixels, KH·KW·C). The pixel matrix itself for 1×1."""
    if window.is_pointwise:
        return matrix(source(part))
    (kh, kw), (sh, sw) = window.kernel, window.stride
    band = padded(source, window, part)  # (images, rows, columns, C)
    n, _, _, c = band.shape
    count, ow = part[1].stop - part[1].start, window.output[1]
    image, row, column, channel = band.strides
    # Output pixel (i, j) of image n is the window of the band at n, i·sh, j·sw.
    shape, strides = (n, count, ow, kh, kw, c), (image, row * sh, column * sw, row, column, channel)
    windows: Array = np.ndarray(shape, band.dtype, band, 0, strides)  # as_strided, without its overhead
    patches = scratch("patches", shape, band.dtype)
    np.copyto(patches, windows)
    return patches.reshape(n * count * ow, kh * kw * c)


def col2im(patches: Array, window: Window, part: Block) -> Array:
    """Patches added up where they overlap: the band (images, rows, columns, C). The transpose of im2col."""
    (kh, kw), ow = window.kernel, window.output[1]
    (sh, sw), count = window.stride, part[1].stop - part[1].start
    cells = patches.reshape(-1, count, ow, kh, kw, patches.shape[1] // (kh * kw))
    band = np.zeros((len(cells), *padded_size(window, part), cells.shape[5]), patches.dtype)
    for u in range(kh):
        for v in range(kw):
            band[:, u : u + (count - 1) * sh + 1 : sh, v : v + (ow - 1) * sw + 1 : sw] += cells[:, :, :, u, v]
    return band


def padded(source: Source, window: Window, part: Block) -> Array:
    """The input rows that a block's windows see, zeros around them: (images, rows, columns, C), C contiguous."""
    height, width = padded_size(window, part)
    seen, there = inside(window, part)
    values = source((part[0], seen[0]))[:, :, seen[1]]
    if there == (slice(0, height), slice(0, width)) and values.flags.c_contiguous:
        return values
    band = scratch("band", (len(values), height, width, values.shape[3]), values.dtype)
    (top, bottom), (left, right) = ((part.start, part.stop) for part in there)
    band[:, :top], band[:, bottom:], band[:, :, :left], band[:, :, right:] = 0, 0, 0, 0
    band[:, *there] = values
    return band


def add_inside(dx: Array, band: Array, window: Window, part: Block) -> None:
    """Add a band's part inside the image to dx. The transpose of `padded`."""
    seen, there = inside(window, part)
    target = dx[part[0]].transpose(0, 2, 3, 1)[:, *seen]
    target += band[:, *there]


def padded_size(window: Window, part: Block) -> tuple[int, int]:
    """Rows and columns of the band that a block's windows cover."""
    (kh, kw), (sh, sw) = window.kernel, window.stride
    return (part[1].stop - part[1].start - 1) * sh + kh, (window.output[1] - 1) * sw + kw


def inside(window: Window, part: Block) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where a band lies in the image, and the image in the band: (rows, columns) of each. Both are empty where the band
    is nothing but padding."""
    (h, w), (ph, pw) = window.input, window.padding
    height, width = padded_size(window, part)
    top = part[1].start * window.stride[0] - ph
    rows = slice(min(max(top, 0), h), max(min(top + height, h), 0))
    columns = slice(0, max(min(width - pw, w), 0))
    return (rows, columns), (slice(rows.start - top, rows.stop - top), slice(pw, pw + columns.stop))

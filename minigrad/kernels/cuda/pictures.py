"""A batch of pictures made on the GPU (pictures.cu)."""

from __future__ import annotations

from minigrad.backend import array_module
from minigrad.kernels.cuda.launch import launch
from minigrad.layout import Array, images


def augment(pictures: Array, changes: Array, side: int, table: Array) -> Array:
    """Take pictures into a batch: cropped, mirrored, a square cut out, normalised, in one pass.

    pictures  (P, H, W, C) uint8
    changes   (N, 6) int32, for each picture of the batch: its number in `pictures`; pixels down and right by which its
              crop is shifted, black outside; 1 to mirror that left and right; top and left of the square
    side      of the square, pixels; 0: none
    table     (257, C): what every level becomes, and in the last row what is put into the square
    returns   (N, C, H, W) of the table's dtype
    """
    n, (_, h, w, c) = len(changes), pictures.shape
    xp = array_module(table)
    pictures, y = xp.ascontiguousarray(pictures), xp.empty((n * h, w * c), table.dtype)
    launch("pictures", "augment", table, *y.shape, pictures, changes, side, table, y, n * h, h, w, c)
    return images(y, n, h, w)

"""The kernels on the CPU: each formula as loops, compiled by Numba.

    compiled.py   how a kernel is compiled and kept; the counter from which threads take blocks
    product.py    matrix products, in tiles that stay in registers
    blocks.py     images as rows of pixels, how work is cut and spread over threads
    conv.py       convolution: im2col and products; winograd.py: 3×3 and 5×5 with fewer multiplications
    norm.py       batch norm and local response normalisation
    pool.py       maximum and mean of windows
    dense.py      products, concatenation, sums

The loss, dropout and the running statistics, which cost little, are the textbook's.

Read a kernel's loops first, then the function below it that cuts the work and hands it to `spread`.
"""

from __future__ import annotations

from minigrad.kernels.loops.conv import (
    conv2d,
    conv2d_backward,
    conv2d_dw,
    conv2d_dx,
    conv2d_statistics,
    conv_bn_relu,
    conv_bn_relu_backward,
)
from minigrad.kernels.loops.dense import add, concat, matmul
from minigrad.kernels.loops.norm import batch_norm, batch_norm_dx, lrn, lrn_dx, statistics
from minigrad.kernels.loops.pool import avg_pool, avg_pool_dx, max_pool, max_pool_dx, max_pool_winners
from minigrad.kernels.textbook import cross_entropy, dropout, move_running

__all__ = [
    "add",
    "avg_pool",
    "avg_pool_dx",
    "batch_norm",
    "batch_norm_dx",
    "concat",
    "conv2d",
    "conv2d_backward",
    "conv2d_dw",
    "conv2d_dx",
    "conv2d_statistics",
    "conv_bn_relu",
    "conv_bn_relu_backward",
    "cross_entropy",
    "dropout",
    "lrn",
    "lrn_dx",
    "matmul",
    "max_pool",
    "max_pool_dx",
    "max_pool_winners",
    "move_running",
    "statistics",
]

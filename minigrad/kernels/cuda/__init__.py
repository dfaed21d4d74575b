"""The kernels on an NVIDIA GPU: products by cuBLAS, the rest by CUDA kernels, whose sources (.cu) lie beside.

Python prepares sizes, arguments and the launch; the source has the formula. Nothing here waits for the device, nothing
is added up by atomics, and no number of blocks depends on the GPU: the same bits in every run.

    launch.py      how kernels are compiled and launched; common.h: what the sources share
    cublas.py      matrix products in place
    conv.py        convolution, alone and with batch norm and ReLU
    norm.py        sums over the pixels, batch norm, local response normalisation
    pool.py        maximum and mean of windows
    dense.py       products, concatenation, sums, dropout, loss
    pictures.py    augmentation
    optim.py       the update of all parameters in one launch
"""

from __future__ import annotations

from minigrad.kernels.cuda.conv import (
    conv2d,
    conv2d_backward,
    conv2d_dw,
    conv2d_dx,
    conv2d_statistics,
    conv_bn_relu,
    conv_bn_relu_backward,
)
from minigrad.kernels.cuda.dense import add, concat, cross_entropy, dropout, matmul
from minigrad.kernels.cuda.launch import check_usable
from minigrad.kernels.cuda.norm import batch_norm, batch_norm_dx, lrn, lrn_dx, move_running, statistics
from minigrad.kernels.cuda.optim import Together, clip
from minigrad.kernels.cuda.pictures import augment
from minigrad.kernels.cuda.pool import avg_pool, avg_pool_dx, max_pool, max_pool_dx, max_pool_winners

__all__ = [
    "Together",
    "add",
    "augment",
    "avg_pool",
    "avg_pool_dx",
    "batch_norm",
    "batch_norm_dx",
    "check_usable",
    "clip",
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

"""The kernel table: the same functions in three modules, chosen by the type of the array.

    reference   plain loops that follow the formula: the definition, and the tests' oracle
    numpy_      pixel-matrix products over blocks of images, blocks spread over threads; 3×3 and 5×5
                convolutions by way of `winograd` where that pays, which needs fewer multiplications
    cupy_       the same on an NVIDIA GPU: products by cuBLAS, the rest by the CUDA kernels in `cuda/`

What has a window, a reduction over pixels or a fused form goes through this table; elementwise code elsewhere
uses `array_module(x)` and needs no branch.

Contract. Arrays in, arrays out; no tensors. Images have shape (N, C, H, W) and any strides; results are
channels-last. The dtype (float32 or float64) of the input is the dtype of the output, except where float64 is
said. Inputs are left untouched. Results are deterministic: the same bits in every run, for any number of threads.
Sizes have been checked by the op that calls.

    conv2d(x, weight, bias, window) -> y
        (N, O, OH, OW): cross-correlation; bias (O,) or None
    conv2d_dx(dy, weight, window) -> dx
    conv2d_dw(dy, x, window, with_bias) -> dw, db
        dw (O, C, KH, KW) over the memory (O, KH, KW, C); db (O,) or None
    conv2d_backward(dy, x, weight, window, needs_dx, needs_dw, with_bias) -> dx, dw, db
        both together, None for what is not needed
    conv_bn_relu(x, weight, window, mean, var, gamma, beta, eps) -> z
        batch_norm with relu of conv2d without bias
    conv2d_statistics(x, weight, window) -> y, mean, var
        conv2d without bias, and the statistics of its result
    conv_bn_relu_backward(dzs, x, weight, window, y, mean, var, gamma, beta, eps, needs_dx) -> dx, dw, dgamma, dbeta
        batch_norm_dx of the joined dzs with relu and through statistics, then conv2d_backward of its result;
        dzs (N, Oᵢ, OH, OW), ΣOᵢ = O
    max_pool(x, window) -> y
        padding is −∞
    max_pool_winners(x, window) -> y, [across, down]
        max_pool, and where the maxima are: which cell of its row of the kernel has a row's maximum (N, C, H, OW), and
        which row of the kernel has the window's (N, C, OH, OW); int8, the first of several equals
    max_pool_dx(dy, winners, window) -> dx
        dy goes to the winner, which is the window's first maximum in row-major order (or anywhere in it if one is NaN)
    avg_pool(x, window, count_padding) -> y
        the sum of the cells inside the image over their number, or over the number inside the padded image
    avg_pool_dx(dy, window, count_padding) -> dx
    statistics(x) -> mean, var
        over N, H, W; both (C,) and float64, the variance biased
    move_running(running_mean, running_var, mean, var, n, momentum)
        in place: running ← (1 − momentum)·running + momentum·batch, of the variance var·n / (n − 1)
    batch_norm(x, mean, var, gamma, beta, eps, relu) -> y
        (x − mean) / √(var + eps) · gamma + beta, then max(0, ·) if relu
    batch_norm_dx(dy, x, mean, var, gamma, beta, eps, relu, through_statistics) -> dx, dgamma, dbeta
        mean and var are functions of x (training) or constants (evaluation)
    lrn(x, size, alpha, beta, k) -> y
        x / (k + alpha/size · Σ x²)^beta over `size` neighbouring channels
    lrn_dx(dy, x, size, alpha, beta, k) -> dx
    cross_entropy(logits, labels, smoothing) -> losses, dlogits
        (N,), and (N, K): the gradient of each row's own loss
    matmul(a, b, out) -> a @ b
        matrices (m, k) and (k, n), or stacks (S, ·, ·) of them, or one and a stack; written into `out`, whose rows are
        neighbours, unless it is None
    concat(xs) -> y
        channels side by side
    add(a, b, out) -> a + b
        gradients that meet; written into `out`, which may be a or b, unless it is None
    dropout(x, p, key, rows) -> y
        x / (1 − p), or 0 where random.uniform(key, x.shape, rows=rows) < p; the same key drops the same elements

`window` is a `minigrad.layout.Window`.

In cupy_ alone, since the host is quick enough with the formulas as they stand in `optim` and in an average of weights:

    Together(kernel, firsts): .takes(row, *arrays), .place(rows), .tell(rows), .upload(), .load(), .launch()
        sgd, rmsprop, adamw, muon or average, in place, over all parameters of a model in one launch; muon in two, with
        products in between
    clip(together, gradients, into, max_norm) -> norm
        optim.clip_by_norm in two launches

To add a kernel: a line here; plain loops in `reference`; the function in `numpy_` (and its name in numpy_/__init__.py)
and in `cupy_`, with its source in cuda/; in tests/kernel_cases.py its arguments, a second plain definition if it has a
window, and a case in ONE_OF_EACH and LARGE; then the op that calls it: see `minigrad.ops`. tests/test_kernels.py
compares all modules on every kernel that it finds here.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np

from minigrad.kernels import numpy_
from minigrad.layout import Array


def kernels(array: Array) -> ModuleType:
    """The kernel module for an array: `numpy_` for host arrays, `cupy_` for device arrays."""
    if isinstance(array, np.ndarray):
        from minigrad.kernels import loops

        return loops
    from minigrad.kernels import cupy_

    return cupy_

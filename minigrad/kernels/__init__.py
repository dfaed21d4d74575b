"""The kernel table: the same functions in three modules, chosen by where an array lies.

    textbook    the formulas on whole arrays, for NumPy and CuPy alike: read it first. It runs any network on either
                backend and needs nothing but NumPy or CuPy
    loops       on the CPU, faster: pixel-matrix products over blocks of images, blocks spread over threads
    cuda        on an NVIDIA GPU, faster: products by cuBLAS, the rest by CUDA kernels

Host arrays go to `loops` where Numba can be imported, device arrays to `cuda` where its kernels can be compiled.
Elsewhere the textbook computes, and one warning of the logger "minigrad", a line on stderr, says why. `set_kernels` and
MINIGRAD_KERNELS choose a module by name.

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
    max_pool_winners(x, window) -> y, winners
        max_pool, and a list of arrays from which the module's own max_pool_dx knows where the maxima are
    max_pool_dx(dy, winners, window) -> dx
        dy goes to the window's first maximum in row-major order (or anywhere in the window if one of its cells is NaN)
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

In `textbook` and `cuda` alone, since the host does better with one picture at a time:

    augment(pictures, changes, side, table) -> y
        pictures cropped, mirrored, with a square cut out, normalised: see cuda/pictures.py

In `cuda` alone, since slices of single arrays are quick enough on the host:

    Gather(like, sizes, starts)(arrays, into)
        copies many arrays to their places in one, in a single launch: see minigrad.arena

To add a kernel: a line here; its formula in `textbook`, the functions in `loops` and `cuda`; its arguments and a case
in tests/kernel_cases.py, its plain loops in tests/plain_loops.py; then the op that calls it: see `minigrad.ops`.
tests/test_kernels.py compares all modules on every kernel that it finds here.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from types import ModuleType

import numpy as np

from minigrad.backend import array_module, first_line
from minigrad.errors import BackendError, no_such
from minigrad.layout import Array

MODULES = {
    "textbook": "minigrad.kernels.textbook",
    "loops": "minigrad.kernels.loops",
    "cuda": "minigrad.kernels.cuda",
}

_wanted: str | None = None  # by set_kernels
_chosen: dict[type, ModuleType] = {}  # by the type of an array


def kernels(array: Array) -> ModuleType:
    """The kernel module for an array.

    Raises BackendError if array is none, or if MINIGRAD_KERNELS names a module that is unknown or cannot be used.
    """
    return _chosen.get(type(array)) or _choose(array)  # a training step asks hundreds of times


def set_kernels(name: str | None) -> None:
    """Compute with one kernel module from here on, "textbook", "loops" or "cuda"; None: see MINIGRAD_KERNELS again.

    The textbook takes every array; "loops" is for host arrays alone, "cuda" for device arrays, and arrays of the other
    kind go where they go by default.

    Raises BackendError if the name is unknown, or if the module cannot be used here.
    """
    global _wanted
    if name is not None:
        _load(_known(name))
    _wanted = name
    _chosen.clear()


def _choose(array: Array) -> ModuleType:
    """`kernels` for a type of array that has not been met before."""
    default = "loops" if array_module(array) is np else "cuda"
    wanted = _wanted
    if wanted is None and (given := os.environ.get("MINIGRAD_KERNELS")) is not None:
        wanted = _known(given, "MINIGRAD_KERNELS: ")
    module = _load(wanted) if wanted in ("textbook", default) else _load_or_textbook(default)
    _chosen[type(array)] = module
    return module


def _known(name: str, source: str = "") -> str:
    if name not in MODULES:
        raise BackendError(source + no_such("kernel module", name, MODULES))
    return name


@functools.cache  # one warning
def _load_or_textbook(name: str) -> ModuleType:
    try:
        return _load(name)
    except BackendError as error:
        logging.getLogger("minigrad").warning("minigrad computes with the slower textbook kernels: %s", error)
        return _load("textbook")


def _load(name: str) -> ModuleType:
    """A kernel module; BackendError if it cannot be used here."""
    if name == "loops":
        try:
            importlib.import_module("numba")
        except Exception as error:  # a damaged package can raise anything
            raise BackendError(
                f"Numba cannot be imported, {first_line(error)}: pip install 'inception-minigrad[fast]'"
            ) from None
    module = importlib.import_module(MODULES[name])
    if name == "cuda":
        module.check_usable()
    return module

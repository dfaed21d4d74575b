"""Normalisation: by the statistics of a batch, or by neighbouring channels."""

from __future__ import annotations

from minigrad.backend import MOVE, array_module
from minigrad.errors import BackendError, DtypeError, ShapeError
from minigrad.kernels import kernels
from minigrad.layout import Array
from minigrad.tensor import Tensor, check_alike, record


def batch_norm(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Array,
    running_var: Array,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = False,
) -> Tensor:
    """Give every channel mean beta and standard deviation gamma over the batch; optionally max(0, ·) of it.

        y = (x − μ) / √(σ² + eps) · gamma + beta          per channel, over N, H and W

    training   True: μ and σ² (biased: divided by n) are the batch's, and the running statistics move towards them,
               running ← (1 − momentum)·running + momentum·batch, in place, with the unbiased variance (n − 1).
               False: μ and σ² are the running statistics, constants for backward.

    x            (N, C, H, W)
    gamma, beta  (C,)
    running_mean, running_var   arrays (C,), no tensors: no gradient flows through them
    returns      (N, C, H, W)
    saves        x, and mean and variance of every channel (float64). Neither (x − μ)/√(σ² + eps) nor the mask of the
                 ReLU: both follow from these in one pass, and to keep one would be to keep an array of x's size more.
    raises       ShapeError if the channels differ, x is empty, or a channel has one value only in training;
                 BackendError or DtypeError if the running statistics are no arrays of floats where x is
    source       Ioffe, Szegedy: Batch normalization, arXiv:1502.03167, algorithms 1 and 2
    """
    check_alike("batch_norm", x, gamma, beta)
    if x.ndim != 4 or not (x.shape[1:2] == gamma.shape == beta.shape == running_mean.shape == running_var.shape):
        c = ", ".join(map(str, gamma.shape))
        raise ShapeError(f"batch_norm got an input of shape {x.shape}, gamma {gamma.shape} wants (N, {c}, H, W)")
    if x.size == 0:
        raise ShapeError(f"batch_norm got an empty input {x.shape}")
    check_statistics("batch_norm", x, running_mean, running_var)
    images_in, scale, shift, k = x.data, gamma.data, beta.data, kernels(x.data)
    if training:
        check_count(x.shape)
        mean, var = k.statistics(images_in)
        k.move_running(running_mean, running_var, mean, var, x.size // x.shape[1], momentum)
    else:
        wide = array_module(running_mean).float64
        mean, var = running_mean.astype(wide), running_var.astype(wide)
    y = k.batch_norm(images_in, mean, var, scale, shift, eps, relu)

    def backward(dy: Array) -> tuple[Array, Array, Array]:
        return k.batch_norm_dx(dy, images_in, mean, var, scale, shift, eps, relu, training)

    return record("batch_norm", y, (x, gamma, beta), backward)


def check_statistics(op: str, x: Tensor, *running: Array) -> None:
    """Raise where running statistics are not arrays on x's side, host or device (BackendError), or hold no floats
    (DtypeError): they are moved in place."""
    here = array_module(x.data)
    for array in running:
        if (there := array_module(array)) is not here:  # which refuses a tensor
            raise BackendError(
                f"{op} got an input of {here.__name__} and running statistics of {there.__name__}: {MOVE}"
            )
        if array.dtype.kind != "f":
            raise DtypeError(f"{op} keeps its running statistics as floats, got {array.dtype}")


def check_count(shape: tuple[int, ...]) -> None:
    """Raise ShapeError where the statistics of a batch (N, C, H, W) would be those of a single value."""
    if shape[0] * shape[2] * shape[3] < 2:
        raise ShapeError(
            f"batch_norm in training needs more than one value per channel, got input {shape}: use a batch of "
            "two or more images, or model.eval()"
        )


def local_response_norm(x: Tensor, size: int = 5, *, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    """Divide each value by what its neighbouring channels do at the same pixel.

        y[c] = x[c] / (k + alpha/size · Σ_{c − ⌊size/2⌋ ≤ d ≤ c + ⌊(size−1)/2⌋} x[d]²)^beta      clipped at the ends

    x        (N, C, H, W)
    size     channels in a sum, the middle one included
    returns  (N, C, H, W)
    saves    x
    source   Krizhevsky, Sutskever, Hinton: ImageNet classification, 2012, section 3.3, with alpha divided by size
             as Caffe and PyTorch do (TensorFlow does not)
    """
    check_alike("local_response_norm", x)
    if x.ndim != 4 or size < 1:
        raise ShapeError(f"local_response_norm wants (N, C, H, W) and a size of at least 1, got {x.shape}, size {size}")
    images_in, module = x.data, kernels(x.data)
    y = module.lrn(images_in, size, alpha, beta, k)
    return record("local_response_norm", y, (x,), lambda dy: module.lrn_dx(dy, images_in, size, alpha, beta, k))

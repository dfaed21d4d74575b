"""The loss of a classifier."""

from __future__ import annotations

from minigrad.backend import array_module, to_host
from minigrad.errors import BackendError, DtypeError, MinigradError, ShapeError
from minigrad.kernels import kernels
from minigrad.layout import Array
from minigrad.tensor import Tensor, record


def cross_entropy(logits: Tensor, labels: Array, *, label_smoothing: float = 0.0) -> Tensor:
    """The mean over the batch of −Σ_k q_k · log softmax(logits)_k.

        q_k = (1 − s)·[k = label] + s/K,   s = label_smoothing

    logits   (N, K)
    labels   array of ints (N,), in 0 … K − 1
    returns  a tensor of one element, in nats; ln K is what guessing gives
    saves    its gradient (N, K): (softmax(logits) − q) / N
    raises   ShapeError, DtypeError; MinigradError naming the row whose label is out of range
    source   label smoothing: Szegedy et al., arXiv:1512.00567, section 7
    """
    if array_module(labels) is not array_module(logits.data):
        here, there = array_module(logits.data).__name__, array_module(labels).__name__
        raise BackendError(f"cross_entropy got logits of {here} and labels of {there}: move one to the other")
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or logits.shape[0] == 0:
        raise ShapeError(f"cross_entropy got logits {logits.shape} and labels {labels.shape}, wants (N, K) and (N,)")
    if labels.dtype.kind not in "iu":
        raise DtypeError(f"cross_entropy wants whole numbers as labels, got {labels.dtype}: convert with .astype(int)")
    if not 0 <= label_smoothing < 1:
        raise MinigradError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    n, classes = logits.shape
    check_labels(labels, classes)
    losses, dlogits = kernels(logits.data).cross_entropy(logits.data, labels, label_smoothing)
    return record("cross_entropy", losses.mean(), (logits,), lambda dy: dlogits * (dy / n))


def check_labels(labels: Array, classes: int) -> None:
    """Raise MinigradError for the first label outside 0 … classes − 1. Host labels only: on a device it would
    have to wait for the GPU in every step, so there the data set's own check has to do."""
    if array_module(labels).__name__ != "numpy" or not ((labels < 0) | (labels >= classes)).any():
        return
    row = int(((to_host(labels) < 0) | (to_host(labels) >= classes)).argmax())
    raise MinigradError(
        f"cross_entropy got label {labels[row]} in row {row}, but there are {classes} classes: 0 … {classes - 1}"
    )

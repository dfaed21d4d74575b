"""The loss of a classifier."""

from __future__ import annotations

from minigrad.backend import MOVE, array_module, to_host
from minigrad.errors import BackendError, DtypeError, MinigradError, ShapeError
from minigrad.kernels import kernels
from minigrad.layout import Array
from minigrad.tensor import Tensor, check_alike, record


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
    check_alike("cross_entropy", logits)
    if isinstance(labels, (Tensor, list, tuple)):
        kind = type(labels).__name__
        raise DtypeError(f"cross_entropy wants an array of whole numbers as labels, got {kind}: use numpy.array")
    if array_module(labels) is not array_module(logits.data):
        here, there = array_module(logits.data).__name__, array_module(labels).__name__
        raise BackendError(f"cross_entropy got logits of {here} and labels of {there}: {MOVE}")
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or logits.shape[0] == 0:
        one_hot = ": labels.argmax(axis=1) makes numbers of one-hot rows" if labels.shape == logits.shape else ""
        raise ShapeError(
            f"cross_entropy got logits {logits.shape} and labels {labels.shape}, wants (N, K) and (N,){one_hot}"
        )
    if labels.dtype.kind not in "iu":
        raise DtypeError(f"cross_entropy wants whole numbers as labels, got {labels.dtype}: convert with .astype(int)")
    if not 0 <= label_smoothing < 1:
        raise MinigradError(f"label_smoothing must be from 0 to below 1, got {label_smoothing}")
    n, classes = logits.shape
    check_labels(labels, classes)
    losses, dlogits = kernels(logits.data).cross_entropy(logits.data, labels, label_smoothing)
    return record("cross_entropy", losses.mean(), (logits,), lambda dy: dlogits * (dy / n), kept=())


def check_labels(labels: Array, classes: int) -> None:
    """Raise MinigradError for the first label outside 0 … classes − 1. Host labels only: on a device it would
    have to wait for the GPU in every step, so there the data set's own check has to do."""
    if array_module(labels).__name__ != "numpy" or not ((labels < 0) | (labels >= classes)).any():
        return
    row = int(((to_host(labels) < 0) | (to_host(labels) >= classes)).argmax())
    raise MinigradError(
        f"cross_entropy got label {labels[row]} in row {row}, but the logits are of {classes} classes, 0 … "
        f"{classes - 1}: number the classes from 0, or build the network for more of them"
    )

"""minigrad: a minimal autograd framework on NumPy or CuPy, written to be read.

Reading order: tensor (the engine), layout (the pixel matrix), ops (what a layer computes), kernels (how, fast),
nn (modules), optim and schedule, gradcheck, watch and summary.
"""

from minigrad import nn, ops, optim, random, schedule
from minigrad.backend import set_backend
from minigrad.gradcheck import gradcheck
from minigrad.summary import summary
from minigrad.tensor import Tensor, no_grad, record
from minigrad.threads import num_threads, set_num_threads
from minigrad.watch import first_non_finite, layer_times, watch

__version__ = "0.1.0"

__all__ = [
    "Tensor",
    "first_non_finite",
    "gradcheck",
    "layer_times",
    "nn",
    "no_grad",
    "num_threads",
    "ops",
    "optim",
    "random",
    "record",
    "schedule",
    "set_backend",
    "set_num_threads",
    "summary",
    "watch",
]

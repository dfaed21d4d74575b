"""minigrad: a minimal autograd framework on NumPy or CuPy, written to be read.

Reading order: tensor (the engine), layout (the pixel matrix), ops (what a layer computes), kernels (how, fast),
nn (modules), optim and schedule, gradcheck, watch and summary.

The engine
    Tensor             an array with a gradient, and its arithmetic
    record             the only door to the graph: how an op, your own too, hands in its backward
    no_grad            a block in which nothing is recorded
    gradcheck          a backward against finite differences

What networks are made of (each a room of its own, see help(minigrad.ops) and so on)
    ops                convolution, pooling, normalisation, loss, …: functions of tensors
    nn                 layers and containers: ops with their parameters
    optim              SGD, RMSProp, AdamW, Muon; groups of parameters, clipping
    schedule           learning rates as pure functions of the step
    random             random numbers as a function of (key, index)

Looking at a network
    summary            shapes, parameters, multiply-adds and kept bytes of every layer
    layer_times        milliseconds of every layer, forward and backward
    watch              stop at the first op that makes NaN or Inf
    first_non_finite   run a step again to find that op

The machine
    set_backend        NumPy or CuPy, and which GPU, for the tensors made from now on
    set_precision      float32 or TF32 for products on a GPU
    set_kernels        which module of kernels computes: the textbook, or a faster one
    num_threads        how many threads work
    set_num_threads    another number: another speed, the same bits
"""

from minigrad import nn, ops, optim, random, schedule
from minigrad.backend import set_backend, set_precision
from minigrad.gradcheck import gradcheck
from minigrad.kernels import set_kernels
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
    "set_kernels",
    "set_num_threads",
    "set_precision",
    "summary",
    "watch",
]

"""The operations: functions of tensors, each with its formula, its forward pass and its backward pass.

Read `conv.py` first. Every op follows the same pattern: check the sizes, compute through a kernel, hand `record`
a closure that turns the gradient of the result into gradients of the inputs. What the closure names is what is
kept in memory until backward.

To add an op: write it in the file of its kind, elementwise parts through `layout.elementwise`, anything with a window
or a sum over pixels through a kernel (the list in `minigrad.kernels` says what that takes); name it here; give it a
gradcheck and a line in the tables of tests/test_ops.py, which see that it refuses bad input and keeps channels-last
memory. A layer for it goes to nn/layers.py, its ONNX form to inception/export.py. examples/own_op.py is the short way.
"""

from minigrad.ops.activation import dropout, log_softmax, maximum, relu, sigmoid, softmax, tanh
from minigrad.ops.conv import ConvNorm, conv2d, conv_bn_relu
from minigrad.ops.dense import concat, linear
from minigrad.ops.loss import cross_entropy
from minigrad.ops.norm import batch_norm, local_response_norm
from minigrad.ops.pool import adaptive_avg_pool2d, avg_pool2d, global_avg_pool2d, max_pool2d

__all__ = [
    "ConvNorm",
    "adaptive_avg_pool2d",
    "avg_pool2d",
    "batch_norm",
    "concat",
    "conv2d",
    "conv_bn_relu",
    "cross_entropy",
    "dropout",
    "global_avg_pool2d",
    "linear",
    "local_response_norm",
    "log_softmax",
    "max_pool2d",
    "maximum",
    "relu",
    "sigmoid",
    "softmax",
    "tanh",
]

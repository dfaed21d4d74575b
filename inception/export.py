"""A network as an ONNX graph: the ops of one forward pass as they ran, with their weights. Needs onnx.

There is no second description of the networks. One pass in evaluation is watched (minigrad.watch), each op becomes
one or a few nodes, and arrays connect them: what an op read is what another one wrote.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import chain, count
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from inception.files import replace_file
from minigrad import Tensor, nn, no_grad
from minigrad.backend import array_module, asarray, to_host
from minigrad.errors import MinigradError
from minigrad.layout import Window
from minigrad.nn import Module
from minigrad.watch import Event, each_op, untouched

_OPSET = 17


class ExportError(MinigradError):
    """A network cannot be written as ONNX."""


def export_onnx(
    path: Path, model: Module, input_shape: tuple[int, int, int], about: dict[str, Any], *, fold: bool = True
) -> None:
    """Write the network in evaluation as ONNX (opset 17, float32): input "pictures" to output "logits".

    input_shape   (C, H, W) of the pictures, fixed in the file; the batch may have any size
    about         kept in the file's metadata, as JSON under "inception": classes, how pictures are prepared
    fold          batch norm into the filters of the convolution before it, where it runs as one op with it

    Raises ExportError if onnx is absent, or an op has no counterpart; it names the layer.
    """
    onnx = _onnx()
    tracer = _Tracer(onnx, fold)
    batch = 2  # told apart from sizes of 1
    # Not all alike, so that an op which only seems to reshape is found out.
    size = math.prod(input_shape)
    ramp = (np.arange(batch * size) % 251 / 251).astype(np.float32).reshape(batch, *input_shape)
    pictures = Tensor(asarray(ramp))
    tracer.values[id(pictures.data)] = "pictures"
    tracer.kept.append(pictures.data)
    with untouched(model), no_grad(), each_op(model.eval(), tracer.see):
        logits = model(pictures)
    output = tracer.values[id(logits.data)]
    helper, FLOAT = onnx.helper, onnx.TensorProto.FLOAT
    tracer.nodes.append(helper.make_node("Identity", [output], ["logits"]))
    graph = helper.make_graph(
        tracer.nodes,
        str(about.get("model", "network")),
        [helper.make_tensor_value_info("pictures", FLOAT, ["N", *input_shape])],
        [helper.make_tensor_value_info("logits", FLOAT, ["N", *logits.shape[1:]])],
        [onnx.numpy_helper.from_array(array, name) for name, array in tracer.constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], producer_name="inception-minigrad")
    made.ir_version = 8  # of opset 17: readers refuse newer ones than they know
    helper.set_model_props(made, {"inception": json.dumps(about)})
    onnx.checker.check_model(made)
    content = made.SerializeToString()

    def write(file: BinaryIO) -> None:
        file.write(content)

    replace_file(path, write)


def _onnx() -> Any:
    try:
        import onnx
        import onnx.numpy_helper
    except ModuleNotFoundError:
        raise ExportError("writing ONNX needs onnx: pip install onnx") from None
    return onnx


class _Tracer:
    """Makes the nodes of a graph from the events of a forward pass."""

    def __init__(self, onnx: Any, fold: bool):
        self.onnx, self.fold = onnx, fold
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}
        self.values: dict[int, str] = {}  # id of an array -> its name in the graph
        self.kept: list[Any] = []  # the arrays, so that no id is used twice
        self.place = ""  # path of the layer whose nodes are being made
        self.names: set[str] = set()

    def see(self, event: Event) -> None:
        module: Any = event.module
        self.place = event.path
        if event.op == "recompute":  # what it ran has been seen, and made its result
            return
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            self._groups(event)
            return
        ops: dict[str, Callable[[Event], str]] = {
            "conv2d": self._conv,
            "conv_bn_relu": self._unit,
            "batch_norm": lambda e: self._norm(self._input(e), e.module, e.path),
            "relu": lambda e: self.node("Relu", [self._input(e)]),
            "max_pool2d": self._max_pool,
            "avg_pool2d": self._avg_pool,
            "adaptive_avg_pool2d": self._adaptive,
            "local_response_norm": self._lrn,
            "linear": self._linear,
            "concat": lambda e: self.node("Concat", self._all(e), axis=1),
            "add": lambda e: self.node("Add", self._all(e)),
            "multiply": lambda e: self.node("Mul", self._all(e)),
            "reshape": self._reshape,
            "index": self._reshape,
        }
        if event.op not in ops:
            raise ExportError(f"{event.op} in {event.place} has no counterpart in ONNX here")
        self._name(event, ops[event.op](event))

    # --- values

    def node(self, op: str, inputs: list[str], **attributes: Any) -> str:
        """Add a node with one output, both named after the layer, as "inception3a/branch1/conv/Conv"; return the name.

        Viewers draw the parts of such names as modules in modules.
        """
        place = "/".join([*filter(None, self.place.split(".")), op])
        name = next(n for n in chain([place], (f"{place}_{k}" for k in count(2))) if n not in self.names)
        self.names.add(name)
        self.nodes.append(self.onnx.helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def constant(self, name: str, array: Any) -> str:
        """An array of the graph; a name that is taken means the same array."""
        self.constants.setdefault(name, np.array(to_host(array), order="C"))
        return name

    def _name(self, event: Event, name: str) -> None:
        output = event.outputs[0][1]
        self.values[id(output)] = name
        self.kept.append(output)

    def _all(self, event: Event) -> list[str]:
        """All that the op read: results of others, or numbers such as the scale of a residual."""
        names = []
        for _, array in event.inputs:
            output = event.outputs[0][1]  # a constant has not its batch: it is a number, or one for each channel
            if id(array) not in self.values and array.ndim == output.ndim and array.shape[0] == output.shape[0]:
                raise ExportError(f"{event.op} in {event.place} reads something that no op has written")
            constant = f"{event.place}.constant_{len(self.constants)}"
            names.append(self.values.get(id(array)) or self.constant(constant, array))
        return names

    def _input(self, event: Event) -> str:
        """The first that the op read, which another has written."""
        array = event.inputs[0][1]
        if id(array) not in self.values:
            raise ExportError(f"{event.op} in {event.place} reads something that no op has written")
        return self.values[id(array)]

    # --- ops

    def _conv(self, event: Event) -> str:
        return self._convolve(self._input(event), event.module, event.path)

    def _convolve(self, x: str, conv: Any, path: str) -> str:
        given = [x, self.constant(f"{path}.weight", conv.weight.data)]
        if conv.bias is not None:
            given.append(self.constant(f"{path}.bias", conv.bias.data))
        return self.node("Conv", given, group=conv.groups, **_window(conv.kernel_size, conv.stride, conv.padding))

    def _groups(self, event: Event) -> None:
        """A convolution by groups runs as one for each; the last op joins them."""
        if event.op == "index" and id(event.inputs[0][1]) in self.values:
            self._grouped = self._input(event)
        elif event.op == "concat":
            self._name(event, self._convolve(self._grouped, event.module, event.path))

    def _unit(self, event: Event) -> str:
        unit: Any = event.module
        conv, norm, x = unit.conv, unit.batchnorm, self._input(event)
        if not self.fold:
            return self._norm(self._convolve(x, conv, f"{event.path}.conv"), norm, f"{event.path}.batchnorm")
        mean, var, gamma, beta, weight = (
            to_host(t.data).astype(np.float64)
            for t in (norm.running_mean, norm.running_var, norm.gamma, norm.beta, conv.weight)
        )
        scale = gamma / np.sqrt(var + norm.eps)
        shift = beta + ((0 if conv.bias is None else to_host(conv.bias.data)) - mean) * scale
        filters = (weight * scale[:, None, None, None]).astype(np.float32)
        given = [x, self.constant(f"{event.path}.weight", filters)]
        given.append(self.constant(f"{event.path}.bias", shift.astype(np.float32)))
        return self.node("Relu", [self.node("Conv", given, **_window(conv.kernel_size, conv.stride, conv.padding))])

    def _norm(self, x: str, norm: Any, path: str) -> str:
        names = ("gamma", "beta", "running_mean", "running_var")
        given = [self.constant(f"{path}.{name}", getattr(norm, name).data) for name in names]
        y = self.node("BatchNormalization", [x, *given], epsilon=float(norm.eps))
        return self.node("Relu", [y]) if norm.relu else y

    def _max_pool(self, event: Event) -> str:
        return self.node("MaxPool", [self._input(event)], **_pool(event))

    def _avg_pool(self, event: Event) -> str:
        module: Any = event.module
        window = _pool(event)
        starts, ends = window["pads"][:2], window["pads"][2:]
        counted = module.count_padding and any(starts)  # of what ceil mode adds at the ends nothing counts
        if counted and starts != ends:
            raise ExportError(f"{event.place}: a mean in ceil mode that counts padding has no counterpart in ONNX")
        return self.node("AveragePool", [self._input(event)], count_include_pad=int(counted), **window)

    def _adaptive(self, event: Event) -> str:
        if event.outputs[0][1].shape[2:] != (1, 1):
            raise ExportError(f"{event.place}: an adaptive pool to more than one cell has no counterpart in ONNX")
        return self.node("GlobalAveragePool", [self._input(event)])

    def _lrn(self, event: Event) -> str:
        module: Any = event.module
        if module.size % 2 == 0:
            raise ExportError(f"{event.place}: ONNX centres an even number of channels otherwise")
        options = {"alpha": module.alpha, "beta": module.beta, "bias": module.k}
        return self.node("LRN", [self._input(event)], size=module.size, **{k: float(v) for k, v in options.items()})

    def _linear(self, event: Event) -> str:
        module: Any = event.module
        given = [self._input(event), self.constant(f"{event.path}.weight", module.weight.data)]
        if module.bias is not None:
            given.append(self.constant(f"{event.path}.bias", module.bias.data))
        return self.node("Gemm", given, transB=1)

    def _reshape(self, event: Event) -> str:
        """Anything that keeps the batch and the order of the values."""
        (_, before), (_, after) = event.inputs[0], event.outputs[0]
        same = before.size == after.size and len(before) == len(after)
        if not same or not bool(array_module(after).array_equal(before.reshape(after.shape), after)):
            raise ExportError(f"{event.op} in {event.place} does more than reshape, which has no counterpart here")
        shape = np.array([0, *after.shape[1:]], np.int64)  # 0: as it comes, the batch
        name = self.constant(f"shape_{'_'.join(map(str, shape[1:]))}", shape)
        return self.node("Reshape", [self._input(event), name])


def _window(kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> dict[str, Any]:
    return {"kernel_shape": list(kernel), "strides": list(stride), "pads": [*padding, *padding]}


def _pool(event: Event) -> dict[str, Any]:
    """The window of a pool. Ceil mode becomes padding at the ends, as readers differ in what it means."""
    module: Any = event.module
    shape = event.inputs[0][1].shape[2:]
    window = Window.of(shape, module.kernel_size, module.stride, module.padding, ceil_mode=module.ceil_mode)
    sides = zip(window.output, window.stride, window.kernel, shape, window.padding, strict=True)
    ends = [max(p, (out - 1) * s + k - length - p) for out, s, k, length, p in sides]
    return {"kernel_shape": list(window.kernel), "strides": list(window.stride), "pads": [*window.padding, *ends]}

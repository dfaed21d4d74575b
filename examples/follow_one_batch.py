#!/usr/bin/env python3
"""Follow one batch from the file to the loss, and its gradient back to the stem: every op is a stop.

python examples/follow_one_batch.py                                   # all stops, on shapes drawn here
python examples/follow_one_batch.py --stop conv1                      # one stop in depth, as text and as a PNG
python examples/follow_one_batch.py --model inception_v3 --data DIR   # another network, your pictures

A stop is named by its layer, its op, or its number; `pixels` is the batch before the first layer.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import itertools
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from subject import check_classes, told

from inception.data import load_shapes, mean_and_std, normalise, open_data
from inception.models import create_model, list_models
from inception.report import drawing
from inception.training import to_tensor
from inception.weights import find_weights, load_model
from minigrad import Tensor, nn, ops
from minigrad.backend import to_host
from minigrad.errors import MinigradError
from minigrad.layout import Window, filter_matrix, pixels
from minigrad.random import Key
from minigrad.watch import Event, columns, each_op

ROOT = Path(inspect.getfile(Tensor)).parents[1]
YELLOW = "#ffe100"


class Stop:
    """One op of one layer: what came out, and the gradient that came back to it."""

    def __init__(self, number: int, event: Event, keep: bool):
        self.number, self.place, self.op, self.module = number, event.place, event.op, event.module
        y = event.outputs[0][1]
        self.shape, self.bytes = y.shape, y.nbytes
        self.mean, self.std = float(y.mean(dtype=np.float64)), float(y.std(dtype=np.float64))
        self.code = code_of(event)
        self.units = 1  # layers that this op computed at once
        self.gradient: float | None = None  # its length
        self.forward = event if keep else None  # with all arrays, for the stop that is looked at in depth
        self.backward: Event | None = None
        self.shared: Event | None = None  # backward of what it shares with the layers that ran at once with it


class Code(NamedTuple):
    """The function that an event ran, and where it stands."""

    function: Any
    place: str  # file:line of the function
    backward: int  # line of its backward


def code_of(event: Event) -> Code | None:
    """From the closure that an op has left for backward; None where nothing was recorded."""
    if event.backward is None:
        return None
    closure: Any = event.backward
    names = closure.__qualname__.split(".<locals>")[0].split(".")
    function = functools.reduce(getattr, names, sys.modules[closure.__module__])
    line = function.__code__.co_firstlineno
    place = Path(function.__code__.co_filename).relative_to(ROOT)
    return Code(function, f"{place}:{line}", closure.__code__.co_firstlineno)


def formula(function: Any) -> str:
    """The first sentence of a docstring, and the formula set off below it, if there is one."""
    lines = inspect.cleandoc(function.__doc__ or "").splitlines() or [""]
    set_off = [b.strip() for a, b in itertools.pairwise(lines) if not a and b.startswith("    ")]
    return "\n      ".join([lines[0], *set_off[:1]])


def follow(model: Any, x: Tensor, labels: np.ndarray, wanted: str | None) -> tuple[list[Stop], float]:
    """Run one training step without the update. Returns every stop on the way, and the loss."""
    stops: list[Stop] = []
    running: dict[tuple[int, str], Stop] = {}  # by the closure that will run backward, and the layer

    def see(event: Event) -> None:
        key = id(event.backward), event.path
        if event.direction == "forward":
            stop = Stop(len(stops) + 1, event, wanted in (str(len(stops) + 1), event.place, event.op))
            stop.units = 1 + sum(other == key[0] for other, _ in running if event.backward)
            for (other, _), unit in running.items():
                if other == key[0]:
                    unit.units = stop.units
            running[key] = stop
            stops.append(stop)
        elif (stop := running.get(key)) and event.inputs:
            stop.gradient = float(np.linalg.norm(to_host(event.inputs[0][1]).ravel().astype(np.float64)))
            stop.backward = event if stop.forward else None
        elif event.direction == "backward" and event.inputs:  # of what several layers share
            for (other, _), one in running.items():
                if other == key[0] and one.forward:
                    one.shared = event

    model.train()
    model.set_key(Key(0).fold("follow"))
    with each_op(model, see):
        outputs = model(x)
        *heads, logits = [outputs] if isinstance(outputs, Tensor) else outputs
        loss = ops.cross_entropy(logits, labels)
        for head in heads:
            loss = loss + ops.cross_entropy(head, labels) * 0.3
        loss.backward()
    return stops, loss.item()


def table(stops: list[Stop]) -> str:
    """A row for each stop. All columns but one are read downwards, the gradient upwards."""
    rows = [("stop", "layer", "op", "shape", "where", "result's bytes", "mean", "std", "↑ ‖gradient‖")]
    for stop in stops:
        together = f" (1 of {stop.units} at once)" if stop.units > 1 else ""
        place = stop.code.place if stop.code else "no graph"
        length = "none" if stop.gradient is None else f"{stop.gradient:.3g}"
        shape = "×".join(map(str, stop.shape)) or "1"
        numbers = f"{stop.bytes:,}", f"{stop.mean:.3f}", f"{stop.std:.3f}", length
        rows.append((str(stop.number), stop.place, stop.op + together, shape, place, *numbers))
    return f"""{columns(rows, left=5)}

shape, bytes, mean and std are of what the op makes, y (what is kept for backward: python -m inception summary);
↑ ‖gradient‖ is the length of dL/dy, which comes back to it: that column is computed, and read, from below."""


def legend(stops: list[Stop]) -> str:
    """Each op that ran: its formula, and where forward and backward stand."""
    codes = {stop.op: stop.code for stop in stops if stop.code}
    return "\n".join(
        f"  {op}: {formula(code.function)}\n      forward {code.place}, backward from line {code.backward}"
        for op, code in codes.items()
    )


# ---- One stop in depth ----


def depth(stop: Stop, picture: np.ndarray, path: Path) -> None:
    """Print what happens at a stop, and draw it."""
    forward, backward, module = stop.forward, stop.backward, stop.module
    assert forward is not None
    conv = module.conv if isinstance(module, nn.ConvNormReLU) else module
    print(f"stop {stop.number}, {stop.place}: {stop.op}\n  {formula(stop.code.function) if stop.code else ''}")
    for name, array in forward.inputs:
        print(f"  from {name}: {array.shape}, mean {array.mean():.3f}, std {array.std():.3f}")
    y = forward.outputs[0][1]
    print(f"  makes {y.shape}, {y.nbytes:,} bytes, {forward.multiply_adds:,} multiply-adds")
    if backward is not None:
        print(f"  a gradient of length {stop.gradient:.3g} comes back, and becomes")
        for name, dx in backward.outputs:
            print(f"    {np.linalg.norm(to_host(dx)):.3g} for {name} {dx.shape}")
    if stop.shared is not None:
        for name, dx in stop.shared.outputs:
            print(f"    {np.linalg.norm(to_host(dx)):.3g} for {name} {dx.shape}, from all {stop.units} units "
                  "that see it:\n      they run at once, and one product makes the sum of their parts")  # fmt: skip
    if isinstance(conv, nn.Conv2d) and stop.op in ("conv2d", "conv_bn_relu"):
        convolution(stop, conv, picture, path)
    elif y.ndim == 4:
        with drawing(path, 9, 4) as figure:
            left, right = figure.subplots(1, 2)
            given = [to_host(a) for _, a in forward.inputs if a.ndim == 4] or [to_host(y)]
            if stop.op == "concat":
                parts = np.split(to_host(y), np.cumsum([a.shape[1] for a in given])[:-1], 1)
                maps(left, given, "what comes in: some channels of each branch")
                maps(right, parts, f"what goes out: {y.shape[1]} channels in one array", MANY)
            elif stop.op == "max_pool2d":
                maps(left, given, "what comes in; red: the winner of each window", 4)
                winners(left, given[0], module, 4)
                maps(right, [to_host(y)], "what goes out", 4)
            else:
                maps(left, given, "what comes in: channels of the first picture")
                maps(right, [to_host(y)], "what goes out")
        print(f"  drawn: {path}")


def convolution(stop: Stop, conv: nn.Conv2d, picture: np.ndarray, path: Path) -> None:
    """One number of the result by hand: a patch times a filter; then what runs with the convolution as one op."""
    assert stop.forward is not None
    given = [to_host(array) for _, array in stop.forward.inputs]
    x, weight = given[:2]
    bias = given[2] if any(name.endswith("conv.bias") for name, _ in stop.forward.inputs) else None
    leaves = [Tensor(a, requires_grad=True) for a in (x, weight)]
    y = ops.conv2d(*leaves, None if bias is None else Tensor(bias), stride=conv.stride, padding=conv.padding)
    window = Window.of(x.shape[2:], weight.shape[2:], conv.stride, conv.padding)
    o, i, j = (int(k) for k in np.unravel_index(y.data[0].argmax(), y.shape[1:]))  # where a filter answers most
    patches = patch_matrix(x[:1], window)  # (OH·OW, KH·KW·C)
    row, columns_ = i * window.output[1] + j, filter_matrix(weight).T  # (KH·KW·C, O)
    total = float(patches[row].astype(np.float64) @ columns_[:, o])
    print(f"""
  As a matrix product: {patches.shape[0]} rows (an output pixel each; of one picture) of {patches.shape[1]} numbers
  (the patch it sees), times {columns_.shape[1]} columns (a filter each).
  Output pixel ({i}, {j}) is row {row}, filter {o} is column {o}; they make a sum of {patches.shape[1]} products:
    patch   {numbers(patches[row])}
    filter  {numbers(columns_[:, o])}
    sum     {total:.6f}{"" if bias is None else f" + bias {bias[o]:.6f} = {total + bias[o]:.6f}"}
    conv2d  {y.data[0, o, i, j]:.6f}""")
    results = [("convolution", y.data[:, o])]
    if stop.op == "conv_bn_relu":
        results += plain_steps(stop, leaves, y, o)
    top, left = i * window.stride[0] - window.padding[0], j * window.stride[1] - window.padding[1]
    with drawing(path, 11, 6.5) as figure:
        upper, lower = figure.subfigures(2, 1)
        one, two, three, four = upper.subplots(1, 4, width_ratios=(1, 1.6, 1, 1))
        seen = picture if x.shape[1] == 3 else x[0].mean(0)
        show(one, seen, "picture, and one window" if x.shape[1] == 3 else "mean of the channels, a window")
        box(one, left, top, window.kernel)
        first = max(0, min(row - 12, len(patches) - 24))
        show(two, patches[first : first + 24, :120], f"patch matrix, rows {first} to {first + 23}")
        box(two, 0, row - first, (1, min(120, patches.shape[1])))
        show(three, columns_[:120], f"{columns_.shape[1]} filters as columns")
        box(three, o, 0, (min(120, len(columns_)), 1))
        show(four, y.data[0, o], f"product: channel {o}")
        box(four, j, i, (1, 1))
        for axes, (name, result) in zip(np.atleast_1d(lower.subplots(1, len(results))), results, strict=True):
            axes.hist(result.ravel(), bins=40, color="#1b9e77")
            mean = round(float(result.mean()), 2) + 0.0  # no −0.00
            axes.set_title(f"{name}, {len(result)} pictures: mean {mean:.2f}, std {result.std():.2f}", size=9)
    print(f"  drawn: {path}")


def plain_steps(stop: Stop, leaves: list[Tensor], y: Tensor, o: int) -> list[tuple[str, np.ndarray]]:
    """conv_bn_relu again, op by op, forward and backward; and how far it is off."""
    assert stop.forward is not None
    assert stop.backward is not None
    gamma, beta = (Tensor(to_host(a)) for name, a in stop.forward.inputs if name.endswith(("gamma", "beta")))
    eps, mean, var = stop.module.batchnorm.eps, y.data.mean((0, 2, 3)), y.data.var((0, 2, 3))
    normal = ops.batch_norm(y, gamma, beta, mean.copy(), var.copy(), training=True, eps=eps)
    z = ops.relu(normal)
    dz = to_host(stop.backward.inputs[0][1])
    y.retain_grad(), normal.retain_grad(), z.backward(dz)
    fused = {name.rsplit(".", 1)[-1]: to_host(dx) for name, dx in stop.backward.outputs}
    off = float(np.abs(z.data - to_host(stop.forward.outputs[0][1])).max())
    dw = leaves[1].grad
    dw_off = float(np.abs(dw - fused["weight"]).max() / np.abs(dw).max())
    length = np.linalg.norm
    convolved, normed = (f"mean {a[:, o].mean():8.4f}  std {a[:, o].std():7.4f}" for a in (y.data, normal.data))
    print(f"""
  One op here: convolution, batch norm and ReLU, so that the result is read while it is in the cache. Step by step:
                    channel {o}, all pictures                 ↑ ‖gradient‖, all channels
    conv2d          {convolved}     {length(y.grad):.3g}
    statistics      μ    {mean[o]:8.4f}  σ   {np.sqrt(var[o]):7.4f}     one pair for each channel, over N, H and W
    (y − μ)/σ·γ + β {normed}     {length(normal.grad):.3g}
    max(0, ·)       mean {z.data[:, o].mean():8.4f}  std {z.data[:, o].std():7.4f}     {length(dz):.3g}
  ReLU has cut {(z.data == 0).mean():.0%} of the values, and of the gradient at the same places.
  The one op differs from these steps by {off:.1e} in its result, and by {dw_off:.1e} of the largest value in the
  gradient of its filters.""")
    if stop.units > 1:
        print(f"  {stop.units} units that see this input ran at once: their filters side by side, one product.")
    return [("normalised", normal.data[:, o]), ("after ReLU", z.data[:, o])]


def patch_matrix(x: np.ndarray, window: Window) -> np.ndarray:
    """im2col in full, (N·OH·OW, KH·KW·C): the kernels make it for a few rows at a time."""
    (kh, kw), (ph, pw), (sh, sw) = window.kernel, window.padding, window.stride
    padded = np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kh, kw), (2, 3))[:, :, ::sh, ::sw]
    # from (N, C, OH, OW, KH, KW)
    return windows.transpose(0, 2, 3, 4, 5, 1).reshape(-1, kh * kw * x.shape[1])


def pixel_matrix(x: np.ndarray, picture: np.ndarray, path: Path) -> None:
    """The batch as a matrix with a row for each pixel, beside the first picture of it."""
    matrix, (n, c, h, w) = pixels(x), x.shape
    line = h // 2
    print(f"stop pixels: the batch {x.shape} is the matrix {matrix.shape}, a row for each pixel; not a byte is moved.")
    print(f"  row {line * w} is pixel ({line}, 0) of the first picture: {numbers(matrix[line * w])}")
    print(f"  strides of the shape (N, C, H, W), in values: {tuple(s // x.itemsize for s in x.strides)}")
    with drawing(path, 9, 5) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1.4, 1))
        show(left, picture, f"the first of {n} pictures, {h}×{w}: one line of pixels")
        box(left, 0, line, (1, w))
        show(right, matrix[line * w : (line + 1) * w], f"it is {w} rows of the {n * h * w:,}×{c} matrix")
        right.set_ylabel("a row: one pixel")
        right.set_xlabel("a column: one channel")
        right.set_xticks(range(c), ["red", "green", "blue"] if c == 3 else range(c))
    print(f"  drawn: {path}")


def numbers(values: np.ndarray, most: int = 8) -> str:
    return " ".join(f"{v:.3f}" for v in values[:most]) + (f" … ({len(values)} in all)" if len(values) > most else "")


def show(axes: Any, values: np.ndarray, title: str) -> None:
    axes.imshow(values, cmap="gray", aspect="auto" if values.ndim == 2 and len(values) != len(values[0]) else "equal")
    axes.set_title(title, size=9, loc="left")
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([]), axes.set_yticks([])


def box(axes: Any, x: float, y: float, size: tuple[int, int], color: str = YELLOW) -> None:
    """A frame around cells, from the corner (x, y); size is (height, width)."""
    edges = np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]]) * (size[1], size[0]) + (x - 0.5, y - 0.5)
    axes.plot(*edges.T, color=color, linewidth=2.2, clip_on=False)


SOME, MANY = 16, 256  # channels to draw
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2")


def maps(axes: Any, arrays: list[np.ndarray], title: str, most: int = SOME) -> None:
    """Channels of the first picture of each array, side by side; several arrays have a frame of a colour each."""
    share = most // len(arrays) if most < MANY else MANY
    cells = [(i, k) for i, a in enumerate(arrays) for k in range(min(share, a.shape[1]))]
    side, (h, w), gap = grid_of(len(cells), arrays[0])
    sheet = np.full((side * (h + gap), side * (w + gap)), np.nan, np.float32)
    for n, (i, k) in enumerate(cells):
        top, left = n // side * (h + gap), n % side * (w + gap)
        sheet[top : top + h, left : left + w] = arrays[i][0, k]
        if len(arrays) > 1:
            box(axes, left, top, (h, w), COLOURS[i % len(COLOURS)])
    show(axes, sheet, title)


def grid_of(cells: int, x: np.ndarray) -> tuple[int, tuple[int, int], int]:
    """How many channels stand side by side, how large each is, and the pixels between them."""
    return int(np.ceil(cells**0.5)), x.shape[2:], max(1, x.shape[2] // 10)


def winners(axes: Any, x: np.ndarray, pool: Any, channels: int) -> None:
    """Mark, on so many channels of x as `maps` has drawn them, the pixel that wins in each window."""
    window = Window.of(x.shape[2:], pool.kernel_size, pool.stride, pool.padding, ceil_mode=pool.ceil_mode)
    (kh, kw), (ph, pw), (sh, sw), (oh, ow) = window.kernel, window.padding, window.stride, window.output
    channels = min(channels, x.shape[1])
    side, (h, w), gap = grid_of(channels, x)
    padded = np.pad(x[0], ((0, 0), (ph, ph + sh), (pw, pw + sw)), constant_values=-np.inf)  # + stride: for ceil_mode
    for n in range(channels):
        windows = np.lib.stride_tricks.sliding_window_view(padded[n], (kh, kw))[::sh, ::sw][:oh, :ow]
        best = windows.reshape(oh, ow, -1).argmax(2)
        row, column = np.arange(oh)[:, None] * sh - ph + best // kw, np.arange(ow) * sw - pw + best % kw
        axes.plot(column + n % side * (w + gap), row + n // side * (h + gap), ".", color="#D55E00", markersize=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="googlenet_small", help=f"{', '.join(list_models())} (%(default)s)")
    parser.add_argument("--weights", help="a trained model, by file or shipped name, in place of fresh weights; "
                        "--data must have its classes (googlenet_small_shapes: the default ones)")  # fmt: skip
    parser.add_argument("--data", default="shapes", help="shapes, a directory, an .npz: as for training (%(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="pictures (%(default)s)")
    parser.add_argument("--stop", help="one stop in depth: a layer, an op, a number, or `pixels`")
    parser.add_argument("--out", type=Path, default=Path("runs/follow"), help="folder for the drawing (%(default)s)")
    options = parser.parse_args()
    if options.batch < 2:
        raise MinigradError(f"--batch must be at least 2, got {options.batch}: batch norm needs several values")
    model: Any
    if options.weights:
        model, about = load_model(find_weights(options.weights))
    else:
        model, about = create_model(options.model, num_classes=10), None
    size = model.form.size.native
    train = load_shapes(options.batch, 0)[0] if options.data == "shapes" else open_data(options.data, size=size)[0]
    if about:
        check_classes(options, about, train)
    elif len(train.classes) != 10:
        model = create_model(options.model, num_classes=len(train.classes))
    images, labels = train.images[: options.batch], train.labels[: options.batch]
    h, w = images.shape[1:3]
    if (h, w) != (size, size):
        images = images[:, np.arange(size) * h // size][:, :, np.arange(size) * w // size]
    mean, std = (np.array(about["mean"]), np.array(about["std"])) if about else mean_and_std(train)
    x = to_tensor(normalise(images, mean, std))
    x.requires_grad = True
    path = options.out / f"{options.stop}.png"
    if options.stop == "pixels":
        pixel_matrix(to_host(x.data), images[0], path)
        return
    stops, loss = follow(model, x, labels, options.stop)
    if options.stop is not None:
        stop = next((stop for stop in stops if stop.forward), None)
        if stop is None:
            raise MinigradError(
                f"there is no stop {options.stop!r}: take `pixels`, a number from 1 to {len(stops)}, or a layer or "
                "op that is listed without --stop"
            )
        depth(stop, images[0], path)
        return
    files = getattr(train.images, "sources", images)[: options.batch]  # paths, or the pictures themselves
    sources = [f"{file}, {Path(file).stat().st_size:,} bytes" for file in files if isinstance(file, (str, Path))]
    print(f"{train.name}: {', '.join(sources) or 'pictures that are in memory already'}")
    print(f"  labels {', '.join(train.classes[label] for label in labels)}")
    enlarged = "" if (h, w) == (size, size) else f", brought from {h}×{w} to the network's size by repeating pixels"
    print(f"  uint8 (N, H, W, 3) = {images.shape}, {images.nbytes:,} bytes{enlarged}")
    print(f"  normalised (x/255 − mean)/std: float32 (N, 3, H, W) = {x.shape}, {x.data.nbytes:,} bytes, "
          f"mean {x.data.mean():.3f}, std {x.data.std():.3f}\n")  # fmt: skip
    print(table(stops))
    assert x.grad is not None
    n, length = len(train.classes), np.linalg.norm(x.grad)
    print(f"\nloss {loss:.4f}; a classifier that guesses among {n} has ln {n} = {np.log(n):.4f}")
    print(f"the gradient of the pixels has length {length:.3g}\n")
    print(f"The ops that ran:\n{legend(stops)}")


if __name__ == "__main__":
    sys.exit(told(main))

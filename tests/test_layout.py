"""The pixel matrix: views and their inverse, windows, and that a training step keeps to it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import fake_cupy
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minigrad
from inception.models import InceptionAux, InceptionBlock, create_model
from minigrad import Tensor, nn, ops, optim, random
from minigrad.backend import to_host
from minigrad.errors import ShapeError
from minigrad.kernels import kernels
from minigrad.layout import Window, channels_last, elementwise, empty_images, filter_matrix, images, pixels, sum_to
from minigrad.random import Key
from minigrad.tensor import watcher

sizes = st.integers(1, 12)


def channels_last_images(xp: Any, *shape: int) -> Any:
    n, c, h, w = shape
    return images(xp.asarray(random.normal(Key(2), (n * h * w, c)).astype("float32")), n, h, w)


# ---- The matrix and the images ----


def test_pixels_and_images_are_inverse_views(xp: Any) -> None:
    x = channels_last_images(xp, 2, 3, 4, 5)
    matrix = pixels(x)
    assert matrix.shape == (2 * 4 * 5, 3)
    assert xp.may_share_memory(matrix, x)
    back = images(matrix, 2, 4, 5)
    assert xp.may_share_memory(back, x)
    assert (to_host(back) == to_host(x)).all()


def test_a_row_is_a_pixel_and_a_column_a_channel() -> None:
    x = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    matrix = pixels(x)  # in C order, so that this is a copy
    assert matrix[1 * 4 * 5 + 2 * 5 + 3].tolist() == x[1, :, 2, 3].tolist()
    assert not np.shares_memory(matrix, x)


def test_filter_matrix_is_a_view_of_a_layers_weight(xp: Any) -> None:
    """Otherwise every convolution would repack its filters first."""
    weight = nn.Conv2d(3, 4, (3, 5)).weight.data
    assert filter_matrix(weight).shape == (4, 3 * 5 * 3)
    assert xp.may_share_memory(filter_matrix(weight), weight)


def test_channels_last_copies_only_what_is_not(xp: Any) -> None:
    x = channels_last_images(xp, 2, 3, 4, 5)
    assert channels_last(xp, x) is x
    c_order = xp.ascontiguousarray(x)
    y = channels_last(xp, c_order)
    assert y.transpose(0, 2, 3, 1).flags.c_contiguous
    assert (to_host(y) == to_host(x)).all()


def test_elementwise_results_are_channels_last(xp: Any) -> None:
    """With a C-ordered mask, as dropout's, NumPy alone would choose by its own rules."""
    x, mask = channels_last_images(xp, 2, 3, 4, 5), xp.ones((2, 3, 4, 5), dtype="float32")
    for y in (elementwise(xp.multiply, mask, x), elementwise(xp.multiply, x, mask)):
        assert y.transpose(0, 2, 3, 1).flags.c_contiguous


def test_empty_images_of_other_ranks_are_ordinary(xp: Any) -> None:
    assert empty_images(xp, (2, 3), "float32").shape == (2, 3)
    assert empty_images(xp, (), "float64").dtype == np.float64


shapes = st.lists(st.integers(1, 3), max_size=4).map(tuple)


@given(shapes, st.data())
def test_sum_to_undoes_a_broadcast(shape: tuple[int, ...], data: st.DataObject) -> None:
    """Any shape that broadcasts: leading axes left out, and any axes of size 1."""
    small = shape[data.draw(st.integers(0, len(shape))) :]
    small = tuple(1 if data.draw(st.booleans()) else size for size in small)
    dy = np.arange(1.0, 1 + np.prod(shape, dtype=int)).reshape(shape)
    result = sum_to(dy, small)
    assert result.shape == small
    for x in (np.zeros(small), np.ones(small)):  # ⟨dy, broadcast(x)⟩ = ⟨sum_to(dy), x⟩ defines it
        assert np.sum(dy * x) == np.sum(result * x)


# ---- Windows ----


def stops(size: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> int:
    """Move the window step by step over the padded line and count."""
    end, count, start = size + 2 * padding, 0, 0
    while start + kernel <= end or (ceil_mode and start < size + padding and start - stride + kernel < end):
        count, start = count + 1, start + stride
    return count


@given(sizes, sizes, sizes, sizes, st.integers(1, 5), st.data())
def test_window_sizes(height: int, width: int, kh: int, kw: int, stride: int, data: st.DataObject) -> None:
    ceil_mode = data.draw(st.booleans())
    ph, pw = data.draw(st.integers(0, kh // 2)), data.draw(st.integers(0, kw // 2))
    wanted = tuple(stops(*line, stride, p, ceil_mode) for line, p in (((height, kh), ph), ((width, kw), pw)))
    if 0 in wanted:
        with pytest.raises(ShapeError, match="window does not fit"):
            Window.of((height, width), (kh, kw), stride, (ph, pw), ceil_mode=ceil_mode)
    else:
        assert Window.of((height, width), (kh, kw), stride, (ph, pw), ceil_mode=ceil_mode).output == wanted


@pytest.mark.parametrize(
    ("size", "options", "output"),
    [
        (224, {"kernel": 7, "stride": 2, "padding": 3}, 112),
        (112, {"kernel": 3, "stride": 2, "ceil_mode": True}, 56),
        (112, {"kernel": 3, "stride": 2, "padding": 1}, 56),
        (14, {"kernel": 5, "stride": 3}, 4),
        (7, {"kernel": 7}, 1),
        (4, {"kernel": 3, "stride": 3, "padding": 1, "ceil_mode": True}, 2),
        (2, {"kernel": 3, "stride": 2, "ceil_mode": True}, 1),  # larger than the input, as the ends of other windows
        (5, {"kernel": 2, "stride": 3, "padding": 1, "ceil_mode": True}, 2),  # a third would start in the padding
    ],
    ids=str,
)
def test_windows_of_the_networks(size: int, options: Any, output: int) -> None:
    assert Window.of((size, size), **options).output == (output, output)


@pytest.mark.parametrize("options", [{"kernel": 0}, {"kernel": 1, "stride": 0}, {"kernel": 1, "padding": -1}], ids=str)
def test_window_options_out_of_range(options: Any) -> None:
    with pytest.raises(ShapeError, match=r"^(kernel_size|stride|padding) must be at least [01], got \("):
        Window.of((5, 5), **options)


def test_only_a_plain_1x1_is_pointwise() -> None:
    """With a stride or padding, the patch matrix is not the pixel matrix."""
    assert Window.of((4, 4), 1).is_pointwise
    for options in ({"kernel": 1, "stride": 2}, {"kernel": 1, "padding": 1}, {"kernel": (1, 3)}):
        assert not Window.of((4, 4), **options).is_pointwise


# ---- One training step ----


class Small(nn.Module):
    """An Inception block with the article's head, narrow."""

    def __init__(self) -> None:
        self.block = InceptionBlock(3, 4, 3, 4, 2, 3, 5)
        self.head = InceptionAux(16, 10, width=6, hidden=12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x))


# name -> (the network, picture size, shapes of the gradients that return from a flatten to images)
NETWORKS: dict[str, tuple[Any, int, list[tuple[int, ...]]]] = {
    "block and head": (Small, 14, [(3, 6, 4, 4)]),
    "googlenet_small": (lambda: create_model("googlenet_small", aux_logits=True, dropout=0.4), 16, [(3, 32, 4, 4)] * 2),
}


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest, xp: Any) -> tuple[nn.Module, Any, Any, list[tuple[int, ...]]]:
    """(network, pictures, labels on the same backend, gradients that a flatten leaves in C order)."""
    build, size, flattened = NETWORKS[request.param]
    with random.seeded(0):
        model = build()
    model.set_key(Key(1))
    return model, channels_last_images(xp, 3, 3, size, size), xp.asarray([1, 0, 9]), flattened


def losses(model: nn.Module, pictures: Any, labels: Any) -> Tensor:
    """The training loss, of the classifier and of all heads."""
    output = model(Tensor(pictures))
    parts = [ops.cross_entropy(logits, labels) for logits in (output if isinstance(output, tuple) else [output])]
    return sum(parts[1:], start=parts[0])


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of every array that `pixels`, or `rows` of the loops, had to copy anywhere in minigrad."""
    blocks = pytest.importorskip("minigrad.kernels.loops").blocks
    copied: list[tuple[int, ...]] = []

    def watched(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def reading(x: Any) -> Any:
            matrix = read(x)
            if not minigrad.backend.array_module(x).may_share_memory(matrix, x):
                copied.append(x.shape)
            return matrix

        return reading

    places = 0
    for info in pkgutil.walk_packages(minigrad.__path__, "minigrad."):
        module = importlib.import_module(info.name)
        for name, read in (("pixels", pixels), ("rows", blocks.rows)):
            if getattr(module, name, None) is read:
                monkeypatch.setattr(module, name, watched(read))
                places += 1
    assert places >= 4  # layout, the kernel modules, pooling
    return copied


def test_no_activation_is_copied_into_another_layout(network: Any, copies: list[tuple[int, ...]]) -> None:
    """Each such copy costs as much as a 1×1 convolution.

    The one exception: published linear layers expect the order C, H, W, so the gradient that comes back from
    the flatten in a head is in C order. The loops of the unit before it read that gradient in place.
    """
    model, pictures, labels, flattened = network
    loss = losses(model, pictures, labels)
    assert copies == []
    loss.backward()
    reads_any_order = kernels(pictures).__name__.endswith(".loops")
    assert copies == ([] if reads_any_order else flattened)
    copies.clear()  # that this test would see a copy:
    ops.adaptive_avg_pool2d(Tensor(pictures.copy("C")), 1)
    assert copies == [pictures.shape]


def test_float32_through_a_whole_step(network: Any) -> None:
    """Results of every op, gradients, running statistics, and the parameters after their update."""
    model, pictures, labels, _ = network
    seen: list[Any] = []
    token = watcher.set(lambda op, outputs, *rest: seen.extend(output.dtype for output in outputs))
    losses(model, pictures, labels).backward()
    watcher.reset(token)
    optim.SGD(model.parameters(), lr=0.1, momentum=0.9).step()
    seen += [tensor.dtype for _, tensor in [*model.named_parameters(), *model.named_buffers()]]
    seen += [parameter.grad.dtype for parameter in model.parameters()]
    assert set(seen) == {np.dtype("float32")}


def test_pictures_and_labels_are_untouched(network: Any) -> None:
    """A data set that is resident on the device hands out views of itself."""
    model, pictures, labels, _ = network
    before = to_host(pictures).copy(), to_host(labels).copy()
    losses(model, pictures, labels).backward()
    assert (to_host(pictures) == before[0]).all()
    assert (to_host(labels) == before[1]).all()


@pytest.mark.parametrize("optimizer", [optim.SGD, optim.RMSProp, optim.AdamW])
def test_a_step_never_waits_for_the_device(network: Any, xp: Any, optimizer: Any) -> None:
    """One number read back per layer, and the GPU would idle while Python catches up."""
    if xp is not fake_cupy:
        pytest.skip("only the stand-in counts")
    model, pictures, labels, _ = network
    fake_cupy.SYNCS.clear()
    losses(model, pictures, labels).backward()
    optim.clip_by_norm(model.parameters(), 1.0)
    optimizer(model.parameters(), lr=0.01).step()
    assert not fake_cupy.SYNCS
    losses(model, pictures, labels).item()
    assert sum(fake_cupy.SYNCS.values()) == 1  # and it does count


@pytest.mark.parametrize("name", NETWORKS)
def test_every_backend_computes_the_same_step(xp: Any, name: str) -> None:
    """In float64, so that only another formula would show."""
    build, size, _ = NETWORKS[name]

    def step(xp: Any) -> tuple[nn.Module, Tensor]:
        with random.seeded(0):
            model = build().astype("float64")
        model.set_key(Key(1))
        loss = losses(model, channels_last_images(xp, 3, 3, size, size).astype("float64"), xp.asarray([1, 0, 9]))
        loss.backward()
        return model, loss

    model, loss = step(xp)
    minigrad.set_backend("numpy")  # the fixture sets it back
    oracle, wanted = step(np)
    np.testing.assert_allclose(loss.item(), wanted.item(), rtol=1e-12)
    for (path, p), q in zip(model.named_parameters(), oracle.parameters(), strict=True):
        np.testing.assert_allclose(to_host(p.grad), q.grad, rtol=1e-8, atol=1e-12, err_msg=path)

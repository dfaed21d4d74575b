"""Convolution, the linear layer and concat: meanings, and every sentence they refuse with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from leaves import host

from minigrad import Tensor, ops
from minigrad.errors import DtypeError, ShapeError


def test_linear_is_a_product_and_a_bias() -> None:
    x, w, b = host(3, 5), host(4, 5, name="w"), host(4, name="b")
    np.testing.assert_allclose(ops.linear(x, w, b).data, x.data @ w.data.T + b.data, rtol=1e-13)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            [(2, 3, 5, 5), (4, 2, 3, 3)],
            r"conv2d got .* \(2, 3, 5, 5\), weight \(4, 2, 3, 3\) wants \(N, 2, H, W\)$",
        ),
        ([(3, 5, 5), (4, 3, 3, 3)], r"conv2d got an input of shape \(3, 5, 5\), weight .* wants \(N, 3, H, W\)$"),
        ([(2, 5, 5, 3), (4, 3, 3, 3)], r"\(2, 5, 5, 3\), .* move the channels with x\.transpose\(0, 3, 1, 2\)"),
        ([(2, 3, 5, 5), (4, 3, 3, 3), (3,)], r"conv2d got a bias of shape \(3,\) for 4 filters"),
        ([(2, 3, 5, 5), (4, 3, 3, 3), (4, 1)], r"conv2d got a bias of shape \(4, 1\) for 4 filters"),
        ([(2, 3, 2, 5), (4, 3, 3, 3)], r"a 3×3 window does not fit the 2×5 input with padding \(0, 0\)"),
    ],
)
def test_conv2d_says_what_does_not_fit(shapes: Any, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        ops.conv2d(*(host(*shape) for shape in shapes))


@pytest.mark.parametrize("options", [{"stride": 0}, {"padding": -1}, {"stride": (1, 0)}], ids=str)
def test_conv2d_says_which_options_are_out_of_range(options: Any) -> None:
    with pytest.raises(ShapeError, match=r"^(stride must be at least 1|padding must be at least 0), got \("):
        ops.conv2d(host(1, 1, 5, 5), host(1, 1, 3, 3), **options)


@pytest.mark.parametrize("stride", ["2", 1.5, (1, 2, 3), (1,), (1.0, 1)], ids=str)
def test_a_stride_is_a_number_or_a_pair(stride: Any) -> None:
    with pytest.raises(ShapeError, match=r"^stride must be an int or a tuple of two, \(height, width\), got"):
        ops.conv2d(host(1, 1, 5, 5), host(1, 1, 3, 3), stride=stride)


def test_conv2d_does_not_mix_dtypes() -> None:
    with pytest.raises(DtypeError, match=r"conv2d got float64 .* and float32"):
        ops.conv2d(host(1, 1, 5, 5), Tensor(np.ones((1, 1, 3, 3), "float32")))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(2, 3), (4, 5)], r"linear got an input of shape \(2, 3\), weight \(4, 5\) wants \(N, 5\)"),
        ([(2, 3, 1, 1), (4, 3)], r"linear got an input of shape \(2, 3, 1, 1\)"),
        ([(2, 3), (4, 3), (3,)], r"linear got a bias of shape \(3,\) for 4 outputs"),
        ([(0, 3), (4, 3)], r"linear got an empty input \(0, 3\)"),
        ([(2, 3), ()], r"linear got an input of shape \(2, 3\), weight \(\) wants \(N, C\)"),
    ],
)
def test_linear_says_what_does_not_fit(shapes: Any, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        ops.linear(*(host(*shape) for shape in shapes))


def test_concat_says_what_differs() -> None:
    with pytest.raises(ShapeError, match=r"concat along axis 1 got shapes that differ elsewhere: \(2, 1, 3, 4\), "):
        ops.concat([host(2, 1, 3, 4), host(2, 1, 3, 5)])
    with pytest.raises(ShapeError, match=r"concat along axis 1 got shapes that differ elsewhere: \(2, 3\), \(2,\)"):
        ops.concat([host(2, 3), host(2)])


@pytest.mark.parametrize(("shape", "axis"), [((2, 3), 2), ((2, 3), 5), ((2, 3), -3), ((), 0)], ids=str)
def test_concat_along_an_axis_that_is_not_there(shape: Any, axis: int) -> None:
    """Counted modulo the number of axes, it would join along another."""
    with pytest.raises(ShapeError, match=f"concat along axis {axis} of tensors that have {len(shape)}: "):
        ops.concat([host(*shape), host(*shape)], axis=axis)


def test_concat_of_nothing_with_something() -> None:
    parts = [host(2, 0, 3, 4), host(2, 2, 3, 4)]
    np.testing.assert_array_equal(ops.concat(parts).data, parts[1].data)
    assert ops.concat([host(0, 1, 3, 4), host(0, 2, 3, 4)]).shape == (0, 3, 3, 4)

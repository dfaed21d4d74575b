"""Pooling: meanings, and every sentence it refuses with."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from leaves import Function, Make, host

from minigrad import Tensor, ops
from minigrad.errors import ShapeError


@pytest.mark.parametrize("pool", [ops.max_pool2d, ops.avg_pool2d])
def test_pools_say_what_does_not_fit(pool: Function) -> None:
    name = pool.__name__
    with pytest.raises(ShapeError, match=rf"{name}: padding must be at most half of the kernel \(3, 3\), got \(2, 2\)"):
        pool(host(1, 1, 5, 5), 3, padding=2)
    with pytest.raises(ShapeError, match="a 7×7 window does not fit the 5×6 input"):
        pool(host(1, 1, 5, 6), 7)
    with pytest.raises(ShapeError, match=rf"{name} wants \(N, C, H, W\), none of them 0, got \(5, 5\)"):
        pool(host(5, 5), 3)


def test_the_stride_of_a_pool_is_its_kernel() -> None:
    assert ops.max_pool2d(host(1, 1, 6, 9), (2, 3)).shape == (1, 1, 3, 3)


def test_a_fully_padded_edge_never_wins() -> None:
    """Zeros as padding would beat every negative value."""
    y = ops.max_pool2d(Tensor(np.full((1, 1, 4, 4), -5.0)), 3, 2, padding=1)
    assert (y.data == -5).all()


def test_a_tie_goes_to_the_first() -> None:
    """After a ReLU most windows are all zeros; handing dy to every zero would multiply it by nine."""
    x = Tensor(np.zeros((1, 1, 3, 3)), requires_grad=True)
    ops.max_pool2d(x, 3).backward(np.ones((1, 1, 1, 1)))
    assert x.grad.ravel().tolist() == [1] + [0] * 8


@pytest.mark.parametrize(("size", "cells"), [((14, 14), (4, 4)), ((7, 5), (3, 4)), ((4, 4), (1, 1)), ((2, 3), (4, 5))])
def test_adaptive_avg_pool2d_against_plain_loops(make: Make, size: Any, cells: Any) -> None:
    """Cell i of o covers ⌊i·L/o⌋ … ⌈(i+1)·L/o⌉: at 14 to 4 the windows are 4 wide and overlap."""
    x = make(2, 3, *size)
    wanted = np.empty((2, 3, *cells))
    for i in range(cells[0]):
        for j in range(cells[1]):
            rows = slice(i * size[0] // cells[0], math.ceil((i + 1) * size[0] / cells[0]))
            columns = slice(j * size[1] // cells[1], math.ceil((j + 1) * size[1] / cells[1]))
            wanted[:, :, i, j] = x.numpy()[:, :, rows, columns].mean((2, 3))
    np.testing.assert_allclose(ops.adaptive_avg_pool2d(x, cells).numpy(), wanted, rtol=1e-13, atol=1e-15)


def test_global_avg_pool2d_is_the_mean_of_each_image() -> None:
    x = host(2, 3, 5, 4)
    np.testing.assert_allclose(ops.global_avg_pool2d(x).data, x.data.mean((2, 3), keepdims=True), rtol=1e-13)


def test_adaptive_avg_pool2d_says_what_it_takes() -> None:
    with pytest.raises(ShapeError, match=r"adaptive_avg_pool2d wants \(N, C, H, W\), none of them 0, and sizes of"):
        ops.adaptive_avg_pool2d(host(2, 3, 4, 4), 0)


def test_pools_of_no_pictures() -> None:
    for shape in ((2, 3, 0, 4), (0, 3, 4, 4)):
        with pytest.raises(ShapeError, match=r"adaptive_avg_pool2d wants \(N, C, H, W\), none of them 0, and"):
            ops.global_avg_pool2d(host(*shape))
    with pytest.raises(ShapeError, match=r"max_pool2d wants \(N, C, H, W\), none of them 0, got \(0, 3, 8, 8\)"):
        ops.max_pool2d(host(0, 3, 8, 8), 2)
    with pytest.raises(ShapeError, match=r"output_size must be an int or a tuple of two, .* got \(None, 1\)"):
        ops.adaptive_avg_pool2d(host(1, 3, 8, 8), (None, 1))  # type: ignore[arg-type]

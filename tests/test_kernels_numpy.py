"""What is particular to the NumPy kernels: Winograd's way, blocks, phases, the same bits for any number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import plain_loops
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import (
    LARGE,
    TOLERANCE,
    Case,
    arguments,
    assert_close,
    bring_all,
    call,
    expected,
)

from minigrad import threads
from minigrad.kernels import kernels, numpy_
from minigrad.kernels.numpy_ import blocks, winograd
from minigrad.layout import Window, channels_last


@pytest.mark.parametrize("k", winograd.SIZES)
def test_winograd_in_one_dimension(k: int) -> None:
    """y = Aᵀ[(Bᵀd) ⊙ (Gg)] is a convolution of six numbers with k."""
    d, g = np.arange(6) ** 1.5 - 5, np.array([0.3, -1.2, 0.7, 1.9, -0.6])[:k]
    a, b_transposed = winograd.at_points(6 - k), winograd.through_points()
    g_values = winograd.at_points(k - 1) @ g / winograd.denominators()
    np.testing.assert_allclose(a.T @ ((b_transposed @ d) * g_values), np.correlate(d, g), rtol=1e-12)


@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
@pytest.mark.parametrize("padding", [0, 1, 2, (0, 1), (0, 2)], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 5, 13, 14), (3, 2, 2, 2), (2, 4, 1, 1), (2, 1, 4, 9)], ids=str)
@pytest.mark.parametrize("k", winograd.SIZES)
def test_winograd(dtype: str, k: int, shape: tuple[int, ...], padding: Any, layout: str) -> None:
    """Tiles that stick out, tiles of nothing but padding; few channels, for which the table takes im2col."""
    if min(shape[2:]) + 2 * np.min(padding) < k:
        padding = k // 2
    case = Case("conv2d", shape, k, padding=padding)
    assert not winograd.pays(shape, case.filters, case.window)
    (y,) = call(winograd, "conv2d", bring_all(np, case.name, arguments(case), dtype, layout), dtype)
    assert_close(y, expected(case)[0], TOLERANCE[dtype])
    if np.max(padding) > k // 2:
        return
    case = case._replace(name="conv2d_backward")
    dy, x, weight, window, _, _, with_bias = bring_all(np, case.name, arguments(case), dtype, layout)
    from_dy = SimpleNamespace(
        conv2d_backward=lambda dy, *rest: winograd.conv2d_backward(partial(blocks.rows, dy), *rest)
    )
    results = call(from_dy, "conv2d_backward", [dy, x, weight, window, with_bias], dtype)
    for actual, wanted in zip(results, expected(case), strict=True):
        assert_close(actual, wanted, TOLERANCE[dtype])


def test_winograd_only_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    for name in ("conv2d", "conv2d_backward"):
        function = getattr(winograd, name)
        monkeypatch.setattr(winograd, name, lambda *args, n=name, f=function: seen.append(n) or f(*args))

    def taken(case: Case) -> list[str]:
        seen.clear()
        for name in ("conv2d", "conv2d_backward"):
            getattr(numpy_, name)(*bring_all(np, name, arguments(case._replace(name=name)), "float32"))
        return list(seen)

    case = Case("conv2d", (1, 64, 28, 28), padding=1, filters=64)
    assert taken(case) == ["conv2d", "conv2d_backward"]
    assert taken(case._replace(shape=(1, 16, 28, 28))) == []  # few channels
    assert taken(case._replace(filters=16)) == []
    assert taken(case._replace(shape=(1, 64, 7, 7))) == []  # few pixels
    assert taken(case._replace(shape=(4, 64, 28, 28), stride=2)) == []
    assert taken(case._replace(kernel=(1, 3), padding=(0, 1))) == []
    assert taken(case._replace(kernel=(3, 1), padding=(1, 0))) == []
    assert taken(case._replace(padding=2)) == ["conv2d"]  # dy is larger than x
    assert taken(case._replace(kernel=5, padding=2)) == ["conv2d", "conv2d_backward"]
    assert taken(case._replace(kernel=7, padding=3)) == []


@pytest.mark.parametrize("k", winograd.SIZES)
def test_large_cases_go_both_ways(k: int) -> None:
    cases = [case for case in LARGE if case.name == "conv2d_backward" and case.kernel == k and case.stride == 1]
    assert {winograd.pays(case.shape, case.filters, case.window) for case in cases} == {True, False}


@given(n=st.integers(1, 300), rows=st.integers(1, 130), columns=st.integers(1, 130), pixel=st.integers(4, 20_000))
def test_blocks_are_all_of_the_work_and_neither_large_nor_small(n: int, rows: int, columns: int, pixel: int) -> None:
    budget, least = 1 << 20, 256
    parts = blocks.cut(n, (rows, columns), pixel, budget, least)
    covered = np.zeros((n, rows), int)
    for part in parts:
        covered[part] += 1
    assert (covered == 1).all()
    sizes = [(images.stop - images.start) * (band.stop - band.start) * columns for images, band in parts]
    most = max(budget // pixel, least)
    assert max(sizes) <= max(most, columns)  # a row is never cut
    if len(parts) > 1:  # parts of nearly equal size, of which a whole image or row may be missing
        assert max(sizes) * pixel >= (budget // 2 - rows * columns * pixel) // 2


@given(n=st.integers(1, 100_000), c=st.integers(1, 300))
def test_blocks_of_rows_are_all_of_them(n: int, c: int) -> None:
    matrix = np.broadcast_to(np.float32(0), (n, c))
    parts = blocks.row_blocks(matrix)
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == n
    assert len({part.stop - part.start for part in parts[:-1]}) <= 1
    assert len(parts) == 1 or (parts[0].stop + 1) * c * 4 > blocks.BLOCK_BYTES // 2


@given(
    n=st.integers(1, 5000), c=st.integers(1, 70), dtype=st.sampled_from(["float32", "float64"]), narrow=st.booleans()
)
def test_column_sums(n: int, c: int, dtype: str, narrow: bool) -> None:
    matrix = (np.arange(n)[:, None] % 7 + np.arange(c + 1)).astype(dtype)  # small integers: no rounding
    matrix = matrix[:, 1:] if narrow else np.ascontiguousarray(matrix[:, 1:])
    np.testing.assert_array_equal(blocks.column_sums(matrix), matrix.sum(0))


@pytest.fixture
def restore_threads() -> Iterator[None]:
    before = threads.num_threads()
    yield
    threads.set_num_threads(before)


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_same_bits_for_any_number_of_threads(restore_threads: None, case: Case) -> None:
    args = bring_all(np, case.name, arguments(case), "float32")
    module = kernels(np.zeros(1))
    runs = []
    for count in (1, 2, 5):
        threads.set_num_threads(count)
        runs.append(call(module, case.name, args, "float32"))
    for first, second, third in zip(*runs, strict=True):
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(first, third)


@pytest.mark.parametrize("budget", [1 << 20, 512])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (5, 2)])
def test_pools_in_phases_and_bands(
    monkeypatch: pytest.MonkeyPatch, budget: int, stride: int, kernel: int, padding: int
) -> None:
    """Whole images and bands of them, odd and narrow ones, with ties."""
    monkeypatch.setattr(numpy_.pool, "BLOCK_BYTES", budget)
    random = np.random.default_rng(stride)
    for size in ((7, 9), (12, 5), (5, 6), (30, 31)):
        window = Window.of(size, kernel, stride, padding)
        x = channels_last(np, random.integers(0, 4, (3, 5, *size)).astype(np.float64))
        y, winners = numpy_.max_pool_winners(x, window)
        dy = channels_last(np, random.standard_normal(y.shape))
        best, first = plain_loops.max_pool_winners(x, window)
        np.testing.assert_array_equal(y, best)
        found = numpy_.max_pool_dx(dy, winners, window)
        np.testing.assert_allclose(found, plain_loops.max_pool_dx(dy, first, window), atol=1e-12)
        ours, plain = (k.avg_pool_dx(dy, window, False) for k in (numpy_, plain_loops))
        np.testing.assert_allclose(ours, plain, atol=1e-12)


def test_a_heavy_product_of_few_bytes_is_shared() -> None:
    light, heavy = (blocks.cut(16, (7, 7), 512, blocks.PATCH_BYTES, multiply_adds=n) for n in (0, 200_000))
    assert len(light) == 1
    assert len(heavy) == 4  # of 256 pixels at most

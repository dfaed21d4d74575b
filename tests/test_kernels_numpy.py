"""What is particular to the NumPy kernels: Winograd's way, and the same bits for any number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
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
from minigrad.kernels.numpy_ import winograd


@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
@pytest.mark.parametrize("padding", [0, 1, 2, (0, 1), (0, 2)], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 5, 13, 14), (3, 2, 2, 2), (2, 4, 1, 1), (2, 1, 4, 9)], ids=str)
def test_winograd(dtype: str, shape: tuple[int, ...], padding: Any, layout: str) -> None:
    """Tiles that stick out, tiles of nothing but padding; few channels, for which the table takes im2col."""
    if min(shape[2:]) + 2 * np.min(padding) < 3:
        padding = 1
    case = Case("conv2d", shape, padding=padding)
    assert not winograd.pays(shape, case.filters, case.window)
    (y,) = call(winograd, "conv2d", bring_all(np, case.name, arguments(case), dtype, layout), dtype)
    assert_close(y, expected(case)[0], TOLERANCE[dtype])
    if np.max(padding) > 1:
        return
    case = case._replace(name="conv2d_backward")
    dy, x, weight, window, _, _, with_bias = bring_all(np, case.name, arguments(case), dtype, layout)
    results = call(winograd, "conv2d_backward", [dy, x, weight, window, with_bias], dtype)
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
    assert taken(case._replace(shape=(1, 32, 28, 28))) == []  # few channels
    assert taken(case._replace(filters=32)) == []
    assert taken(case._replace(shape=(1, 64, 7, 7))) == []  # few pixels
    assert taken(case._replace(stride=2)) == []
    assert taken(case._replace(kernel=(1, 3), padding=(0, 1))) == []


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

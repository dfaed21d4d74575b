"""Matrix products by cuBLAS: how minigrad asks for them, here of a cuBLAS that runs on the CPU (cublas_on_cpu.py)."""

from __future__ import annotations

import ctypes
import itertools
import threading
import types
from collections.abc import Iterator
from typing import Any

import cublas_on_cpu
import fake_cupy
import numpy as np
import pytest
from kernel_cases import TOLERANCE, assert_close, data

from minigrad import Tensor, ops
from minigrad.backend import set_precision, to_host
from minigrad.errors import BackendError, ShapeError
from minigrad.kernels.cuda import cublas
from minigrad.kernels.cuda.cublas import product
from minigrad.layout import empty_images

on_cupy = pytest.mark.parametrize("xp", ["fake_cupy", pytest.param("cupy", marks=pytest.mark.gpu)], indirect=True)
on_fake = pytest.mark.parametrize("xp", ["fake_cupy"], indirect=True)

SIZES = (1, 2, 7, 13)
HOLE = 3  # values between the lines of a matrix that is part of a wider one


def lay(xp: Any, host: np.ndarray, how: str) -> Any:
    """A matrix, or a stack, on the device: in rows or in columns, alone or part of a wider one full of NaN."""
    host = host.swapaxes(-1, -2) if "columns" in how else host
    *stack, lines, length = host.shape
    around = np.full((*stack, lines + 1, length + HOLE) if "wide" in how else host.shape, np.nan, host.dtype)
    around[..., :lines, :length] = host
    there = xp.asarray(around)[..., :lines, :length]
    return there.swapaxes(-1, -2) if "columns" in how else there


LAYOUTS = ("rows", "columns", "wide rows", "wide columns")


@on_cupy
@pytest.mark.parametrize(("of_a", "of_b"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_every_layout_and_size(xp: Any, dtype: str, of_a: str, of_b: str) -> None:
    for m, k, n in itertools.product(SIZES, SIZES, SIZES):
        a, b, c = (data(name, size).astype(dtype) for name, size in (("a", (m, k)), ("b", (k, n)), ("c", (m, n))))
        for of_c, accumulate in itertools.product(("rows", "wide rows"), (False, True)):
            out = lay(xp, c if accumulate else np.full_like(c, np.nan), of_c)
            left, right = lay(xp, a, of_a), lay(xp, b, of_b)
            assert product(left, right, out, accumulate) is out
            wanted = a.astype(float) @ b + (c if accumulate else 0)
            assert_close(to_host(out), wanted, TOLERANCE[dtype])
            np.testing.assert_array_equal(to_host(left), a)
            np.testing.assert_array_equal(to_host(right), b)


@on_cupy
def test_what_lies_between_the_rows_of_the_result_stays(xp: Any, dtype: str) -> None:
    for shape in ((5, 4), (3, 5, 4)):
        around = xp.full((*shape[:-2], 6, 7), 8.0, dtype)
        a = xp.ones((*shape[:-1], 2), dtype)
        product(a, xp.ones((2, 4), dtype), around[..., :5, 1:5])
        wanted = np.full(around.shape, 8.0)
        wanted[..., :5, 1:5] = 2
        np.testing.assert_array_equal(to_host(around), wanted)


@on_cupy
@pytest.mark.parametrize("single", ["a", "b", "neither"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_stacks(xp: Any, dtype: str, single: str, layout: str) -> None:
    for s, m, k, n in ((1, 2, 3, 4), (5, 4, 3, 2), (3, 1, 7, 5), (4, 6, 1, 1), (2, 1, 1, 9)):
        a = data("a", (m, k) if single == "a" else (s, m, k)).astype(dtype)
        b = data("b", (k, n) if single == "b" else (s, k, n)).astype(dtype)
        c = data("c", (s, m, n)).astype(dtype)
        for accumulate in (False, True):
            out = lay(xp, c, "wide rows")
            product(lay(xp, a, layout), lay(xp, b, layout), out, accumulate)
            assert_close(to_host(out), a.astype(float) @ b + accumulate * c, TOLERANCE[dtype])


@on_cupy
def test_what_has_no_neighbours_is_copied(xp: Any) -> None:
    """Every second number, a reversed matrix, one row or one column for all: no strides that cuBLAS knows."""
    a, b = data("a", (6, 8)), data("b", (8, 6))
    there, other = xp.asarray(a), xp.asarray(b)
    for left, right in (
        (there[:, ::2], b[:4]),
        (there[::-1], b),
        (there[::2, ::2], b[:4]),
        (xp.broadcast_to(there[:1], (6, 8)), b),
        (xp.broadcast_to(there[:, :1], (6, 8)), b),
    ):
        out = product(left, other[: len(right)], xp.empty((len(left), 6)))
        np.testing.assert_allclose(to_host(out), to_host(left) @ right, rtol=1e-12)


@on_cupy
def test_what_has_neighbours_is_read_where_it_is(xp: Any) -> None:
    wide = xp.ones((6, 8))
    for x in (wide[:, 2:5], wide[::2], wide[::2, 3:4], wide[:, ::5][:, :1], wide[:1, ::3].T, wide[4:5, 1:], wide[::6]):
        for matrix in (x, x.T):
            assert cublas.operand(matrix.shape, matrix.strides, 8, False) is not None, (x.shape, x.strides)


@on_cupy
def test_nothing_to_add_up(xp: Any) -> None:
    for m, k, n in ((3, 0, 4), (0, 2, 4), (3, 2, 0)):
        out = xp.ones((m, n), np.float32)
        a, b = xp.ones((m, k), np.float32), xp.ones((k, n), np.float32)
        np.testing.assert_array_equal(to_host(product(a, b, out, accumulate=True)), np.ones((m, n)))
        np.testing.assert_array_equal(to_host(product(a, b, out)), np.zeros((m, n)))


@on_fake
@pytest.mark.parametrize(
    ("a", "b", "out"),
    [
        ((2, 3), (4, 5), (2, 5)),
        ((2, 3), (3, 5), (5, 2)),
        ((4, 2, 3), (3, 5), (2, 5)),
        ((4, 2, 3), (2, 3, 5), (4, 2, 5)),
    ],
)
def test_sizes_that_do_not_fit(xp: Any, a: Any, b: Any, out: Any) -> None:
    with pytest.raises(ShapeError, match="a product of float64 "):
        product(xp.ones(a), xp.ones(b), xp.ones(out))


@on_fake
def test_dtypes_and_places_that_do_not_fit(xp: Any) -> None:
    a = xp.ones((3, 3), np.float32)
    for left, right, out in ((a, a, a.astype("f8")), (a.astype("f8"), a, a), (a, a.astype("f8"), a)):
        with pytest.raises(ShapeError, match=r"float64 \(3, 3\)"):
            product(left, right, out)
    half = a.astype(np.float16)
    with pytest.raises(ShapeError, match="float16"):
        product(half, half, half)
    for out in (xp.ones((3, 3), np.float32).T, xp.ones((3, 6), np.float32)[:, ::2]):
        with pytest.raises(ShapeError, match="cannot be written into"):
            product(a, a, out)
    endless = xp.lib.stride_tricks.as_strided(a, (2**31, 1), (4, 4))
    with pytest.raises(ShapeError, match="no more than 2147483647 rows"):
        product(a[:1, :1], endless.T, endless.T)


@on_cupy
def test_tf32_keeps_three_digits_and_leaves_float64_alone(xp: Any) -> None:
    """The same product in float32, in TF32 and in float64: rounding of that size, in whole and in stacks. Small
    products cuBLAS computes in float32 whatever it is asked for."""
    for shape in ((256, 192), (3, 256, 192)):
        a, b = data("a", shape), data("b", (192, 128))
        errors = {}
        for precision in ("float32", "tf32"):
            set_precision(precision)
            for dtype in ("float32", "float64"):
                out = xp.empty((*shape[:-1], 128), dtype)
                product(xp.asarray(a.astype(dtype)), xp.asarray(b.astype(dtype)), out)
                errors[precision, dtype] = np.abs(to_host(out) - a @ b).max() / np.abs(a @ b).max()
        assert errors["float32", "float32"] < 1e-6
        assert 5e-5 < errors["tf32", "float32"] < 2e-3
        assert max(errors["float32", "float64"], errors["tf32", "float64"]) < 1e-14


# ---- The library ----


@on_fake
def test_a_wrong_argument_is_refused_on_the_host(xp: Any) -> None:
    gemm = cublas.library(xp).cublasGemmEx
    right: list[Any] = [1, 0, 0, 1, 1, 1, None, None, 0, 1, None, 0, 1, None, None, 0, 1, 68, -1]
    assert len(right) == len(gemm.argtypes)
    assert gemm(*right) != 0
    for position, wrong in ((3, 1.0), (7, np.ones(3)), (9, np.float32(1)), (12, None)):
        with pytest.raises((ctypes.ArgumentError, TypeError)):
            gemm(*right[:position], wrong, *right[position + 1 :])
    with pytest.raises(TypeError, match="at least 19 arguments"):
        gemm(*right[:-1])


def test_signatures_are_those_of_the_header() -> None:
    """cublas_on_cpu.py writes them down a second time."""
    for name, types_ in cublas.SIGNATURES.items():
        assert type(getattr(cublas_on_cpu.library, name))._argtypes_ == types_, name


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Replace functions of cuBLAS; what was cached of it is forgotten before and after."""

    def replace(**functions: Any) -> None:
        whole = {name: getattr(cublas_on_cpu.library, name) for name in cublas.SIGNATURES}
        left = {name: f for name, f in (whole | functions).items() if f is not None}
        monkeypatch.setattr(cublas, "load", lambda xp: types.SimpleNamespace(**left))
        forget()

    def forget() -> None:
        cublas.library.cache_clear()
        cublas.session.cache_clear()

    yield replace
    forget()


def returning(status: int, *signature: Any) -> Any:
    return ctypes.CFUNCTYPE(ctypes.c_int, *signature)(lambda *_: status)


@on_fake
@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("cublasCreate_v2", 3, r"cuBLAS: cublasCreate_v2 failed with status 3 \(out of memory\): lower the batch size"),
        ("cublasSetStream_v2", 1, r"cuBLAS: cublasSetStream_v2 failed with status 1 \(not initialised\)$"),
        ("cublasSetWorkspace_v2", 7, r"cuBLAS: cublasSetWorkspace_v2 failed with status 7 \(a wrong argument\)$"),
        ("cublasGemmEx", 13, r"cuBLAS: cublasGemmEx of float32 \(2, 3\) and \(3, 4\).* failed with status 13 \(failed"),
        ("cublasGemmEx", 99, r"status 99 \(unknown\)$"),
    ],
)
def test_a_status_is_told(xp: Any, broken: Any, name: str, status: int, words: str) -> None:
    broken(**{name: returning(status, *cublas.SIGNATURES[name])})
    a, b = xp.ones((2, 3), np.float32), xp.ones((3, 4), np.float32)
    for _ in range(2):  # nothing of it is remembered
        with pytest.raises(BackendError, match=words):
            product(a, b, xp.ones((2, 4), np.float32))


@on_fake
def test_a_library_that_is_missing_or_lacks_a_function(xp: Any, broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a = xp.ones((2, 2))
    broken(cublasSetWorkspace_v2=None)
    with pytest.raises(BackendError, match=r"cublasSetWorkspace_v2.*pip install 'cupy-cuda13x\[ctk\]'") as caught:
        product(a, a, a)
    assert "\n" not in str(caught.value)

    def load(xp: Any) -> Any:
        raise ImportError('Failure finding "libcublasLt.so.13"\n  listdir("/somewhere")')

    monkeypatch.setattr(cublas, "load", load)
    cublas.library.cache_clear()
    with pytest.raises(BackendError, match=r"cannot be used, ImportError \(Failure finding.*: install CuPy") as caught:
        product(a, a, a)
    assert "\n" not in str(caught.value)


@on_fake
def test_a_thread_on_another_gpu_is_told(xp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS would read memory that is out of its reach, which ends CUDA for the process."""
    a, b, out = xp.ones((2, 2)), xp.ones((2, 2)), xp.empty((2, 2))
    monkeypatch.setattr(xp.cuda.runtime, "current", 1)
    with pytest.raises(BackendError, match=r"a product on GPU 1 of arrays that lie on GPU 0: .*device=0"):
        product(a, b, out)


@on_fake
def test_one_handle_and_one_workspace_for_each_thread_and_stream(xp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = xp.ones((2, 2)), xp.ones((2, 2))
    cublas.session.cache_clear()
    cublas_on_cpu.SESSIONS.clear()

    def work() -> None:
        for stream in (7, 8, 7):
            monkeypatch.setattr(xp.cuda, "get_current_stream", lambda stream=stream: types.SimpleNamespace(ptr=stream))
            product(a, b, xp.empty((2, 2)))

    work()
    other = threading.Thread(target=work)
    other.start()
    other.join()
    sessions = cublas_on_cpu.SESSIONS.values()
    assert sorted(session.stream for session in sessions) == [7, 7, 8, 8]
    assert len({session.workspace for session in sessions}) == 4
    assert {session.workspace[1] for session in sessions} == {cublas.WORKSPACE}
    cublas.session.cache_clear()


@on_fake
def test_no_product_goes_past_this_room(xp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy's own cannot be recorded into a graph: one of each op that multiplies, forward and backward."""

    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("a product by CuPy")

    for name in ("matmul", "dot", "einsum", "tensordot", "inner", "outer", "vdot"):
        monkeypatch.setattr(fake_cupy, name, refused, raising=False)
    for name in ("__matmul__", "__rmatmul__", "dot"):
        monkeypatch.setattr(fake_cupy.ndarray, name, refused, raising=False)
    cublas_on_cpu.CALLS.clear()
    images = empty_images(xp, (2, 4, 5, 5), np.float32)
    images[...] = 1
    x = Tensor(images, requires_grad=True)
    filters = Tensor(xp.ones((6, 4, 1, 1), np.float32), requires_grad=True)
    weight = Tensor(xp.ones((3, 6), np.float32), requires_grad=True)
    pooled = ops.global_avg_pool2d(ops.conv2d(x, filters)).flatten()
    (ops.linear(pooled, weight) @ Tensor(xp.ones((3, 2), np.float32), requires_grad=True)).sum().backward()
    assert cublas_on_cpu.CALLS.count("product float32") == 9  # convolution, linear layer and @, forward and twice back
    assert cublas_on_cpu.CALLS.count("stack of products float32") == 2
    assert filters.grad is not None

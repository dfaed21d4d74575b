"""What is particular to the compiled kernels: Winograd's way, blocks, the same bits for any number of threads, how
compiled code is kept, and the same source under the plain interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
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

from minigrad import Tensor, nn, threads, watch
from minigrad.errors import NonFiniteError
from minigrad.layout import Window, channels_last
from minigrad.random import Key, normal

loops = pytest.importorskip("minigrad.kernels.loops")
from minigrad.kernels.loops import blocks, conv, norm, pool, product, winograd  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"} | variables
    code = textwrap.dedent(code)
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


# ---- Winograd ----


@pytest.mark.parametrize("k", winograd.SIZES)
def test_winograd_in_one_dimension(k: int) -> None:
    """y = Aᵀ[(Bᵀd) ⊙ (Gg)] is a convolution of six numbers with k."""
    d, g = np.arange(6) ** 1.5 - 5, np.array([0.3, -1.2, 0.7, 1.9, -0.6])[:k]
    tile = np.repeat(d, winograd.V)  # the same numbers for every channel
    winograd.seen_across(tile, 0)
    tile *= np.repeat(winograd.G[k, "float64"] @ g, winograd.V)
    winograd.made_across[7 - k](tile, 0)
    np.testing.assert_allclose(tile[:: winograd.V][: 7 - k], np.correlate(d, g), rtol=1e-12)


@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
@pytest.mark.parametrize("padding", [0, 1, 2, (0, 1), (0, 2)], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 5, 13, 14), (3, 2, 2, 2), (2, 4, 1, 1), (2, 35, 4, 9)], ids=str)
@pytest.mark.parametrize("k", winograd.SIZES)
def test_winograd(dtype: str, k: int, shape: tuple[int, ...], padding: Any, layout: str) -> None:
    """Tiles that stick out, tiles of nothing but padding; few channels, for which the table takes im2col."""
    if min(shape[2:]) + 2 * np.min(padding) < k:
        padding = k // 2
    case = Case("conv2d", shape, k, padding=padding)
    assert not winograd.pays(shape, case.filters, case.window)
    x, weight, bias, window = bring_all(np, case.name, arguments(case), dtype, layout)
    affine = np.stack((np.ones_like(bias), bias))
    assert_close(winograd.convolved(x, weight, affine, False, window, False), expected(case)[0], TOLERANCE[dtype])
    if np.max(padding) > k // 2:
        return
    case = case._replace(name="conv2d_backward")
    dy, x, weight, window, *_ = bring_all(np, case.name, arguments(case), dtype, layout)
    scale = np.ones(len(weight), dtype)
    results = winograd.gradients(dy, dy, norm.none(x.dtype), scale, x, weight, window)
    for actual, wanted in zip(results, expected(case), strict=False):
        assert_close(actual, wanted, TOLERANCE[dtype])


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Any:
    """taken(case): the functions of winograd that conv2d and conv2d_backward call."""
    seen: list[str] = []
    for name in ("convolved", "gradients"):
        function = getattr(winograd, name)
        monkeypatch.setattr(winograd, name, lambda *args, n=name, f=function: seen.append(n) or f(*args))

    def taken(case: Case) -> list[str]:
        seen.clear()
        for name in ("conv2d", "conv2d_backward"):
            getattr(loops, name)(*bring_all(np, name, arguments(case._replace(name=name)), "float32"))
        return list(seen)

    return taken


def test_winograd_only_where_it_pays(taken: Any) -> None:
    case = Case("conv2d", (1, 64, 28, 28), padding=1, filters=64)
    assert taken(case) == ["convolved", "gradients"]
    assert taken(case._replace(shape=(1, 8, 28, 28))) == []  # few channels
    assert taken(case._replace(filters=8)) == []
    assert taken(case._replace(shape=(1, 64, 6, 6))) == []  # few pixels
    assert taken(case._replace(shape=(4, 64, 28, 28), stride=2)) == []
    assert taken(case._replace(kernel=(1, 3), padding=(0, 1))) == []
    assert taken(case._replace(kernel=(3, 1), padding=(1, 0))) == []
    assert "gradients" not in taken(case._replace(padding=2))  # dy is larger than x
    assert taken(case._replace(kernel=5, padding=2)) == ["convolved", "gradients"]
    assert taken(case._replace(kernel=7, padding=3)) == []


def test_winograd_can_be_switched_off(taken: Any) -> None:
    case = Case("conv2d", (1, 64, 28, 28), padding=1, filters=64)
    winograd.use(False)
    try:
        assert taken(case) == []
    finally:
        winograd.use(True)
    asks = "from minigrad.kernels.loops import winograd; print(winograd.enabled)"
    assert [python(asks, MINIGRAD_WINOGRAD=on).stdout for on in ("0", "1", "")] == ["False\n", "True\n", "True\n"]


@pytest.mark.parametrize("k", winograd.SIZES)
def test_large_cases_go_both_ways(k: int) -> None:
    cases = [case for case in LARGE if case.name == "conv2d_backward" and case.kernel == k and case.stride == 1]
    assert {winograd.pays(case.shape, case.filters, case.window) for case in cases} == {True, False}


def test_a_nan_is_found_in_the_layer_where_it_began() -> None:
    """Winograd spoils a whole tile, and later layers more of it; the layer is still the first."""
    model = nn.Sequential(nn.Conv2d(48, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 48, 3, padding=1))
    assert winograd.pays((2, 48, 28, 28), 48, Window.of((28, 28), 3, 1, 1))
    x = Tensor(normal(Key(1), (2, 48, 28, 28)).astype("float32"))
    model[2].weight.data[3, 5, 1, 1] = np.inf
    with pytest.raises(NonFiniteError, match=r"^2: conv2d \(forward\)"), watch(model):
        model(x)
    model[0].weight.data[3, 5, 1, 1] = np.nan
    with pytest.raises(NonFiniteError, match=r"^0: conv2d \(forward\)"), watch(model):
        model(x)


# ---- Blocks ----


@given(count=st.integers(0, 10_000), least=st.integers(0, 8), most=st.integers(1, 10_000))
def test_blocks_are_shared_evenly(count: int, least: int, most: int) -> None:
    found = blocks.rounded(count, least, most)
    assert min(max(count, least, 1), most) <= found <= most
    assert found == most or found in (1, 2, 4) or found % blocks.LANES == 0
    assert found <= max(2 * max(count, least, 1), 1)


@given(total=st.integers(1, 5000), width=st.integers(1, 300), size=st.integers(4, 20_000), cost=st.integers(1, 10**6))
def test_a_block_of_rows_stays_in_the_cache(total: int, width: int, size: int, cost: int) -> None:
    step = blocks.block_rows(total, width, size, cost)
    assert 1 <= step <= total
    assert step == 1 or (step - 1) * width * size <= blocks.BLOCK_BYTES


@pytest.mark.parametrize("layout", ["channels_last", "c_order", "sliced", "reversed"])
def test_rows_are_the_pixels(layout: str) -> None:
    from kernel_cases import bring, data

    host = data("x", (2, 3, 4, 5))
    matrix = blocks.rows(bring(np, host, layout))
    assert matrix.flags.c_contiguous
    np.testing.assert_array_equal(matrix[:, :3], host.transpose(0, 2, 3, 1).reshape(-1, 3))
    assert blocks.rows(channels_last(np, np.zeros((2, 6, 4, 5)))[:, 2:5]).shape == (40, 6)  # no copy


def test_read_only_images() -> None:
    """Memory-mapped, or broadcast: Numba has another type for them."""
    x = channels_last(np, np.arange(24.0).reshape(1, 2, 3, 4))
    x.flags.writeable = False
    np.testing.assert_array_equal(loops.concat([x, x]), np.concatenate([x, x], 1))


@pytest.fixture
def restore_threads() -> Iterator[None]:
    before = threads.num_threads()
    yield
    threads.set_num_threads(before)


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_same_bits_for_any_number_of_threads(restore_threads: None, case: Case) -> None:
    args = bring_all(np, case.name, arguments(case), "float32")
    runs = []
    for count in (1, 2, 5):
        threads.set_num_threads(count)
        runs.append(call(loops, case.name, args, "float32"))
    for first, second, third in zip(*runs, strict=True):
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(first, third)


@pytest.mark.parametrize("block", [1 << 15, 64])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (2, 1), (3, 0), (3, 1), (5, 2), (12, 3)])
def test_pools_in_blocks(monkeypatch: pytest.MonkeyPatch, block: int, stride: int, kernel: int, padding: int) -> None:
    """Odd and narrow images, with ties; windows of more cells than a byte can count."""
    monkeypatch.setattr(pool, "BLOCK", block)
    random = np.random.default_rng(stride)
    for size in ((7, 9), (12, 6), (30, 31)):
        if min(size) + 2 * padding < kernel:
            continue
        window = Window.of(size, kernel, stride, padding)
        x = channels_last(np, random.integers(0, 4, (3, 5, *size)).astype(np.float64))
        y, winners = loops.max_pool_winners(x, window)
        dy = channels_last(np, random.standard_normal(y.shape))
        best, first = plain_loops.max_pool_winners(x, window)
        np.testing.assert_array_equal(y, best)
        found = loops.max_pool_dx(dy, winners, window)
        np.testing.assert_allclose(found, plain_loops.max_pool_dx(dy, first, window), atol=1e-12)
        ours, plain = (k.avg_pool_dx(dy, window, False) for k in (loops, plain_loops))
        np.testing.assert_allclose(ours, plain, atol=1e-12)


@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("shapes", [((5, 7), (7, 3)), ((4, 5, 7), (7, 96)), ((5, 7), (3, 7, 40))], ids=str)
def test_products_of_matrices_and_stacks(dtype: str, shapes: tuple[Any, Any], turned: tuple[bool, bool]) -> None:
    random = np.random.default_rng(0)
    a, b = (
        np.swapaxes(random.standard_normal((*s[:-2], s[-1], s[-2])), -1, -2) if t else random.standard_normal(s)
        for s, t in zip(shapes, turned, strict=True)
    )
    result = loops.matmul(a.astype(dtype), b.astype(dtype), None)
    assert_close(result, a @ b, TOLERANCE[dtype])
    out = np.zeros((*result.shape[:-1], 2 * result.shape[-1]), dtype)[..., ::2]
    assert loops.matmul(a.astype(dtype), b.astype(dtype), out) is out
    np.testing.assert_array_equal(out, result)


# ---- Products ----

# Rows, inner length, columns: fewer than a tile, none left over, some left over; more than a chunk and a piece.
SIZES = [
    (1, 1, 1),
    (3, 4, 5),
    (6, 64, 64),
    (13, 7, 12),
    (49, 70, 33),
    (97, 31, 77),
    (100, 3, 16),
    (50, 65, 208),
    (700, 130, 24),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-13)])
@pytest.mark.parametrize(("m", "k", "n"), SIZES)
def test_products_are_numpys(m: int, k: int, n: int, dtype: str, tolerance: float) -> None:
    """Of parts of wider rows, packed from both orders, cut by columns; added or not."""
    rng = np.random.default_rng(m * k + n)
    a, b, d = (rng.standard_normal(shape).astype(dtype) for shape in ((m, k + 3), (k, n), (m, n + 5)))
    wanted, scale = a[:, :k].astype("f8") @ b.astype("f8"), np.sqrt(k)
    for panels in (product.packed(b), product.packed(np.ascontiguousarray(b.T), True)):
        wide = np.full((m, n + 2), 7, dtype)
        multiply(a, panels, wide[:, 1:-1], k)
        assert abs(wide[:, 1:-1] - wanted).max() <= tolerance * scale
        assert (wide[:, [0, -1]] == 7).all()
    columns = product.padded(-(-n // 3), np.dtype(dtype).itemsize)
    panels, cut = product.packed(b, False, columns), np.empty((m, n), dtype)
    for j in range(0, n, columns):
        multiply(a, panels[j * k :], cut[:, j : j + columns], k)
    assert abs(cut - wanted).max() <= tolerance * scale
    dw, wanted = np.ones((k, n), dtype), a[:, :k].astype("f8").T @ d[:, :n].astype("f8")
    multiply_transposed(a, d, dw, True)
    assert abs(dw - 1 - wanted).max() <= 2 * tolerance * np.sqrt(m) + tolerance
    multiply_transposed(a, d, dw, False)
    assert abs(dw - wanted).max() <= tolerance * np.sqrt(m)


multiply, multiply_transposed = loops.conv.product, loops.conv.product_of_transposed


def test_each_element_is_one_sum_whatever_rows_are_computed_together() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((200, 150)).astype("f4"), rng.standard_normal((150, 40)).astype("f4")
    panels, whole, parts = product.packed(b), np.empty((200, 40), "f4"), np.empty((200, 40), "f4")
    multiply(a, panels, whole, 150)
    for i in range(0, 200, 17):
        multiply(a[i : i + 17], panels, parts[i : i + 17], 150)
    assert (whole == parts).all()


def test_what_is_not_finite_stays_in_its_row_and_column() -> None:
    a, b = np.ones((30, 20), "f4"), np.ones((20, 9), "f4")
    a[3, 5], b[7, 2] = np.nan, np.inf
    out = np.empty((30, 9), "f4")
    multiply(a, product.packed(b), out, 20)
    assert np.isnan(out[3]).all()
    assert np.isinf(np.delete(out, 3, axis=0)[:, 2]).all()
    assert (np.delete(np.delete(out, 3, axis=0), 2, axis=1) == 20).all()


def test_products_with_narrower_registers() -> None:
    """The tiles of processors without AVX-512 give the same numbers."""
    code = """
        import numpy as np
        from test_kernels_loops import SIZES, test_products_are_numpys
        from minigrad.kernels.loops import compiled
        for m, k, n in SIZES:
            test_products_are_numpys(m, k, n, "float32", 1e-5)
        print(compiled.VECTOR)
    """
    done = python(code, NUMBA_CPU_NAME="haswell", NUMBA_CPU_FEATURES="+avx2,+fma,+avx,+sse4.2,+sse2")
    assert done.stdout == "32\n", done.stderr


INTERRUPTED = """
    import random, signal, threading, time
    from test_kernels_loops import X, W, loops, Window

    inside, interrupts, end = False, 0, time.monotonic() + 3

    def interrupt(*_):
        global inside
        if inside:
            inside = False
            raise KeyboardInterrupt

    def keep_interrupting():
        while time.monotonic() < end:
            time.sleep(random.uniform(0.0005, 0.005))
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    convolution = X, W[:16, :, :1, :1].copy(), None, Window.of((32, 32), 1)
    before = loops.conv2d(*convolution)
    signal.signal(signal.SIGINT, interrupt)
    threading.Thread(target=keep_interrupting).start()
    while time.monotonic() < end:
        try:
            inside = True
            loops.conv2d(*convolution)
            inside = False
        except KeyboardInterrupt:
            interrupts += 1
    time.sleep(0.1)
    print(interrupts > 20, (loops.conv2d(*convolution) == before).all())
"""
X, W = (channels_last(np, normal(Key(i), (16, 32, 32, 32)).astype("float32")) for i in range(2))


@pytest.mark.skipif(sys.platform == "win32", reason="signals come to the main thread alone")
def test_kernels_work_after_interrupts() -> None:
    """At any moment: in a kernel, before and after it, while it waits for its helpers."""
    done = python(INTERRUPTED, MINIGRAD_NUM_THREADS="2")
    assert done.stdout == "True True\n", done.stderr


# ---- Compiled code ----

CONCAT = """
    import numpy as np
    from minigrad.kernels.loops import compiled, concat
    compiled.LONG = -1.0
    y = concat([np.ones((1, 2, 3, 4)), np.zeros((1, 1, 3, 4))])
    print(y.sum())
"""


def test_a_cold_start_says_so_once(tmp_path: Path) -> None:
    first, second = (python(CONCAT, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2))
    assert first.stdout == second.stdout == "24.0\n", first.stderr
    (line,) = first.stderr.splitlines()
    assert line.startswith("minigrad compiles its kernels for this machine: up to a minute")
    assert str(tmp_path) in line
    assert second.stderr == ""


def test_what_is_kept_is_old_when_any_source_has_changed(tmp_path: Path) -> None:
    """A kernel contains the kernels that it calls, of other files."""
    python(CONCAT, NUMBA_CACHE_DIR=str(tmp_path))
    changed = "import hashlib; plain = hashlib.sha256; hashlib.sha256 = lambda data=b'': plain(data + b' ')\n"
    again = python(changed + textwrap.dedent(CONCAT), NUMBA_CACHE_DIR=str(tmp_path))
    assert "compiles its kernels" in again.stderr


def test_where_nothing_can_be_written_kernels_are_compiled_anew(tmp_path: Path) -> None:
    """Neither beside the sources nor in the user's directory: a file stands in their places."""
    package = tmp_path / "minigrad"
    subprocess.run(["cp", "-r", ROOT / "minigrad", package], check=True)
    for cache in package.rglob("__pycache__"):
        subprocess.run(["rm", "-r", cache], check=True)
    here = package / "kernels" / "loops" / "__pycache__"
    here.write_text("")
    home = tmp_path / "home"
    home.mkdir()
    paths = {"PYTHONPATH": str(tmp_path), "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    done = python(CONCAT, PYTHONDONTWRITEBYTECODE="1", **paths)
    assert done.stdout == "24.0\n", done.stderr
    assert str(home) in done.stderr  # the user's directory is the second choice
    paths["XDG_CACHE_HOME"] = str(here)
    done = python(CONCAT, PYTHONDONTWRITEBYTECODE="1", **paths)
    assert done.stdout == "24.0\n", done.stderr


PLAIN = """
    import numpy as np
    from kernel_cases import ONE_OF_EACH, TOLERANCE, arguments, assert_close, bring_all, call, expected, scale_of, TABLE
    from minigrad.kernels import loops
    from minigrad.kernels.loops import conv, winograd
    assert type(conv.convolve).__name__ == "function"
    for case in ONE_OF_EACH:
        results = call(loops, case.name, bring_all(np, case.name, arguments(case), "float64"), "float64")
        for actual, wanted in zip(results, expected(case), strict=True):
            assert_close(actual, wanted, TOLERANCE["float64"], scale_of(case))
    winograd.pays = lambda *_: True
    for case in ONE_OF_EACH:
        if case.kernel == 3 and case.stride == 1 and case.name.startswith("conv"):
            case = case._replace(padding=1)
            results = call(loops, case.name, bring_all(np, case.name, arguments(case), "float64"), "float64")
            for actual, wanted in zip(results, expected(case), strict=True):
                assert_close(actual, wanted, TOLERANCE["float64"], scale_of(case))
    print({case.name for case in ONE_OF_EACH} | {"max_pool_winners"} == set(TABLE))
"""


def test_every_kernel_under_the_plain_interpreter() -> None:
    """The same source, not compiled: the loops themselves are right, and what Numba makes of them is compared above."""
    done = python(PLAIN, NUMBA_DISABLE_JIT="1")
    assert done.stdout == "True\n", done.stderr


def test_kernels_are_compiled_once_for_each_dtype() -> None:
    """Other versions would double the time of the first step: a Python int for a float, a read-only array."""
    for case in (Case("conv_bn_relu", padding=1), Case("conv_bn_relu_backward", padding=1)):
        for layout in ("channels_last", "sliced"):
            for dtype in ("float32", "float64"):
                call(loops, case.name, bring_all(np, case.name, arguments(case), dtype, layout), dtype)
    assert len(conv.convolve.signatures) <= 2
    assert len(conv.both_gradients.signatures) <= 2

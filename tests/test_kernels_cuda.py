"""The CUDA kernels and their launches: what is particular to them beside the table, which test_kernels.py checks."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import plain_loops
import pytest
from kernel_cases import (
    BACKENDS,
    CONVOLUTIONS,
    ONE_OF_EACH,
    TOLERANCE,
    Case,
    Check,
    arguments,
    as_tuple,
    assert_close,
    bring,
    bring_all,
    call,
    data,
    expected,
)

from minigrad.backend import to_host
from minigrad.errors import ShapeError
from minigrad.kernels.cuda import conv, launch
from minigrad.layout import Window, images, pixels
from minigrad.random import Key, StoredKey, integers

ON_CUPY = [p for p in BACKENDS if p.values[0] != "numpy" and p.values[1] != "textbook"]
on_cupy = pytest.mark.parametrize(("xp", "k"), ON_CUPY, indirect=True)


@on_cupy
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_cupy_in_several_blocks(monkeypatch: pytest.MonkeyPatch, k: Any, xp: Any, name: str) -> None:
    """On a GPU only a batch whose patches pass 256 MiB is cut: here into images or pairs of them."""
    case = Case(name, (5, 3, 7, 9), padding=1, stride=2)
    for size in (1, 9000):
        monkeypatch.setattr(conv, "PATCH_BYTES", size)
        results = call(k, name, bring_all(xp, name, arguments(case), "float64"), "float64")
        for actual, wanted in zip(results, expected(case), strict=True):
            assert_close(actual, wanted, 1e-12)


@on_cupy
@pytest.mark.parametrize("form", ["as they come", "of two precisions", "columns of a matrix", "half"])
def test_running_statistics_of_any_form_are_moved(k: Any, xp: Any, form: str) -> None:
    """A kernel is given an address alone: of other types or strides it would write into somebody else's memory."""
    mean, var = (xp.asarray(data(name, (5,)) ** 2) for name in ("mean", "var"))
    both = xp.ones((5, 3), np.float16 if form == "half" else np.float32)
    running = [both[:, 0], both[:, 1]] if form == "columns of a matrix" else [both[:, 0] + 0, both[:, 1] + 0]
    if form == "of two precisions":
        running[0] = running[0].astype(np.float64)
    k.move_running(*running, mean, var, 10, 0.25)
    for moved, batch in zip(running, (mean, var * (10 / 9)), strict=True):
        tolerance = 1e-3 if form == "half" else 1e-6
        np.testing.assert_allclose(to_host(moved), 0.75 + 0.25 * to_host(batch), rtol=tolerance)
    assert (to_host(both[:, 2]) == 1).all()


@on_cupy
def test_one_long_row(k: Any, xp: Any) -> None:
    """What is wider than the grid with narrow blocks: a row of a single picture."""
    row = data("x", (1, 16, 1, 20_000))
    window = Window.of((1, 20_000), (1, 3), (1, 2), (0, 1))
    found, winners = k.max_pool_winners(bring(xp, row.astype(np.float32)), window)
    np.testing.assert_array_equal(to_host(found), plain_loops.max_pool(row.astype(np.float32), window))
    assert winners[0].shape == (1, 16, 1, 10_000)
    flat = data("x", (2, 300_000)).astype(np.float32)
    dropped = to_host(k.dropout(xp.asarray(flat), 0.5, Key(3), None))
    np.testing.assert_array_equal(dropped, plain_loops.dropout(flat, 0.5, Key(3), None))


@on_cupy
def test_options_may_be_numpys_numbers(k: Any, xp: Any) -> None:
    x = bring(xp, data("x", (2, 6, 4, 5)))
    np.testing.assert_array_equal(
        to_host(k.lrn(x, np.int64(5), 1e-4, 0.75, 1.0)), to_host(k.lrn(x, 5, 1e-4, 0.75, 1.0))
    )


@on_cupy
@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_cupy_with_long_indices(monkeypatch: pytest.MonkeyPatch, check: Check, case: Case) -> None:
    """Arrays of 2³⁰ values are indexed with 64 bits; here all are."""
    monkeypatch.setattr(launch, "INT", 0)
    check(case)


@on_cupy
@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_cupy_with_packs(check: Check, case: Case) -> None:
    """16 bytes at once where rows start at such borders: 8 channels, and columns 8 to 15 of a wider matrix."""
    if case.name not in ("cross_entropy", "concat"):
        case = case._replace(shape=(2, 8, 5, 6), filters=12)
    check(case)


@on_cupy
def test_columns_of_a_wider_matrix_are_read_where_they_are(k: Any, xp: Any) -> None:
    """Parts of a concatenation, at offsets of 8, 3 and 1 channels: same bits as from copies."""
    wide = bring(xp, data("wide", (2, 40, 5, 6)).astype(np.float32))
    window, weight = Window.of((5, 6), 3, 1, 1), bring(xp, data("w", (6, 8, 3, 3)).astype(np.float32))
    for start in (8, 3, 1):
        part = wide[:, start : start + 8]
        copy = images(pixels(part).copy(), 2, 5, 6)
        assert launch.matrix(part)[1] == 40
        channels = (
            *k.statistics(part),
            *(bring(xp, data(name, (8,)).astype(np.float32)) for name in ("gamma", "beta")),
        )
        for name, *rest in (
            ("conv2d", weight, None, window),
            ("conv2d_dw", part, Window.of((5, 6), 1), True),
            ("statistics",),
            ("batch_norm", *channels, 1e-5, True),
            ("batch_norm_dx", part, *channels, 1e-5, True, True),
            ("max_pool", window),
            ("avg_pool", window, True),
            ("avg_pool_dx", window, True),
            ("lrn", 5, 0.5, 0.75, 1.0),
            ("lrn_dx", part, 5, 0.5, 0.75, 1.0),
        ):
            results = (as_tuple(getattr(k, name)(x, *rest)) for x in (part, copy))
            for of_part, of_copy in zip(*results, strict=True):
                np.testing.assert_array_equal(to_host(of_part), to_host(of_copy), err_msg=name)
        np.testing.assert_array_equal(to_host(k.concat([part, copy])), to_host(k.concat([copy, part])))


@on_cupy
def test_cupy_joins_the_parts_of_dz(k: Any, xp: Any, dtype: str) -> None:
    """Upstream gradients of several units, one of them columns of a wider matrix, are one gradient."""
    shape, window = (2, 20, 5, 6), Window.of((5, 6), 1)
    dz, y, x = (data(name, shape, "offset") for name in ("dz", "y", "x"))
    weight, gamma, beta = data("w", (20, 20, 1, 1)), data("gamma", (20,)), data("beta", (20,))
    rest = (x, weight, window, y, *plain_loops.statistics(y), gamma, beta, 1e-5, True)
    wanted = plain_loops.conv_bn_relu_backward([dz], *rest)
    parts = [dz[:, :8], dz[:, 8:9], dz[:, 9:]]
    args = bring_all(xp, "conv_bn_relu_backward", (parts, *rest), dtype)
    args[0][2] = bring(xp, dz.astype(dtype))[:, 9:]
    for actual, whole in zip(call(k, "conv_bn_relu_backward", args, dtype), wanted, strict=True):
        assert_close(actual, whole, TOLERANCE[dtype])


@on_cupy
def test_a_matrix_wider_than_the_grid(k: Any, xp: Any) -> None:
    x = xp.zeros((1, 1), np.float32)
    wide = xp.lib.stride_tricks.as_strided(x, (1, 2**22, 1, 1), (0, 0, 0, 0))
    with pytest.raises(ShapeError, match="4194304 columns, the GPU's grid ends at"):
        k.statistics(wide)


@pytest.mark.parametrize(("xp", "k"), [p for p in BACKENDS if p.values[0] != "numpy"], indirect=True)
@pytest.mark.parametrize("long_indices", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_augment_is_the_loop_over_pixels(
    monkeypatch: pytest.MonkeyPatch, k: Any, xp: Any, dtype: str, channels: int, long_indices: bool
) -> None:
    """Shifts beyond the picture, squares that hang over an edge, a picture taken twice."""
    monkeypatch.setattr(launch, "INT", 0 if long_indices else launch.INT)
    p, h, w, side = 4, 5, 7, 3
    pictures = integers(Key(1), 256, (p, h, w, channels)).astype(np.uint8)
    table = data("table", (257, channels)).astype(dtype)
    changes = np.array(
        [[2, 0, 0, 0, 9, 9], [0, 1, -2, 1, -1, 5], [3, -4, 6, 0, 4, -2], [2, 5, 0, 1, 2, 2], [1, 0, -7, 0, -3, 0]]
    )
    wanted = np.empty((len(changes), channels, h, w), dtype)
    for (n, c, i, j), _ in np.ndenumerate(wanted):
        number, down, right, mirrored, top, left = changes[n]
        y, x = i + down, (w - 1 - j if mirrored else j) + right
        level = pictures[number, y, x, c] if 0 <= y < h and 0 <= x < w else 0
        if 0 <= i - top < side and 0 <= j - left < side:
            level = 256
        wanted[n, c, i, j] = table[level, c]
    result = k.augment(xp.asarray(pictures), xp.asarray(changes.astype(np.int32)), side, xp.asarray(table))
    assert result.dtype == dtype
    np.testing.assert_array_equal(to_host(result), wanted)


@on_cupy
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("shape", [(), (5,), (4, 6), (2, 3, 5), (2, 3, 4, 5), (2, 1, 2, 2, 3)], ids=str)
def test_dropout_takes_any_shape_and_stored_keys(k: Any, xp: Any, shape: tuple[int, ...], named: bool) -> None:
    if named and not shape:
        return
    x, key = xp.asarray(data("x", shape)), Key(5)
    rows = np.arange(shape[0])[::-1] * 7 if named else None
    wanted = plain_loops.dropout(to_host(x), 0.3, key, rows)
    stored = StoredKey(xp.asarray(np.uint64(key.value)))
    for name in (key, stored):
        for numbers in (rows, None if rows is None else xp.asarray(rows)):  # from the host they are uploaded
            y = k.dropout(x, 0.3, name, numbers)
            assert y.shape == x.shape
            np.testing.assert_allclose(to_host(y), wanted, rtol=1e-15)


def test_cuda_kernels_compile_without_spills(tmp_path: Path) -> None:
    """For an A100 and an H100, in the types of training and the widest; a register kept in memory is slow."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc to compile for sm_80 and sm_90")
    sources = sorted(path.stem for path in Path(launch.__file__).parent.glob("*.cu"))
    assert len(sources) == 6
    for arch, choices in (
        ("sm_80", ("f", "i", 4)),
        ("sm_90", ("f", "i", 4)),
        ("sm_90", ("d", "q", 2)),
    ):
        source, cubin = tmp_path / "all.cu", tmp_path / "all.cubin"
        source.write_text(launch.cuda_source(*choices, *sources))
        options = ["-cubin", f"-arch={arch}", "-std=c++17", "-Werror", "all-warnings", "--ptxas-options=-v"]
        done = subprocess.run([nvcc, *options, source, "-o", cubin], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        spills = re.findall(r"(\d+) bytes spill", done.stderr)
        assert len(spills) >= 2 * 24  # a line for reads and writes of every kernel: none was left out
        assert set(spills) == {"0"}, done.stderr

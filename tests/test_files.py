"""What every reader asks before it follows the claims of a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from inception.files import EXPANSION, FREE_BYTES, FileError, allow, open_file
from inception.npz import read_arrays


def test_a_small_file_may_ask_for_64_mib_and_a_large_one_for_64_times_its_size() -> None:
    assert (FREE_BYTES, EXPANSION) == (67_108_864, 64)
    for size, most in ((0, 67_108_864), (1_000_000, 131_108_864)):
        allow(Path("a.npz"), most, size, "its arrays")
        with pytest.raises(
            FileError, match=rf"^a\.npz: its arrays would take {most + 1:,} bytes, the file has {size:,}"
        ):
            allow(Path("a.npz"), most + 1, size, "its arrays")
    with pytest.raises(FileError, match=r": use np\.savez$"):
        allow(Path("a.npz"), 1 << 40, 0, "its arrays", remedy="use np.savez")


def test_only_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        with open_file(tmp_path / name) as file:
            assert file.read() == b"abc"
    for path, reason in (
        (tmp_path / "pipe", "a pipe or a device"),
        (Path("/dev/zero"), "a pipe or a device"),
        (tmp_path, "a directory"),
        (tmp_path / "none", "there is no such file"),
        (Path("a\0b"), "cannot be read"),
    ):
        with pytest.raises(FileError, match=reason):
            open_file(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_read_as_they_were_written(tmp_path: Path, save: Callable[..., None]) -> None:
    """As numpy.load reads them, of every kind that is read."""
    rng = np.random.default_rng(0)
    wanted = {
        "pictures": rng.integers(0, 256, (5, 4, 3, 3), np.uint8),
        "fortran": np.asfortranarray(rng.normal(size=(3, 4, 5))),
        "big": np.arange(6, dtype=">i4"),
        "names": np.array(["a", "日本", ""]),
        "big names": np.array(["a", "日本"], ">U2"),
        "number": np.float32(3),
        "none": np.zeros((0, 3)),
        "many": np.zeros((2_000_000,), np.uint8),
    }
    save(tmp_path / "a.npz", other=np.array([None]), **wanted)
    found, size = read_arrays(tmp_path / "a.npz", [*wanted, "not there"])
    assert size == (tmp_path / "a.npz").stat().st_size
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == np.asarray(array).dtype
        assert found[name].shape == np.shape(array)
        assert np.array_equal(found[name], array)
    with pytest.raises(FileError, match="array other holds Python objects, which are never read"):
        read_arrays(tmp_path / "a.npz", ["other"])

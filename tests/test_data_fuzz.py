"""Thousands of damaged files: every reader gives a data set or a DataError of one line, and runs nothing."""

from __future__ import annotations

import io
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_data import planes_and_labels, python_2_pickle, write_binary, write_python
from test_data_arrays import arrays
from test_data_augment import some_images
from test_data_sources import packed

from inception.data import DataError, load_arrays, load_cifar10, read_picture
from minigrad.random import Key, integers, uniform

Reader = Callable[[bytes], object]
PICTURES = ("png", "jpg", "gif", "bmp", "webp", "ppm", "16.png", "palette.png")


def mutated(content: bytes, key: Key) -> bytes:
    """`content` with some bytes changed, cut off, doubled, exchanged or made large, mostly near its two ends."""
    data = bytearray(content)
    for k in range(1 + int(integers(key.fold("count"), 4, 1)[0])):
        a, b, c, d = uniform(key.fold(k), 4).tolist()
        reach = len(data) if c < 0.3 else min(len(data), 400)
        place = int(a * reach) if d < 0.7 else len(data) - 1 - int(a * reach)
        place = max(0, min(place, len(data) - 1))
        match int(b * 8):
            case 0 | 1 | 2:
                data[place] = int(b * 8 % 1 * 256)
            case 3:
                data[place] ^= 1 << int(c * 8)
            case 4:
                del data[place : place + 1 + int(c * 30)]
            case 5:
                data[place:place] = data[place : place + 1 + int(c * 30)]
            case 6:
                data[place : place + 4] = [b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x80\0\0\0"][
                    int(c * 4)
                ]
            case 7 if c < 0.3:
                del data[place:]
        if not data:
            break
    return bytes(data)


def readers(folder: Path) -> dict[str, tuple[bytes, Reader]]:
    """For each kind of file a good one, and what reads it."""
    image = pytest.importorskip("PIL.Image")
    python, binary = write_python(folder / "python"), write_binary(folder / "binary")

    def in_place(path: Path, read: Callable[[], object]) -> tuple[bytes, Reader]:
        """Read what lies beside the file, with the file replaced."""
        if not path.exists():
            path.write_bytes(b"")

        def reader(content: bytes) -> object:
            path.write_bytes(content)
            return read()

        return path.read_bytes(), reader

    found = {
        "python batch": in_place(python / "test_batch", lambda: load_cifar10(python)),
        "binary batch": in_place(binary / "test_batch.bin", lambda: load_cifar10(binary)),
    }
    planes, labels = planes_and_labels(3)
    content = pickle.dumps({b"data": planes, b"labels": labels}, protocol=4)
    found["batch of today"] = content, found["python batch"][1]
    names = write_python(folder / "names")
    found["names"] = in_place(names / "batches.meta", lambda: load_cifar10(names))
    archive = packed(write_binary(folder / "packed"), folder / "a.tar.gz", "cifar-10-batches-bin")
    found["archive"] = in_place(archive, lambda: load_cifar10(archive))
    for name, save in (("npz", np.savez), ("small npz", np.savez_compressed)):
        path = folder / f"{name}.npz"
        save(path, **arrays(classes=np.array(["a", "b", "c"])))
        found[name] = in_place(path, lambda path=path: load_arrays(path))
    colour = image.fromarray(some_images(1, 21, 17)[0])
    exif = image.Exif()
    exif[0x0112] = 6
    for suffix in PICTURES:
        path, stream = folder / f"p.{suffix}", io.BytesIO()
        picture = colour
        if suffix == "16.png":
            picture = image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 150)
        if suffix == "palette.png":
            picture = colour.quantize(8)
        kind = {"jpg": "jpeg"}.get(suffix.rpartition(".")[2], suffix.rpartition(".")[2])
        options = {"transparency": b"\0\x80\xff"} if suffix == "palette.png" else {}
        picture.save(stream, kind, **options, **({"exif": exif} if kind in ("jpeg", "png", "webp") else {}))
        found[suffix] = stream.getvalue(), in_place(path, lambda path=path: read_picture(path, (8, 8)))[1]
    return found


def fuzz(folder: Path, count: int, seed: int) -> dict[str, int]:
    """Read `count` damaged files of each kind; returns how many of each kind were refused."""
    refused = {}
    by_kind = readers(folder)
    before = sorted(folder.rglob("*"))
    for kind, (good, read) in by_kind.items():
        read(good)
        refused[kind] = 0
        for i in range(count):
            content = mutated(good, Key(seed).fold(kind, i))
            signal.alarm(10)  # seconds, which end the process
            try:
                read(content)
            except DataError as error:
                refused[kind] += 1
                if not str(error).isprintable():  # nor a line's end
                    raise AssertionError(f"{kind}, seed {seed}, file {i}: {str(error)!r}") from error
            except Exception as error:
                raise AssertionError(f"{kind}, seed {seed}, file {i}: {type(error).__name__}: {error}") from error
        read(good)  # nothing that was read before has changed the reader
    signal.alarm(0)
    assert sorted(folder.rglob("*")) == before
    return refused


def watched(folder: Path, count: int, seed: int) -> None:
    """`fuzz` in a process of its own, under limits of time and memory, where starting or importing ends it."""
    script = f"""
import os, resource, sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
import test_data_fuzz as t
t.fuzz(t.Path({str(folder)!r}), 1, 99)  # whatever is imported late is now
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), used + (1 << 30)))
FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.", "ctypes.", "exec")
def hook(event, arguments):
    if event.startswith(FORBIDDEN) and not (event == "exec" and os.path.isfile(arguments[0].co_filename)):  # an import
        os.write(2, f"forbidden: {{event}} {{arguments}}".encode()); os._exit(9)
sys.addaudithook(hook)
print(t.fuzz(t.Path({str(folder)!r}), {count}, {seed}))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env=os.environ | {"MINIGRAD_NUM_THREADS": "1"},
        capture_output=True,
        timeout=60 + count,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    refused = eval(done.stdout)
    print(refused)
    assert set(refused) == set(readers(folder))
    assert all(number > count / 20 for kind, number in refused.items() if kind != "ppm"), refused


def test_a_few_hundred_damaged_files(tmp_path: Path) -> None:
    watched(tmp_path, 25, seed=1)


@pytest.mark.slow
def test_twenty_thousand_damaged_files(tmp_path: Path) -> None:
    watched(tmp_path, -(-20_000 // len(readers(tmp_path))), seed=2)


def test_a_mutation_changes_the_file_and_is_the_same_again() -> None:
    content = python_2_pickle(*planes_and_labels(0))
    changed = [mutated(content, Key(0).fold(i)) for i in range(50)]
    assert sum(c != content for c in changed) > 35
    assert changed == [mutated(content, Key(0).fold(i)) for i in range(50)]

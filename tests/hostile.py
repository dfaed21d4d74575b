"""Files that lie, by kind, and where they lie: each must be refused in one sentence, quickly and in little memory."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import socket
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from test_data import planes_and_labels, python_2_pickle, write_binary, write_python
from test_data_arrays import arrays

from inception.data import load_arrays, load_cifar10, open_data, read_picture

Make = Callable[[Path], Any]
GB = 1 << 30


def sparse(path: Path, size: int, head: bytes = b"") -> None:
    path.write_bytes(head)
    os.truncate(path, size)


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def link(path: Path, to: str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(to)


def listen(path: Path) -> None:
    path.unlink(missing_ok=True)
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket may have 108 bytes
    socket.socket(socket.AF_UNIX).bind(path.name)
    os.chdir(here)


def directory(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def content(data: bytes | Callable[[], bytes]) -> Make:
    return lambda path: path.write_bytes(data if isinstance(data, bytes) else data())


PLACES: dict[str, Make] = {  # where no file should be; for every reader
    "pipe": pipe,
    "device": lambda path: link(path, "/dev/zero"),
    "socket": listen,
    "directory": directory,
    "link to itself": lambda path: link(path, path.name),
    "ten sparse gigabytes": lambda path: sparse(path, 10 * GB),
    "empty": content(b""),
}

# ---- CIFAR ----


def text(value: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value


ENCODE = b"c_codecs\nencode\n"
BATCHES: dict[str, Make] = {
    "nested tuples": content(b"}N" + b"\x85" * 150_000 + b"K\x01s."),
    "nested tuples as a value": content(b"}K\x01N" + b"\x85" * 150_000 + b"s."),
    "nested lists": content(b"}X\x04\0\0\0data" + b"]" * 200_000 + b"a" * 199_999 + b"s."),
    "bytearray of 3 GB": content(b"\x80\x05\x96" + struct.pack("<Q", 3 * GB) + b"."),
    "bytes of a petabyte": content(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 50) + b"abc."),
    "text of a petabyte": content(b"\x80\x04\x8d" + struct.pack("<Q", 1 << 50) + b"abc."),
    "frame of a petabyte": content(b"\x80\x04\x95" + struct.pack("<Q", 1 << 50) + b"}."),
    "memo of two thousand million": content(b"\x80\x02Nr\xff\xff\xff\x7f0."),
    "one text encoded again and again": content(
        b"\x80\x02" + text(b"a" * 500_000) + b"q\0(" + (ENCODE + b"h\0X\x06\0\0\0latin1\x86R") * 9000 + b"l."
    ),
    "a call of many arguments, repeated": content(
        b"\x80\x02(" + b"N" * 500_000 + b"tq\0(" + b"cnumpy\ndtype\nh\0R" * 25_000 + b"l."
    ),
    "a table updated again and again": content(
        b"\x80\x02}q\0(" + b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(100_000)) + b"u"
        + b"cnumpy\ndtype\n)R" + b"h\0b" * 100_000 + b"."
    ),
    "twenty million empty tables": content(lambda: b"(" + b"}" * 20_000_000 + b"l."),
    "twenty million marks": content(lambda: b"(" * 20_000_000 + b"."),
    "marks over a high stack": content(lambda: b"N" * 250_000 + b"(t" * 130_000 + b"."),
    "a tree of 2**60 tuples as a key": content(b"}N" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86"
                                                                for i in range(60)) + b"Ns."),
    "a list in itself": content(b"}(X\x04\0\0\0data]q\0h\0aX\x06\0\0\0labelsh\0u."),
    "a number of 5,000 digits": content(b"}(K\1I" + b"9" * 5000 + b"\nu."),
    "a number of a megabyte": content(b"}(K\1\x8b" + struct.pack("<i", 1 << 20) + b"\x7f" * (1 << 20) + b"u."),
    "a shape of 2**124": content(
        python_2_pickle(*planes_and_labels(0)).replace(
            struct.pack("<ib", 3072, -122), struct.pack("<ib", 1 << 30, -122)
        )
    ),
    "a call": content(b"cos\nsystem\n(S'touch executed'\ntR."),
    "an instance": content(b"(S'touch executed'\nios\nsystem\n."),
    "an extension": content(b"\x80\x02\x82\x01."),
    "a name with escapes": content(b"\x80\x04\x8c\x05\x1b[31m\x8c\x03\x07\n\r\x93."),
    "a web page": content(b"<html>404 Not Found</html>"),
    "nothing but STOP": content(b"."),
}  # fmt: skip
NAMES: dict[str, Make] = {
    "ten names of 100,000 letters": content(
        lambda: pickle.dumps({b"label_names": [b"a" * 100_000] * 9 + [b"b" * 100_001]}, protocol=2)
    ),
    "nine names": content(pickle.dumps({b"label_names": [b"a"] * 9}, protocol=2)),
}
TABLES: dict[str, Make] = {
    "a label of 255": content(b"\xff" * 3073),
    "a row and a half": content(b"\0" * 4000),
    "a sparse gigabyte": lambda path: sparse(path, 3073 * 400_000),
}

# ---- archives ----

FOLDER = "cifar-10-batches-bin"


def member(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def packed_zeros(head: bytes, size: int, tail: bytes = b"") -> bytes:
    stream = io.BytesIO()
    with gzip.GzipFile(fileobj=stream, mode="wb", compresslevel=1) as file:
        file.write(head)
        for _ in range(size >> 20):
            file.write(bytes(1 << 20))
        file.write(tail)
    return stream.getvalue()


def header_with_size(size: bytes) -> bytes:
    block = bytearray(member(f"{FOLDER}/data_batch_1.bin", 0))
    block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


ARCHIVES: dict[str, Make] = {
    "a name of 250 MB": content(lambda: packed_zeros(member("././@LongLink", 250 << 20, b"L"), 250 << 20)),
    "a header of 250 MB": content(lambda: packed_zeros(member("x", 250 << 20, b"x"), 250 << 20)),
    "a batch of 150 MB": content(lambda: packed_zeros(member(f"{FOLDER}/data_batch_1.bin", 150 << 20), 150 << 20)),
    "a batch of 250 MB": content(lambda: packed_zeros(member(f"{FOLDER}/data_batch_1.bin", 250 << 20), 250 << 20)),
    "a sparse batch": content(lambda: packed_zeros(member(f"{FOLDER}/data_batch_1.bin", 1 << 20, b"S"), 1 << 20)),
    "a gigabyte of something else": content(lambda: packed_zeros(member("else", GB), GB)),
    "a batch that claims 8 GB": content(lambda: gzip.compress(header_with_size(b"77777777777\0"))),
    "a batch that claims 2**80 bytes": content(lambda: gzip.compress(header_with_size(b"\x80" + b"\1" * 11))),
    "a batch of a negative size": content(lambda: gzip.compress(header_with_size(b"\xff" * 12))),
    "a million headers": content(lambda: gzip.compress(member("a", 0) * 1_000_000, 1)),
    "a gzip header of 2 MB": content(lambda: b"\x1f\x8b\x08\x08\0\0\0\0\0\xff" + b"a" * 2_000_000),
    "forty thousand empty gzips": content(lambda: gzip.compress(b"") * 40_000),
    "a batch that is a link": content(
        lambda: gzip.compress(member(f"{FOLDER}/data_batch_1.bin", 0, tarfile.SYMTYPE) + bytes(1024))
    ),
    "a batch cut short": content(lambda: gzip.compress(member(f"{FOLDER}/data_batch_1.bin", 30_730_000) + b"abc")),
    "no gzip": content(b"something else" * 100),
    "a name with escapes": content(lambda: gzip.compress(member("\x1b[31m\a\n", 0) + bytes(1024))),
}

# ---- .npz ----


def header(dtype: str, shape: str, version: bytes = b"\1\0") -> bytes:
    line = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    line += b" " * (-(len(line) + 11) % 64) + b"\n"
    size = struct.pack("<H" if version == b"\1\0" else "<I", len(line))
    return b"\x93NUMPY" + version + size + line


def npz(method: int = zipfile.ZIP_STORED, **members: bytes | np.ndarray | Callable[[], bytes]) -> Make:
    """A data set in which these members are not what they were."""

    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w", method, compresslevel=1) as archive:
            for name, value in {**arrays(), **members}.items():
                value = value() if callable(value) else value
                if isinstance(value, bytes):
                    archive.writestr(f"{name}.npy", value)
                else:
                    with archive.open(f"{name}.npy", "w") as file:
                        np.lib.format.write_array(file, value)

    return make


def long_members(name: str, head: bytes, size: int) -> Make:
    """A member of `size` zeros after its head, which is never held in memory as a whole."""

    def make(path: Path) -> None:
        npz()(path)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for other, value in arrays().items():
                if other != name:
                    with archive.open(f"{other}.npy", "w") as file:
                        np.lib.format.write_array(file, value)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                file.write(head)
                for _ in range(size >> 20):
                    file.write(bytes(1 << 20))

    return make


def claiming(size: int) -> Make:
    """The central directory says that x_train has `size` bytes."""

    def make(path: Path) -> None:
        npz()(path)
        data = path.read_bytes()
        at = data.rindex(b"x_train.npy") - 46
        path.write_bytes(data[: at + 24] + struct.pack("<I", size) + data[at + 28 :])

    return make


def with_lzma_of_4_gb(path: Path) -> None:
    npz(zipfile.ZIP_LZMA)(path)
    data = path.read_bytes()
    at = data.index(b"x_train.npy") + len("x_train.npy") + 20  # the extra field of a streamed member
    place = data.index(b"\x5d", at)  # lc, lp, pb; then the size of the dictionary
    path.write_bytes(data[: place + 1] + b"\xff\xff\xff\xff" + data[place + 5 :])


ARRAYS: dict[str, Make] = {
    "200 million names without letters": npz(classes=header("'<U0'", "(200000000,)")),
    "a name of a million letters, compressed": long_members("classes", header("'<U1048576'", "(125,)"), 500 << 20),
    "16 million names, compressed": long_members("classes", header("'<U1'", "(15728640,)"), 60 << 20),
    "pictures of 480 MB, compressed": long_members("x_train", header("'|u1'", "(163840,32,32,3)"), 480 << 20),
    "grey pictures of 60 MB, compressed": long_members("x_train", header("'|u1'", "(61440,32,32)"), 60 << 20),
    "labels of 60 MB, compressed": long_members("y_train", header("'|u1'", "(62914560,)"), 60 << 20),
    "no header": npz(x_train=b"abc"),
    "an empty member": npz(y_train=b""),
    "a header of 2 GB": npz(x_train=b"\x93NUMPY\2\0\xff\xff\xff\x7f{"),
    "a header of 5 MB": npz(x_train=b"\x93NUMPY\2\0" + struct.pack("<I", 5 << 20) + b" " * (5 << 20)),
    "nested brackets": npz(x_train=b"\x93NUMPY\1\0" + struct.pack("<H", 9000) + b"(" * 9000),
    "nested signs": npz(x_train=b"\x93NUMPY\1\0" + struct.pack("<H", 9000) + b"-" * 8999 + b"1"),
    "a shape of 2**124": npz(x_train=header("'|u1'", f"({1 << 62},{1 << 62},1,3)")),
    "a shape of 5,000 digits": npz(x_train=header("'|u1'", f"({'9' * 4000},)")),
    "a negative shape": npz(x_train=header("'|u1'", "(-1,-1,-1,3)") + bytes(3)),
    "a shape of truths": npz(x_train=header("'|u1'", "(True,True,True,3)")),
    "Python objects": npz(y_train=header("'|O'", "(6,)") + pickle.dumps([os.system] * 6)),
    "records": npz(x_train=header("[('a', '|u1')]", "(6,5,4,3)") + bytes(360)),
    "pixels of a gigabyte each": npz(x_train=header("('|u1', (1073741824,))", "(1,)")),
    "texts without code points": npz(classes=header("'<U1'", "(3,)") + b"\xff" * 12),
    "names in two dimensions": npz(classes=np.array([["a"], ["b"], ["c"]])),
    "a label of 2**63": npz(y_train=np.array([1 << 63] * 6, np.uint64)),
    "a label of 10**12": npz(y_train=np.array([10**12] * 6)),
    "a member that claims 4 GB": claiming(0xFFFFFFF0),
    "a member that claims 3 bytes": claiming(3),
    "compressed by LZMA with 4 GB": with_lzma_of_4_gb,
    "compressed by BZIP2": npz(zipfile.ZIP_BZIP2),
    "ten thousand members": npz(**{f"a{i}": b"" for i in range(10_000)}, x_train=b""),
    "a pickle": content(pickle.dumps({"x_train": 1})),
    "one array": content(header("'|u1'", "(3,)") + b"abc"),
}

# ---- pictures ----


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, *, bits: int = 8, colour: int = 2, lines: int | None = None, interlaced: int = 0
) -> bytes:
    """A black PNG; `lines` of it are there."""
    row = 1 + width * {0: 1, 2: 3, 3: 1, 6: 4}[colour] * bits // 8
    pack, packed = zlib.compressobj(1), []
    for _ in range(height if lines is None else lines):
        packed.append(pack.compress(bytes(row)))
    packed.append(pack.flush())
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)
    palette = chunk(b"PLTE", bytes(6)) if colour == 3 else b""
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + palette + chunk(b"IDAT", b"".join(packed)) + chunk(b"IEND", b"")
    )


def saved(kind: str, size: tuple[int, int], mode: str = "RGB", **options: Any) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.new(mode, size).save(stream, kind, **options)
    return stream.getvalue()


def webp(place: int, size: int, **options: Any) -> bytes:
    """A small WebP that claims another size. It lies twice at `place`, but once in a lossless one."""
    data = bytearray(saved("webp", (4, 4), **options))
    bytes_ = {24: 3, 26: 2, 21: 4}[place]
    repeated = size.to_bytes(bytes_, "little") * (1 if place == 21 else 2)
    data[place : place + len(repeated)] = repeated
    return bytes(data)


def many_scans() -> bytes:
    """A progressive JPEG of 3,000×3,000 pixels whose last scan is there a thousand times."""
    data = saved("jpeg", (3000, 3000), progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * 1000 + b"\xff\xd9"


def gif(width: int, height: int, more: bytes = b"") -> bytes:
    return (b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\0\0" + bytes(6) + more + b","
            + struct.pack("<HHHH", 0, 0, width, height) + b"\0\x02\x02\x44\x01\0;")  # fmt: skip


PICTURES: dict[str, Make] = {
    "PNG of 81 million pixels": content(lambda: png(9000, 9000)),
    "PNG of 81 million pixels, grey": content(lambda: png(9000, 9000, colour=0)),
    "PNG of 81 million pixels, palette": content(lambda: png(9000, 9000, colour=3)),
    "PNG of 81 million pixels, transparent": content(lambda: png(9000, 9000, colour=6, lines=100)),
    "PNG of 81 million pixels, 16 bits": content(lambda: png(9000, 9000, bits=16, colour=0, lines=100)),
    "PNG of 81 million pixels, interlaced": content(lambda: png(9000, 9000, lines=100, interlaced=1)),
    "PNG of 4·10**18 pixels": content(lambda: png(2**31 - 1, 2**31 - 1, lines=0)),
    "PNG without pixels": content(png(0, 0)),
    "PNG with a chunk of 4 GB": content(png(8, 8)[:33] + b"\xff\xff\xff\xffIDAT"),
    "PNG with a text of 4 GB": content(png(8, 8)[:33] + b"\xff\xff\xff\xffzTXt"),
    "PNG cut short": content(png(64, 64)[:60]),
    "PNG of a sparse gigabyte": lambda path: sparse(path, GB, png(8, 8)[:33]),
    "JPEG of 81 million pixels, progressive": content(lambda: saved("jpeg", (9000, 9000), "L", progressive=True)),
    "JPEG of a thousand scans": content(many_scans),
    "JPEG of 100 million pixels": content(lambda: saved("jpeg", (10_000, 10_000), "L")),
    "JPEG cut short": content(lambda: saved("jpeg", (640, 480))[:700]),
    "GIF of 4·10**9 pixels": content(gif(65535, 65535)),
    "GIF of 81 million pixels": content(gif(9000, 9000)),
    "GIF with a comment of 10 MB": content(gif(9000, 9000, b"!\xfe" + (b"\xff" + b"a" * 255) * 40_000 + b"\0")),
    "WebP of 268 million pixels": content(webp(26, 16_383)),
    "WebP of 81 million pixels": content(webp(26, 9000)),
    "WebP of 81 million pixels, lossless": content(webp(21, 8999 | 8999 << 14, lossless=True)),
    "WebP of 281 million million pixels": content(webp(24, (1 << 24) - 1, exif=b"Exif\0\0")),
    "BMP that claims 10**9 pixels": content(
        saved("bmp", (4, 4)).replace(struct.pack("<ii", 4, 4), struct.pack("<ii", 32_000, 32_000))
    ),
    "BMP that claims 80 million pixels": content(
        saved("bmp", (4, 4)).replace(struct.pack("<ii", 4, 4), struct.pack("<ii", 8000, 10_000))
    ),
    "PPM that claims 80 million pixels": content(b"P6 8000 10000 255 abc"),
    "PPM in letters that claims 80 million pixels": content(b"P3 8000 10000 255 " + b"1 " * 100),
    "PPM with a size of 5,000 digits": content(b"P6 " + b"9" * 5000 + b" 1 255 "),
    "PPM with a comment of 1 MB": content(b"P6 #" + b"a" * 1_000_000),
    "EPS": content(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(executed) (w) file\n"),
    "SVG": content(b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "TIFF": content(lambda: saved("tiff", (4, 4))),
}  # fmt: skip


# ---- folders ----


def class_folders(path: Path) -> None:
    for part in ("train", "test"):
        for name in ("a", "b"):
            (path / part / name).mkdir(parents=True)
            (path / part / name / "p.png").write_bytes(png(8, 8))


def nested(path: Path) -> None:
    """1,200 folders deep, made from where we are: the path as a whole is too long for the system."""
    class_folders(path)
    here = os.getcwd()
    os.chdir(path / "train" / "a")
    for _ in range(1200):
        os.mkdir("deep")
        os.chdir("deep")
    os.chdir(here)


def another_class(name: str) -> Make:
    def make(path: Path) -> None:
        class_folders(path)
        (path / "train" / name).mkdir()

    return make


def one_class(path: Path) -> None:
    class_folders(path)
    for part in ("train", "test"):
        (path / part / "images").mkdir()
        for name in ("a", "b"):
            (path / part / name).rename(path / part / "images" / name)


def links_in_a_circle(path: Path) -> None:
    class_folders(path)
    for part in ("train", "test"):
        (path / part / "a" / "p.png").unlink()
        (path / part / "a" / "again").symlink_to(path / part / "a")


FOLDERS: dict[str, Make] = {
    "nested 1,200 deep": nested,
    "one class": one_class,
    "only links in a circle": links_in_a_circle,
    "a class with escapes": another_class("\x1b[31mred\a"),
    "a class written backwards": another_class("\u202egnp.exe"),
    "a class of two lines": another_class("a\nerror: b"),
}


def hostile() -> dict[str, tuple[Make, str, Callable[[Path], Any]]]:
    """By name: what makes the file, in a fresh folder under which name, and what reads that folder."""
    cases: dict[str, tuple[Make, str, Callable[[Path], Any]]] = {}

    def beside(others: Callable[[Path], Any], name: str, make: Make) -> Make:
        def both(folder: Path) -> None:
            others(folder)
            make(folder / name)

        return both

    def add(kind: str, makes: dict[str, Make], name: str, read: Callable[[Path], Any], others: Any = None) -> None:
        for what, make in makes.items():
            full = beside(others or (lambda folder: None), name, make)
            cases[f"{kind}: {what}"] = full, name, read

    add("python batch", PLACES | BATCHES, "data_batch_2", load_cifar10, write_python)
    add("names", NAMES, "batches.meta", load_cifar10, write_python)
    add("binary batch", PLACES | TABLES, "data_batch_2.bin", load_cifar10, write_binary)
    add("archive", PLACES | ARCHIVES, "a.tar.gz", lambda folder: load_cifar10(folder / "a.tar.gz"))
    add("npz", PLACES | ARRAYS, "a.npz", lambda folder: load_arrays(folder / "a.npz"))
    add("picture", PLACES | PICTURES, "a.png", lambda folder: read_picture(folder / "a.png", (224, 224)))
    add("folder", FOLDERS, "f", lambda folder: open_data(folder / "f"))
    return cases

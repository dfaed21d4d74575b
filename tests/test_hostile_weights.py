"""Files of weights that lie, swell or nest: each gives one sentence, within 2 seconds of CPU and 300 MB of memory."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_weights_foreign import ABOUT, FOUR, entry, state, tensor, text

from inception.models import create_model
from inception.weights.npz import write_arrays
from inception.weights.pytorch import write_pytorch
from inception.weights.safetensors import write_safetensors

SECONDS, MEGABYTES = 2, 300
Write = Callable[[Path], object]

ONE = tensor((4,), (1,))
PAIRS = b"](" + b"".join(text(f"{i:04}") + b"K\x01\x86" for i in range(1000)) + b"eq\x00"  # remembered as 0
ORDERED = b"ccollections\nOrderedDict\nq\x01"  # remembered as 1
NESTED = b"K\x01" + b"q\x00h\x00\x86" * 200  # 2^200 numbers
TINY: dict[str, np.ndarray] = create_model("googlenet_small", num_classes=4).state_dict()


def pth(
    pickled: bytes, *storages: bytes, how: int = zipfile.ZIP_STORED, twice: int = 1, **members: bytes | str
) -> Write:
    """An archive as PyTorch writes it, with more members if wanted."""

    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", how) as file:
            for i in range(twice):
                file.writestr(f"archive{i or ''}/data.pkl", pickled)
            for key, storage in enumerate(storages or (FOUR,)):
                file.writestr(f"archive/data/{key}", storage)
            for name, content in members.items():
                file.writestr(f"archive/{name.replace('_', '.')}", content)

    return write


def old_pth(content: bytes, keys: Any = ("0",), little_endian: Any = True) -> bytes:
    """The form before PyTorch 1.6, whose persistent identities have a sixth part."""
    heads = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": little_endian}]
    content = content.replace(b"tQ", b"NtQ")
    last = keys if isinstance(keys, bytes) else pickle.dumps(list(keys), 2)
    return b"".join(pickle.dumps(head, 2) for head in heads) + content + last + struct.pack("<q", 4) + FOUR


def header(table: Any, data: bytes = bytes(8)) -> Write:
    """A safetensors file."""
    content = table if isinstance(table, bytes) else json.dumps(table).encode()
    return lambda path: path.write_bytes(struct.pack("<Q", len(content)) + content + data)


def described(**changes: Any) -> Write:
    """Real weights whose description lies."""
    about = {"format": 1, **ABOUT, "model": "googlenet_small", "options": {"num_classes": 4}, **changes}
    return lambda path: write_safetensors(path, TINY, {"about.json": json.dumps(about)})


def about(content: str) -> Write:
    return lambda path: write_safetensors(path, TINY, {"about.json": content})


def npy(descr: str, shape: str, content: bytes = b"", fortran: bool = False) -> bytes:
    words = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(words)) + words + content


def npz(**members: bytes) -> Write:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as file:
            for name, content in members.items():
                file.writestr(f"{name}.npy", content)

    return write


def npz_about(value: dict[str, Any], **arrays: np.ndarray) -> Write:
    return lambda path: write_arrays(path, {"about.json": np.array(json.dumps(value)), **arrays})


def many_members(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", state(("a", ONE)))
        for i in range(20_000):
            file.writestr(f"a/{i}", b"")


def overlapping(path: Path) -> None:
    """Thousands of entries of the directory mean the same bytes."""
    pth(state(("a", ONE)), bytes(100_000))(path)
    content = path.read_bytes()
    start = content.rindex(b"PK\x01\x02", 0, content.rindex(b"PK\x05\x06"))
    last, end = content[start : content.rindex(b"PK\x05\x06")], content[content.rindex(b"PK\x05\x06") :]
    first = struct.unpack("<L", end[16:20])[0]
    directory = content[first:start] + last * 5000
    counted = struct.pack("<HHLL", 5001, 5001, len(directory), first)
    path.write_bytes(content[:first] + directory + end[:8] + counted + end[20:])


def lzma_with_a_window_of_gigabytes(path: Path) -> None:
    pth(state(("a", ONE)), bytes(1000), how=zipfile.ZIP_LZMA)(path)
    path.write_bytes(path.read_bytes().replace(b"\x5d\x00\x00\x80\x00", b"\x5d\xff\xff\xff\xff"))


def gigabytes_compressed(path: Path) -> None:
    """A member that says it takes 2.7 GB of the file for a few hundred bytes."""
    pth(state(("a", ONE)))(path)
    content = path.read_bytes()
    at = content.index(b"PK\x01\x02") + 20
    path.write_bytes(content[:at] + struct.pack("<L", 2_700_000_000) + content[at + 4 :])


ENTRIES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "state_dict", "model_state_dict", "model", "net")
SAME = b"}(" + b"".join(text(str(i)) + b"N" for i in range(20_000)) + b"uq\x05"  # a table, remembered as 5

HOSTILE: dict[str, Write] = {
    # pickles in archives
    "a table of a thousand parts": pth(PAIRS + ORDERED + b"(" + b"h\x00" * 100_000 + b"tR."),
    "ten thousand copies of a table": pth(PAIRS + ORDERED + b"h\x00\x85R" + b"h\x01h\x00\x85R" * 10_000 + b"."),
    "copies of copies": pth(b"](" + (PAIRS + ORDERED + b"h\x00\x85R") + b"h\x01h\x00\x85R" * 30_000 + b"e."),
    "nested tuples as a key": pth(b"}" + NESTED + b"K\x01s."),
    "nested tuples as a storage": pth(NESTED + b"Q."),
    "nested tuples as a name": pth(NESTED + b"h\x00\x93."),
    "nested tuples as a function": pth(NESTED + b")R."),
    "a list in a list, 200,000 deep": pth(b"]" * 200_000 + b"a" * 199_999 + b"."),
    "a tuple in a tuple, 200,000 deep": pth(b")" + b"\x85" * 200_000 + b"."),
    "a million lists": pth(b"]" * (1 << 20) + b"."),
    "a tensor of 100,000 sizes": pth(
        b"(" + b"K\x01" * 100_000 + b"tq\x00" + b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00h\x00h\x00tR."
    ),
    "a number of a million digits": pth(b"L" + b"9" * 1_000_000 + b"L\n."),
    "a whole number of a million digits": pth(b"I" + b"9" * 1_000_000 + b"\n."),
    "three gigabytes in twelve bytes": pth(b"\x96" + struct.pack("<Q", 3 << 30) + b"ab."),
    "a text of two gigabytes": pth(b"X\xff\xff\xff\x7fab."),
    "a text of exabytes": pth(b"\x8d" + b"\xff" * 8 + b"ab."),
    "a command": pth(b"cos\nsystem\n" + text("true") + b"\x85R."),
    "a command by INST": pth(b"(" + text("true") + b"ios\nsystem\n."),
    "an extension": pth(b"\x82\x01."),
    "a table in itself": pth(b"}q\x00" + text("model") + b"h\x00s."),
    "one table under all entries": pth(
        b"}(" + text("x") + SAME + b"".join(text(name) + b"h\x05" for name in ENTRIES) + b"u."
    ),
    "tables of tables under all entries": pth(
        b"}("
        + text("x")
        + SAME
        + b"u}q\x06("
        + b"".join(text(n) + b"h\x05" for n in ENTRIES)
        + b"u}q\x07("
        + b"".join(text(n) + b"h\x06" for n in ENTRIES)
        + b"u}("
        + b"".join(text(n) + b"h\x07" for n in ENTRIES)
        + b"u."
    ),
    "names that steer a terminal": pth(state(("\x1b[31m\a\u202e\n", ONE), ("b", b"K\x01"))),
    # tensors
    "a stride of nothing": pth(state(("a", tensor((1 << 40,), (0,))))),
    "a storage of terabytes": pth(state(("a", tensor((4,), (1,), size=1 << 40)))),
    "no elements, of exabytes": pth(state(("a", tensor((0, 1 << 47, 1 << 47), (1, 1, 1))))),
    "a storage elsewhere": pth(state(("a", tensor((4,), (1,), key="../data.pkl")))),
    "an absolute storage": pth(state(("a", tensor((4,), (1,), key="/etc/passwd")))),
    "a storage of two types": pth(state(("a", ONE), ("b", ONE.replace(b"FloatStorage", b"IntStorage")))),
    # archives
    "a bomb": pth(state(("a", tensor((1 << 24,), (1,), size=1 << 24))), bytes(1 << 26), how=zipfile.ZIP_DEFLATED),
    "bzip2": pth(state(("a", ONE)), os.urandom(100), how=zipfile.ZIP_BZIP2),
    "a window of gigabytes": lzma_with_a_window_of_gigabytes,
    "a member larger than the file": gigabytes_compressed,
    "20,000 members": many_members,
    "the same bytes 5,000 times": overlapping,
    "two pickles": pth(state(("a", ONE)), twice=2),
    "a description without end": pth(state(("a", ONE)), inception_json="[" * 1_000_000),
    "a description 900 deep": pth(state(("a", ONE)), inception_json='{"a":' + "[" * 900 + "]" * 900 + "}"),
    "a description with a long number": pth(state(("a", ONE)), inception_json='{"a": ' + "9" * 1_000_000 + "}"),
    # the old form
    "old: nested tuples as the key of a storage": lambda path: path.write_bytes(
        old_pth(state(("a", ONE)), keys=b"\x80\x02]" + NESTED + b"a.")
    ),
    "old: the end is missing": lambda path: path.write_bytes(old_pth(state(("a", ONE)))[:-8]),
    "old: a storage of terabytes": lambda path: path.write_bytes(
        old_pth(state(("a", tensor((4,), (1,), size=1 << 40))))
    ),
    "old: big-endian": lambda path: path.write_bytes(old_pth(state(("a", ONE)), little_endian=False)),
    "old: copies of a table": lambda path: path.write_bytes(
        old_pth(PAIRS + ORDERED + b"h\x00\x85R" + b"h\x01h\x00\x85R" * 10_000 + b".")
    ),
    "old: a command": lambda path: path.write_bytes(b"\x80\x02cos\nsystem\n" + text("true") + b"\x85R."),
    # safetensors
    "a shape that is a table": header({"a": entry(0, 8, {})}),  # type: ignore[arg-type]
    "no elements, of exabytes, in safetensors": header({"a": entry(0, 0, [0, 1 << 62])}, b""),
    "a header of exabytes": lambda path: path.write_bytes(b"\xff" * 8 + b"{}"),
    "a header without end": header(b'{"a":' + b"[" * 1_000_000),
    "a header 900 deep": header(b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"),
    "a header with a long number": header(b'{"a":' + b"9" * 1_000_000 + b"}"),
    "an array twice": header(b'{"a": {}, "a": {}}'),
    "an array with a name of megabytes": header({"a" * 3_000_000: entry(0, 4, [2])}),
    "100,000 arrays of nothing": header({f"{i}": entry(0, 0, [0]) for i in range(60_000)}, b""),
    "an array that steers a terminal": header({"\x1b[2J\u202e\r": entry(0, 4, [2])}),
    # descriptions
    "a million classes": described(options={"num_classes": 10**6}),
    "a trillion classes": described(options={"num_classes": 10**12}),
    "more classes than NumPy counts": described(options={"num_classes": 1 << 62}),
    "a hundred times as wide": described(options={"num_classes": 4, "width": 100}),
    "endlessly wide": described(options={"num_classes": 4, "width": 1e308}),
    "a billion input channels": described(options={"num_classes": 4, "in_channels": 10**9}),
    "a large network": described(model="inception_resnet_v2"),
    "a seed of 4,000 digits": described(options={"num_classes": 5, "seed": 10**4000}),
    "options that are none": described(options={"num_classes": 4, "form": "x"}),
    "options that are a list": described(options=[1, 2]),
    "a model that is a list": described(model=[["x"]]),
    "a model with a long name": described(model="x" * 1_000_000),
    "a model that steers a terminal": described(model="\x1b[31m\x07\u2028"),
    "pictures of 20,000 pixels a side": described(size=[20_000, 20_000]),
    "classes in classes": described(classes=[[["a"]]] * 4),
    "too many classes": described(classes=["a"] * 200_000),
    "a description in safetensors without end": about("[" * 1_000_000),
    "a description in safetensors 900 deep": about('{"format": 1, "a":' + "[" * 900 + "]" * 900 + "}"),
    "a description of another format": about('{"format": "' + "9" * 100_000 + '"}'),
    # .npz
    "no array": npz(a=b"no array"),
    "an array of terabytes": npz(a=npy("'<f4'", "(1099511627776,)", FOUR)),
    "an array of a million sizes": npz(a=npy("'<f4'", "(" + "1," * 20_000 + ")", FOUR)),
    "texts of no length, 200 million of them": npz(a=npy("'<U0'", "(200000000,)")),
    "objects": npz(a=npy("'|O'", "(1,)", pickle.dumps([1]))),
    "one element of two gigabytes": npz(a=npy("'|V2147483647'", "(1,)", FOUR)),
    "a header of brackets": npz(a=npy("'<f4'", "(" * 5000 + ")" * 5000, FOUR)),
    "a negative shape": npz(a=npy("'<f4'", "(-1, -4)", FOUR)),
    "a compressed bomb": lambda path: np.savez_compressed(path, a=np.zeros(1 << 24, np.float32)),
    "an average of nothing": npz_about(
        {"format": 1, "average_count": 10**400}, **{"checkpoint.json": np.array("{}"), "average/a": np.ones(3)}
    ),
    "an average by a text": npz_about(
        {"format": 1, "average_count": "x"}, **{"checkpoint.json": np.array("{}"), "average/a": np.ones(3)}
    ),
    "a description in .npz that is a number": npz_about(3),  # type: ignore[arg-type]
    # no files
    "nothing": lambda path: path.write_bytes(b""),
    "a pipe": lambda path: os.mkfifo(path),
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
    "a directory": lambda path: path.mkdir(),
    "a link to itself": lambda path: path.symlink_to(path),
}

CHILD = f"""
import json, os, resource, sys, time
from pathlib import Path
from inception.weights import WeightsError, load_model
load_model(Path(sys.argv[1]) / "good")  # whatever is imported late is now
pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
for number in range(int(sys.argv[2])):
    reader, writer = os.pipe()
    if not (child := os.fork()):
        resource.setrlimit(resource.RLIMIT_AS, (pages + ({MEGABYTES} << 20),) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, ({SECONDS}, {SECONDS} + 1))
        try:
            load_model(Path(sys.argv[1]) / str(number))
            said = "read"
        except WeightsError as error:
            said = "said " + str(error)
        except BaseException as error:
            said = f"{{type(error).__name__}} {{error}}"
        os.write(writer, said.encode()[:60000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        said = answer.read().decode()
    _, status = os.waitpid(child, 0)
    print(json.dumps(said or f"ended by signal {{status}}"), flush=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures memory as Linux does")
def test_hostile_files(tmp_path: Path) -> None:
    write_pytorch(tmp_path / "good", TINY, {"format": 1, **ABOUT, "model": "googlenet_small",
                                            "options": {"num_classes": 4}})  # fmt: skip
    for number, write in enumerate(HOSTILE.values()):
        write(tmp_path / str(number))
        made = tmp_path / f"{number}.npz"  # NumPy adds a suffix
        if made.exists():
            made.rename(tmp_path / str(number))
    before = sorted(os.listdir(tmp_path))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CHILD, str(tmp_path), str(len(HOSTILE))],
        capture_output=True,
        text=True,
        timeout=60 + 3 * len(HOSTILE),
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "MINIGRAD_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = dict(zip(HOSTILE, map(json.loads, done.stdout.splitlines()), strict=True))
    wrong = {
        kind: answer[:300]
        for kind, answer in said.items()
        if not answer.startswith(f"said {tmp_path}/")
        or not answer.isprintable()
        or len(answer) > len(str(tmp_path)) + 1200
        or "MemoryError" in answer
    }
    assert not wrong
    assert len(HOSTILE) >= 80
    assert sorted(os.listdir(tmp_path)) == before


def test_the_files_are_hostile_for_what_they_say(tmp_path: Path) -> None:
    """The builders make files that are read where they do not lie."""
    from inception.weights import load_model, load_weights

    described()(tmp_path / "described")
    load_model(tmp_path / "described")
    (tmp_path / "old").write_bytes(old_pth(state(("a", ONE))))
    pth(state(("a", ONE)), inception_json='{"format": 1}')(tmp_path / "new")
    npz_about({"format": 1}, a=np.float32([1, 2, 3, 4]))(tmp_path / "npz")
    header({"a": entry(0, 16, [4])}, FOUR)(tmp_path / "safetensors")
    npz(a=npy("'<f4'", "(4,)", FOUR), **{"about.json": npy("'<U13'", "()", '{"format": 1}'.encode("utf-32-le"))})(
        tmp_path / "by hand"
    )
    for name in ("old", "new", "npz", "safetensors", "by hand"):
        assert load_weights(tmp_path / name)[0]["a"].tolist() == [1, 2, 3, 4]

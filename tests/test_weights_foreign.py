"""Weights of other programs, and for them: safetensors and PyTorch files, and what strangers put in them."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_weights import ABOUT as PLAIN_ABOUT

from inception.models import create_model, list_models
from inception.weights import WeightsError, load_model, load_weights, save_weights
from inception.weights.pytorch import write_pytorch
from inception.weights.safetensors import read_safetensors, write_safetensors
from minigrad import nn
from minigrad.random import Key, normal

ABOUT = PLAIN_ABOUT | {"recipe": {"lr": 0.1}}
FORMS = [".npz", ".safetensors", ".pth"]


@pytest.fixture
def bounded() -> Iterator[None]:
    """Within the test no more than 64 MB may be in use at a time."""
    tracemalloc.start()
    yield
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 64 << 20


def refuse(path: Path) -> str:
    """Reading must fail with one sentence that names the file."""
    with pytest.raises(WeightsError) as caught:
        load_weights(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < len(str(path)) + 500
    return message


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype and one[n].shape == other[n].shape and one[n].tobytes() == other[n].tobytes()
        for n in one
    )


# ---- out and back ----


@pytest.mark.parametrize("suffix", FORMS)
@pytest.mark.parametrize("heads", [False, True])
def test_out_and_back_to_the_bit(tmp_path: Path, suffix: str, heads: bool) -> None:
    about = ABOUT | {"options": {"num_classes": 4, "aux_logits": heads}}
    model = create_model("googlenet_small", **about["options"], seed=3)
    odd = [-0.0, np.nan, np.float32(1e-45), np.inf]
    model.fc1.bias.data[...] = odd
    path = tmp_path / f"w{suffix}"
    save_weights(path, model, about)
    loaded, found = load_model(path)
    assert same(loaded.state_dict(), model.state_dict())
    assert found == {"format": 1, **about}
    first = path.read_bytes()
    save_weights(path, loaded, about)
    assert path.read_bytes() == first or suffix == ".npz"  # whose members have a date


@pytest.mark.parametrize("name", list_models())
def test_every_network_goes_through_a_pytorch_file(tmp_path: Path, name: str) -> None:
    """By the names of its project, where it has one; no two arrays may get one name."""
    options = {"num_classes": 3, "width": 0.25 if name.startswith("googlenet_s") else 0.125}
    model = create_model(name, **options)
    path = tmp_path / "w.pth"
    save_weights(path, model, ABOUT | {"model": name, "options": options, "classes": ["a", "b", "c"]})
    assert same(load_model(path)[0].state_dict(), model.state_dict())


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    for suffix in FORMS:
        path = tmp_path / f"w{suffix}"
        path.write_bytes(b"old")
        with pytest.raises(TypeError):
            save_weights(path, nn.Linear(2, 3), {"mean": np.zeros(3)})
        assert path.read_bytes() == b"old"
    for write in (write_safetensors, write_pytorch):
        with pytest.raises(WeightsError, match=r"w\.x: name is complex64"):
            write(tmp_path / "w.x", {"name": np.zeros(3, np.complex64)}, {})
    assert sorted(os.listdir(tmp_path)) == sorted(f"w{suffix}" for suffix in FORMS)


# ---- safetensors ----


def tensors(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(start: int, end: int, shape: list[Any], dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_safetensors_by_hand(tmp_path: Path) -> None:
    """As the format's own text describes it, with bfloat16, and an array without elements."""
    header = {
        "__metadata__": {"format": "pt"},
        "b": entry(8, 12, [2], "BF16"),
        "a": entry(0, 8, [1, 2]),
        "none": entry(12, 12, [0, 3]),
    }
    path = tensors(tmp_path / "w.safetensors", header, struct.pack("<2f", 1.5, -2) + bytes([0x80, 0x3F, 0x20, 0xC0]))
    arrays, texts = read_safetensors(path)
    assert {name: array.tolist() for name, array in arrays.items()} == {"a": [[1.5, -2]], "b": [1, -2.5], "none": []}
    assert arrays["none"].shape == (0, 3)
    assert texts == {"format": "pt"}
    assert load_weights(path)[1] == {}


HEADERS: dict[str, tuple[Any, str]] = {
    "overlap": ({"a": entry(0, 8, [2]), "b": entry(4, 8, [1])}, "overlaps 'a'"),
    "the same bytes twice": ({"a": entry(0, 8, [2]), "b": entry(0, 8, [2])}, "overlaps"),
    "hole": ({"a": entry(0, 4, [1]), "b": entry(5, 8, [3], "U8")}, "leaves a hole after 'a'"),
    "beyond the end": ({"a": entry(0, 12, [3])}, "cut short"),
    "more behind": ({"a": entry(0, 4, [1])}, "more behind"),
    "wrong shape": ({"a": entry(0, 8, [3])}, "'a' of shape (3,) in F32 has 8 bytes, it would need 12"),
    "enormous shape": ({"a": entry(0, 8, [1 << 62, 1 << 62])}, "'a' of shape"),
    "backwards": ({"a": entry(8, 0, [2])}, "'a' of shape"),
    "negative": ({"a": entry(-8, 0, [2])}, "does not say what 'a' is"),
    "negative shape": ({"a": entry(0, 8, [-1, -2])}, "does not say what 'a' is"),
    "a truth for a size": ({"a": entry(0, 8, [True, 2])}, "does not say what 'a' is"),
    "fraction": ({"a": entry(0, 8, [2.0])}, "does not say what 'a' is"),
    "unknown type": ({"a": entry(0, 8, [2], "F8_E4M3")}, "does not say what 'a' is"),
    "a list for a type": ({"a": entry(0, 8, [2], ["F32"])}, "does not say what 'a' is"),
    "many dimensions": ({"a": entry(0, 8, [1] * 70)}, "does not say what 'a' is"),
    "no entry": ({"a": 3}, "does not say what 'a' is"),
    "a list": ([1, 2], "no table of arrays"),
    "metadata": ({"__metadata__": {"a": 1}}, "__metadata__"),
    "not JSON": (b"{'a': 1}", "damaged"),
    "not text": (b"{\xff\xfe}", "damaged"),
    "twice": (b'{"a": {}, "a": {}}', "a name stands twice"),
    "deep": (b'{"a":' + b"[" * 100_000, "damaged"),
    "long number": (b'{"a":' + b"9" * 100_000 + b"}", "damaged"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_lies(tmp_path: Path, bounded: None, kind: str) -> None:
    header, says = HEADERS[kind]
    assert says in refuse(tensors(tmp_path / "w.safetensors", header, bytes(8)))


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 1 << 40, 100])
def test_a_header_longer_than_the_file(tmp_path: Path, bounded: None, length: int) -> None:
    assert f"{length:,} bytes" in refuse(tensors(tmp_path / "w.safetensors", {}, length=length))


def test_a_header_of_many_megabytes(tmp_path: Path, bounded: None) -> None:
    """A sparse file: its header could be read, and would be a hundred times as large in memory."""
    path = tensors(tmp_path / "w.safetensors", b"{", length=1 << 33)
    os.truncate(path, (1 << 33) + 8)
    assert "would be long" in refuse(path)


def test_safetensors_cut_short_or_changed_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {"a": np.arange(5, dtype=np.float32), "b": np.ones((2, 3))}, {"k": "v"})
    content = path.read_bytes()
    for end in range(len(content)):
        path.write_bytes(content[:end])
        refuse(path)
    choose = random.Random(0)
    for _ in range(1500):
        damaged = bytearray(content)
        damaged[choose.randrange(len(content))] = choose.randrange(256)
        path.write_bytes(damaged)
        try:
            arrays, _ = load_weights(path)
        except WeightsError:
            continue
        assert sum(array.nbytes for array in arrays.values()) <= 68


# ---- PyTorch's files ----


def archive(path: Path, pickled: bytes, *storages: bytes, how: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", how) as file:
        file.writestr("archive/data.pkl", pickled)
        for key, storage in enumerate(storages):
            file.writestr(f"archive/data/{key}", storage)
    return path


def text(string: str) -> bytes:
    return b"X" + struct.pack("<I", len(string.encode())) + string.encode()


def tensor(
    shape: tuple[int, ...], strides: tuple[int, ...], *, key: str = "0", size: int = 4, offset: int = 0
) -> bytes:
    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(pickle.dumps(value, 2)[2:-1] for value in values) + b"t"

    storage = (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + numbers((size,))[1:-1] + b"tQ"
    )
    rest = numbers((offset,))[1:-1] + numbers(shape) + numbers(strides) + b"\x89}"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR"


def state(*entries: tuple[str, bytes]) -> bytes:
    return b"\x80\x02}(" + b"".join(text(name) + content for name, content in entries) + b"u."


FOUR = struct.pack("<4f", 1, 2, 3, 4)


def test_pytorch_by_hand(tmp_path: Path) -> None:
    """Two tensors of one storage, one of them transposed."""
    pickled = state(("a.weight", tensor((2, 2), (1, 2))), ("b", tensor((2,), (1,), offset=2)))
    arrays, about = load_weights(archive(tmp_path / "w.pth", pickled, FOUR))
    assert {name: array.tolist() for name, array in arrays.items()} == {"a.weight": [[1, 3], [2, 4]], "b": [3, 4]}
    assert about == {}


TENSORS = {
    "beyond the end": tensor((5,), (1,)),
    "offset": tensor((4,), (1,), offset=1),
    "stride": tensor((2, 2), (3, 1)),
    "one number a billion times": tensor((1 << 30,), (0,)),
    "2^96 numbers": tensor((1 << 32, 1 << 32, 1 << 32), (0, 0, 0)),
    "negative": tensor((-1,), (1,)),
    "negative offset": tensor((1,), (1,), offset=-4),
    "two sizes, one stride": tensor((2, 2), (1,)),
    "no such storage": tensor((1,), (1,), key="1"),
    "another place": tensor((1,), (1,), key="../data.pkl"),
    "more than there is": tensor((4,), (1,), size=1 << 40),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_a_tensor_that_lies(tmp_path: Path, bounded: None, kind: str) -> None:
    refuse(archive(tmp_path / "w.pth", state(("a", TENSORS[kind])), FOUR))


class Touch:
    """Unpickled, it makes a folder."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.sentinel),)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("place", ["alone", "in a state dict", "beside one", "as a key"])
@pytest.mark.parametrize("form", ["archive", "bare"])
def test_a_pickle_that_would_run_code(tmp_path: Path, protocol: int, place: str, form: str) -> None:
    sentinel = tmp_path / "executed"
    bad = Touch(sentinel)
    content = {
        "alone": bad,
        "in a state dict": OrderedDict(a=bad),
        "beside one": {"state_dict": {}, "optimizer": [bad]},
        "as a key": {bad: 1},
    }[place]
    path, pickled = tmp_path / "w.pth", pickle.dumps(content, protocol)
    archive(path, pickled) if form == "archive" else path.write_bytes(pickled)
    assert "nothing of it was run" in (message := refuse(path))
    assert not sentinel.exists()
    if protocol in (2, 3, 4, 5) and place != "beside one":
        assert f"names {os.mkdir.__module__}.mkdir" in message


@pytest.mark.parametrize(
    ("pickled", "says"),
    [
        (b"cos\nsystem\n(" + text("true") + b"tR.", "names os.system"),
        (b"\x80\x04" + text("builtins") + text("eval") + b"\x93.", "names builtins.eval"),
        (b"cpytorch_lightning.x\nY\n)R.", "calls pytorch_lightning.x.Y"),
        (b"(" + text("true") + b"ios\nsystem\n.", "instruction INST"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)b.", "fills a OrderedDict"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n.", "no state dict"),
        (b"\x80\x02}.", "no state dict"),
        (b"\x80\x02N.", "no state dict"),
        (b"\x80\x02}" + text("a") + b"K\x01s.", "'a' is no tensor but int"),
        (b"\x80\x02}" + b"K\x01K\x01\x86" + b"K\x01s.", "tuple as a key"),
        (b"\x80\x02", ""),
        (b"\x80\x02t.", ""),
        (b"\x80\x02.", ""),
        (b"\x80\x02h\x07.", ""),
        (b"\x80\x02]]R.", "calls list"),
        (b"\x8b\xff\xff\xff\x7f.", ""),
        (b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7fa.", ""),
    ],
)
def test_pickles_that_no_state_dict_needs(tmp_path: Path, bounded: None, pickled: bytes, says: str) -> None:
    assert says in refuse(archive(tmp_path / "w.pth", pickled))
    (tmp_path / "w.pth").write_bytes(pickled)
    refuse(tmp_path / "w.pth")


def test_a_pickle_that_grows(tmp_path: Path, bounded: None) -> None:
    """A list of two of a list of two of …, as a name, a key, a call: to print or to hash it would take for ever.
    And a million empty lists."""
    nested = b"\x80\x02K\x01" + b"q\x00h\x00\x86" * 200
    for end in (b")R.", b"Q.", b"}q\x01" + b"0}h\x00K\x01s.", b"K\x01}b.", b"h\x00\x93."):
        refuse(archive(tmp_path / "w.pth", nested + end))
    refuse(archive(tmp_path / "w.pth", b"\x80\x02" + b"]" * (1 << 19) + b"."))


def test_zip_bombs(tmp_path: Path, bounded: None) -> None:
    zeros = bytes(1 << 25)
    path = archive(
        tmp_path / "w.pth", state(("a", tensor((1 << 23,), (1,), size=1 << 23))), zeros, how=zipfile.ZIP_DEFLATED
    )
    del zeros
    assert path.stat().st_size < 1 << 20
    assert "promise" in refuse(path)
    np.savez_compressed(tmp_path / "w.npz", a=np.zeros(1 << 20, np.float32))
    assert "promise" in refuse(tmp_path / "w.npz")


def test_pytorch_files_cut_short_or_changed_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    write_pytorch(path, {"a": np.arange(5, dtype=np.float32), "b": np.ones((2, 3))}, {"k": "v"})
    content = path.read_bytes()
    for end in range(0, len(content), 7):
        path.write_bytes(content[:end])
        refuse(path)
    choose = random.Random(0)
    for _ in range(600):
        damaged = bytearray(content)
        damaged[choose.randrange(len(content))] ^= 1 << choose.randrange(8)
        path.write_bytes(damaged)
        try:
            arrays, _ = load_weights(path)
        except WeightsError:
            continue
        assert arrays["a"].tolist() == [0, 1, 2, 3, 4]


# ---- PyTorch itself ----


@pytest.mark.parametrize("new", [True, False])
def test_pytorch_and_we_read_each_other(tmp_path: Path, new: bool) -> None:
    torch = pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")
    theirs = torch.nn.Sequential(torch.nn.Conv2d(3, 4, (1, 3)), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2))
    state = theirs.state_dict()
    state["transposed"] = torch.arange(6.0).reshape(2, 3).T
    state["part"] = torch.arange(10, dtype=torch.float64)[3:7]
    state["half"] = torch.tensor([1.5, -2]).half()
    path = tmp_path / "w.pth"
    for content in (state, {"epoch": 3, "state_dict": state, "rest": [1, 2.5, None, True, ("a", {})]}):
        torch.save(content, path, _use_new_zipfile_serialization=new)
        arrays, about = load_weights(path)
        assert same(arrays, {name: value.numpy() for name, value in state.items()})
        assert about == {}
    optimizer = torch.optim.Adam(theirs.parameters())
    theirs(torch.randn(2, 3, 1, 6)).sum().backward()
    optimizer.step()
    torch.save({"state_dict": theirs.state_dict(), "optimizer": optimizer.state_dict()}, path,
               _use_new_zipfile_serialization=new)  # fmt: skip
    arrays, _ = load_weights(path)
    assert same(arrays, {name: value.numpy() for name, value in theirs.state_dict().items()})
    torch.save({"a": torch.tensor([1, 2.5]).bfloat16()}, path, _use_new_zipfile_serialization=new)
    assert load_weights(path)[0]["a"].tolist() == [1, 2.5]
    torch.save(theirs, path, _use_new_zipfile_serialization=new)  # a module: code, not weights
    assert "names torch.nn.modules.container.Sequential" in refuse(path)


def test_what_we_write_pytorch_loads(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")
    arrays = {
        "weight": normal(Key(1), (3, 2, 1, 3)).astype(np.float32).transpose(1, 0, 3, 2),
        "long": np.array(7),
        "none": np.zeros((0, 3)),
        "bool": np.array([True, False]),
    }
    write_pytorch(tmp_path / "w.pth", arrays, {"classes": ["a"]})
    loaded = torch.load(tmp_path / "w.pth", weights_only=True)
    assert type(loaded) is OrderedDict
    assert same({name: value.numpy() for name, value in loaded.items()}, arrays)
    layer = torch.nn.BatchNorm2d(3)
    model = nn.BatchNorm2d(3)
    model.running_var.data[...] = [1, 2, 3]
    save_weights(tmp_path / "n.pth", model, {})
    layer.load_state_dict(torch.load(tmp_path / "n.pth", weights_only=True))
    assert layer.running_var.tolist() == [1, 2, 3]


def test_an_archive_without_a_pickle_and_a_strange_description(tmp_path: Path) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("a/b", "c")
    (tmp_path / "w.pth").write_bytes(content.getvalue())
    assert "without data.pkl" in refuse(tmp_path / "w.pth")
    with zipfile.ZipFile(archive(tmp_path / "w.pth", state(("a", tensor((1,), (1,)))), FOUR), "a") as file:
        file.writestr("archive/inception.json", "[1]")
    assert "no description" in refuse(tmp_path / "w.pth")

"""Weights on disk: what is written comes back bit for bit, and a file that is anything else is refused by name."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inception.files import FileError, check_place
from inception.models import create_model
from inception.weights import FORMAT, WeightsError, load_model, load_weights, read_arrays, save_weights
from inception.weights.pytorch import write_pytorch
from minigrad import Tensor, nn, no_grad
from minigrad.backend import asarray, to_host
from minigrad.random import Key, normal, seeded

ABOUT = {
    "model": "googlenet_small",
    "options": {"num_classes": 4, "aux_logits": False},
    "classes": ["ant", "bee", "čmelák", "\N{BUTTERFLY}"],
    "mean": [0.1, 1 / 3, 0.5],
    "std": [0.25, 0.2, 1e-300],
    "size": [32, 32],
    "test_accuracy": 0.5,
}


class Tiny(nn.Module):
    """A few arrays of each kind, so that the file is small enough to damage it everywhere."""

    def __init__(self) -> None:
        with seeded(1):
            self.conv = nn.Conv2d(2, 3, 1)
            self.norm = nn.BatchNorm2d(3)


def refuse(path: Path, read: Callable[[Path], Any] = load_weights) -> str:
    """Reading must fail with one sentence that names the file."""
    with pytest.raises(WeightsError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < len(str(path)) + 400
    return message.removeprefix(f"{path}: ")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.npz"
    save_weights(path, Tiny(), ABOUT)
    return path


def rewritten(path: Path, **changes: Any) -> Path:
    """The file again, with arrays replaced, added, or (None) left out; `about` is given as a JSON value."""
    with np.load(path) as file:
        arrays: dict[str, Any] = {name: file[name] for name in file.files}
    if "about" in changes:
        arrays["about.json"] = np.array(json.dumps(changes.pop("about")))
    arrays = {name: value for name, value in (arrays | changes).items() if value is not None}
    np.savez(path, allow_pickle=True, **arrays)
    return path


# ---- What is written comes back ----


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model = Tiny()
    odd = np.array([np.float32(-0.0), np.nan, np.float32(1e-45)], np.float32)  # a sign, no number, a subnormal
    model.norm.gamma.data[...] = odd
    save_weights(tmp_path / "w.npz", model, ABOUT)
    arrays, about = load_weights(tmp_path / "w.npz")
    wanted = model.state_dict()
    assert list(arrays) == list(wanted)
    for name, value in wanted.items():
        assert arrays[name].dtype == value.dtype
        assert arrays[name].shape == value.shape
        assert arrays[name].tobytes() == value.tobytes()
    assert about == {"format": FORMAT, **ABOUT}


def test_a_model_comes_back_with_its_answers(xp: Any, tmp_path: Path) -> None:
    """On every backend, in evaluation mode, with the running statistics that it had."""
    model = create_model("googlenet_small", num_classes=4, seed=5)
    for name, buffer in model.named_buffers():
        buffer.data[...] = asarray(0.5 + np.abs(normal(Key(2).fold(name), buffer.shape)).astype(np.float32))
    save_weights(tmp_path / "w.npz", model, ABOUT)
    loaded, about = load_model(tmp_path / "w.npz")
    assert not any(module.training for _, module in loaded.named_modules())
    assert about["classes"] == ABOUT["classes"]
    x = Tensor(asarray(normal(Key(3), (2, 3, 8, 8)).astype(np.float32)))
    with no_grad():
        np.testing.assert_array_equal(to_host(loaded(x).data), to_host(model.eval()(x).data))


def test_weights_with_heads_come_back_with_heads(tmp_path: Path) -> None:
    model = create_model("googlenet_small", num_classes=4, aux_logits=True)
    save_weights(tmp_path / "w.npz", model, ABOUT | {"options": {"num_classes": 4, "aux_logits": True}})
    loaded, _ = load_model(tmp_path / "w.npz")
    wanted = model.state_dict()
    assert all(np.array_equal(value, wanted[name]) for name, value in loaded.state_dict().items())
    assert any(name.startswith("aux1.") for name in wanted)


def test_nothing_in_the_file_needs_pickle(saved: Path) -> None:
    with zipfile.ZipFile(saved) as file:
        for name in file.namelist():
            np.lib.format.read_array(io.BytesIO(file.read(name)), allow_pickle=False)


def test_saving_again_replaces_the_file(saved: Path) -> None:
    other = Tiny()
    other.conv.weight.data[...] = 7
    save_weights(saved, other, ABOUT | {"size": [8, 8]})
    arrays, about = load_weights(saved)
    assert (arrays["conv.weight"] == 7).all()
    assert about["size"] == [8, 8]
    assert os.listdir(saved.parent) == [saved.name]


def test_a_path_without_a_folder_or_a_suffix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy.savez would add .npz to a name; what was asked for is what is written."""
    monkeypatch.chdir(tmp_path)
    save_weights(Path("weights"), Tiny(), ABOUT)
    assert os.listdir() == ["weights"]
    assert load_weights(Path("weights"))[1]["size"] == [32, 32]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_others_may_read_the_file_as_far_as_the_umask_allows(tmp_path: Path) -> None:
    """Temporary files are made for their owner alone; weights are an ordinary file."""
    before = os.umask(0o022)
    try:
        save_weights(tmp_path / "w.npz", Tiny(), ABOUT)
        assert (tmp_path / "w.npz").stat().st_mode & 0o777 == 0o644
        os.umask(0o077)
        save_weights(tmp_path / "w.npz", Tiny(), ABOUT)
        assert (tmp_path / "w.npz").stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)


# ---- All or nothing ----


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["np.savez", "os.fsync", "os.replace"])
def test_a_failure_while_writing_leaves_the_old_file(
    saved: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, where: str
) -> None:
    before = saved.read_bytes()

    def fail(first: Any, *_: Any, **__: Any) -> None:
        if where == "np.savez":
            first.write(b"half of it")
        raise error

    monkeypatch.setattr(f"inception.{'weights.npz' if where == 'np.savez' else 'files'}.{where}", fail)
    with pytest.raises(FileError if isinstance(error, OSError) else type(error)) as caught:
        save_weights(saved, Tiny(), ABOUT)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]
    if isinstance(error, OSError):
        assert str(caught.value) == f"{saved} could not be written ({error.strerror})"


def test_a_description_that_is_not_json_changes_nothing(saved: Path) -> None:
    before = saved.read_bytes()
    with pytest.raises(TypeError):
        save_weights(saved, Tiny(), ABOUT | {"mean": np.zeros(3)})
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


# ---- Damaged files ----


def test_a_file_cut_short_anywhere(saved: Path) -> None:
    content = saved.read_bytes()
    for end in [*range(0, len(content), 41), len(content) - 1]:
        saved.write_bytes(content[:end])
        refuse(saved)


def test_a_flipped_bit_anywhere_is_refused_or_without_effect(saved: Path) -> None:
    """Some bits mean nothing, like those of a date. No other may change an array or raise anything else."""
    content = saved.read_bytes()
    wanted, about = load_weights(saved)
    refusals = []
    for i in range(len(content)):
        damaged = bytearray(content)
        damaged[i] ^= 1 << (i * 5 % 8)
        saved.write_bytes(damaged)
        try:
            arrays, description = load_weights(saved)
        except WeightsError as error:
            refusals.append(str(error))
        except Exception as error:
            raise AssertionError(f"bit flipped in byte {i}: {type(error).__name__}: {error}") from error
        else:
            assert description == about, f"bit flipped in byte {i}"
            assert list(arrays) == list(wanted), f"bit flipped in byte {i}"
            assert all(arrays[name].tobytes() == wanted[name].tobytes() for name in wanted), f"byte {i}"
    assert len(refusals) > len(content) / 2
    assert all(message.startswith(f"{saved}: ") and "\n" not in message for message in refusals)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello, I am a text file\n",
        b"\x00" * 1000,
        b"PK\x03\x04",
        b"PK\x05\x06" + b"\x00" * 18,  # a zip archive with nothing in it
        b"\x93NUMPY",
        b"\x80\x04.",
        b"\xff\xd8\xff\xe0 a picture",
    ],
)
def test_a_file_of_another_kind(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.npz").write_bytes(content)
    refuse(tmp_path / "w.npz")


def test_a_bare_array_a_folder_and_nothing(tmp_path: Path) -> None:
    np.save(tmp_path / "w.npy", np.zeros(3))
    assert "not a weights file" in refuse(tmp_path / "w.npy")
    refuse(tmp_path)
    assert "no such file" in refuse(tmp_path / "nowhere.npz")


def test_an_array_that_claims_to_be_enormous(saved: Path) -> None:
    """A header of a hundred bytes may name any shape; the promise alone must not end the program."""
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000, 100), }".ljust(117) + b"\n"
    with zipfile.ZipFile(saved, "a") as file:
        file.writestr("big.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    refuse(saved)


# ---- Hostile files ----


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.sentinel),)


@pytest.mark.parametrize("name", ["conv.weight", "about.json", "extra"])
def test_a_pickle_inside_is_not_executed(saved: Path, name: str) -> None:
    sentinel = saved.parent / "executed"
    payload = np.array([Touch(sentinel)], dtype=object)
    rewritten(saved, **{name: payload})
    refuse(saved)
    refuse(saved, load_model)
    assert not sentinel.exists()


def test_a_bare_pickle_is_not_executed(tmp_path: Path) -> None:
    sentinel = tmp_path / "executed"
    (tmp_path / "w.npz").write_bytes(pickle.dumps(Touch(sentinel)))
    refuse(tmp_path / "w.npz")
    assert not sentinel.exists()


# ---- Sound files that are not what is wanted ----


def test_an_npz_of_another_program(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", a=np.zeros(3))
    assert "not written by this project" in refuse(tmp_path / "w.npz")


def test_a_zip_archive_with_other_things_in_it(saved: Path) -> None:
    with zipfile.ZipFile(saved, "a") as file:
        file.writestr("readme.txt", "no array")
    refuse(saved, load_model)


def test_another_format_version(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inception.weights.npz.FORMAT", FORMAT + 1)
    save_weights(saved, Tiny(), ABOUT)
    monkeypatch.undo()
    message = refuse(saved)
    assert f"format {FORMAT + 1}" in message
    assert f"reads format {FORMAT}" in message


@pytest.mark.parametrize("about", [[], "text", 3, None, {}, {"model": "googlenet_small"}, {"format": [1]}])
def test_a_description_that_describes_nothing(saved: Path, about: Any) -> None:
    refuse(rewritten(saved, about=about))


@pytest.mark.parametrize("content", [np.array("{"), np.zeros(3), np.array(b"\xff\xfe"), np.array(["a", "b"])])
def test_a_description_that_is_not_json(saved: Path, content: np.ndarray) -> None:
    refuse(rewritten(saved, **{"about.json": content}))


@pytest.mark.parametrize(
    "change",
    [
        {"model": None},
        {"options": None},
        {"model": "vgg16"},
        {"model": ["googlenet_small"]},
        {"options": ["num_classes"]},
        {"options": {"colour": "red"}},
        {"options": {"num_classes": "ten"}},
        {"options": {"num_classes": -1}},
        {"options": {"seed": "one"}},
    ],
)
def test_a_description_of_a_model_that_cannot_be_built(saved: Path, change: dict[str, Any]) -> None:
    about = {"format": FORMAT, **ABOUT, **change}
    refuse(rewritten(saved, about={key: value for key, value in about.items() if value is not None}), load_model)


def test_weights_of_another_model(saved: Path) -> None:
    """Those of Tiny, described as those of GoogLeNet: both what is missing and what is too much is told."""
    message = refuse(saved, load_model)
    assert "missing" in message
    assert "unexpected" in message


def test_weights_for_another_number_of_classes(tmp_path: Path) -> None:
    save_weights(tmp_path / "w.npz", create_model("googlenet_small", num_classes=7), ABOUT)
    assert "fc1.weight has (7, 128), the model wants (4, 128)" in refuse(tmp_path / "w.npz", load_model)


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    path = tmp_path / "w.npz"
    save_weights(path, create_model("googlenet_small", num_classes=4), ABOUT)
    rewritten(path, **{"fc1.bias": np.array(["a", "b", "c", "d"])})
    refuse(path, load_model)


def test_a_file_is_closed_after_reading(saved: Path) -> None:
    """An open file would be a ResourceWarning here, and cannot be replaced on Windows."""
    load_weights(saved)
    rewritten(saved, about=[])
    refuse(saved)
    saved.unlink()


def test_what_is_no_weights_file_at_all(tmp_path: Path) -> None:
    """NumPy would advise to load it with pickle."""
    for name in ("w.npz", "notes.txt", "a.png"):
        (tmp_path / name).write_bytes(b"hello, this is a text")
        assert refuse(tmp_path / name) == "not a weights file (.npz), or damaged or cut short"
    (tmp_path / "w.pth").write_bytes(b"hello, this is a text")
    assert refuse(tmp_path / "w.pth") == "not a PyTorch file, or damaged"
    assert refuse(tmp_path) == "a directory, not a file: name a file"


def test_a_place_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "notes").touch()
    for path in (tmp_path / "notes" / "w.npz", tmp_path / "notes" / "a" / "w.npz"):
        with pytest.raises(FileError, match=r"w\.npz cannot be written \(.*notes is a file, not a directory\)"):
            check_place(path)
    with pytest.raises(FileError, match=r"cannot be written \(it is a directory or a device\): name a file"):
        check_place(tmp_path)


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's, for one: whoever runs the tests may be root, whom no file refuses."""

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("os.open", refused)
    assert refuse(tmp_path / "w.npz", read_arrays) == "cannot be read (Permission denied)"


def test_another_network_than_the_weights_are_of(tmp_path: Path) -> None:
    save_weights(tmp_path / "w.npz", create_model("googlenet_small", num_classes=4), ABOUT)
    assert refuse(tmp_path / "w.npz", lambda path: load_model(path, "googlenet")) == (
        "it holds googlenet_small, not googlenet: leave out --model"
    )


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".onnx"])
def test_a_name_that_promises_another_kind_of_file(tmp_path: Path, suffix: str) -> None:
    """An .npz under such a name would be read as what the name says."""
    with pytest.raises(WeightsError, match=rf"weights are written as \.npz, \.safetensors or \.pth, not as {suffix}"):
        save_weights(tmp_path / f"w{suffix}", Tiny(), ABOUT)
    assert not list(tmp_path.iterdir())


def test_a_place_that_fails_even_to_be_cleaned_up(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="could not be written"):
        save_weights(tmp_path / "file" / "w.npz", Tiny(), ABOUT)


def test_a_member_that_is_no_array(saved: Path) -> None:
    with zipfile.ZipFile(saved, "a") as archive:
        archive.writestr("notes.npy", b"no array")
    with pytest.raises(WeightsError, match="'notes' in it is no array"):
        load_weights(saved)


@pytest.mark.parametrize("classes", [["a", "b"], 5, [1, 2, 3, 4], None], ids=str)
def test_names_that_are_not_those_of_the_outputs(tmp_path: Path, classes: Any) -> None:
    model = create_model("googlenet_small", num_classes=4)
    about = ABOUT | {"model": "googlenet_small", "options": {"num_classes": 4}, "classes": classes}
    save_weights(tmp_path / "w.npz", model, about)
    with pytest.raises(WeightsError, match=r"w\.npz: classes must be the 4 names of the outputs, in order, got"):
        load_model(tmp_path / "w.npz")


def test_a_pth_of_another_format_version(tmp_path: Path) -> None:
    write_pytorch(tmp_path / "w.pth", Tiny().state_dict(), ABOUT | {"format": 99})
    with pytest.raises(WeightsError, match="written in format 99, this version reads format 1: update"):
        load_weights(tmp_path / "w.pth")

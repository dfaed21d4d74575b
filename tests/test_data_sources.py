"""Data sets by name: archives, folders of pictures, .npz files, and one sentence for all that is none of these."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_data import write_binary, write_python
from test_data_augment import some_images

from inception.data import (
    Augment,
    DataError,
    Dataset,
    Loader,
    load_cifar10,
    load_cifar100,
    load_shapes,
    mean_and_std,
    open_data,
    pictures,
    read_picture,
    sources,
    split,
)
from inception.data.cifar import CIFAR10, CIFAR100
from minigrad import num_threads, set_num_threads
from minigrad.random import Key, integers

# ---- CIFAR-100, archives ----

FINE = [f"fine_{i}" for i in range(100)]


def rows_of(part: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coarse labels, fine labels, planes."""
    key = Key(9).fold(part)
    return (
        integers(key.fold("coarse"), 20, 6).astype(np.uint8),
        integers(key.fold("fine"), 100, 6).astype(np.uint8),
        integers(key, 256, (6, 3072)).astype(np.uint8),
    )


def write_cifar100_binary(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        coarse, fine, planes = rows_of(part)
        (folder / f"{part}.bin").write_bytes(np.column_stack([coarse, fine, planes]).tobytes())
    (folder / "fine_label_names.txt").write_text("\n".join(FINE) + "\n")
    (folder / "coarse_label_names.txt").write_text("other\n")
    return folder


def write_cifar100_python(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        coarse, fine, planes = rows_of(part)
        batch = {b"fine_labels": fine.tolist(), b"coarse_labels": coarse.tolist(), b"data": planes, b"filenames": []}
        (folder / part).write_bytes(pickle.dumps(batch, protocol=2))
    meta = {b"fine_label_names": [name.encode() for name in FINE], b"coarse_label_names": [b"other"]}
    (folder / "meta").write_bytes(pickle.dumps(meta, protocol=2))
    return folder


def packed(folder: Path, archive: Path, prefix: str) -> Path:
    with tarfile.open(archive, "w:gz") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, f"{prefix}/{path.name}")
    return archive


def same(a: Dataset, b: Dataset) -> bool:
    return np.array_equal(a.images, b.images) and np.array_equal(a.labels, b.labels) and a.classes == b.classes


@pytest.mark.parametrize("subfolder", ["", "cifar-100-python", "cifar-100-binary"])
@pytest.mark.parametrize("write", [write_cifar100_binary, write_cifar100_python])
def test_cifar100_has_the_fine_labels(tmp_path: Path, write: Any, subfolder: str) -> None:
    write(tmp_path / subfolder)
    for dataset, part in zip(open_data(tmp_path), ("train", "test"), strict=True):
        _, fine, planes = rows_of(part)
        assert dataset.name == f"CIFAR-100 {part}"
        assert dataset.classes == tuple(FINE)
        assert np.array_equal(dataset.labels, fine)
        assert np.array_equal(dataset.images, planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def test_cifar100_damaged(tmp_path: Path) -> None:
    folder = write_cifar100_binary(tmp_path)
    (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes()[:-1])
    with pytest.raises(DataError, match=r"train\.bin ends within row 5, 3073 bytes into its 3074"):
        load_cifar100(folder)
    content = bytearray(write_cifar100_binary(tmp_path).joinpath("test.bin").read_bytes())
    content[2 * 3074 + 1] = 100
    (folder / "test.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"test\.bin: the label in row 2 is 100, outside 0 to 99"):
        load_cifar100(folder)


@pytest.mark.parametrize(
    ("write", "load", "prefix"),
    [
        (write_binary, load_cifar10, "cifar-10-batches-bin"),
        (write_python, load_cifar10, "cifar-10-batches-py"),
        (write_cifar100_binary, load_cifar100, "cifar-100-binary"),
        (write_cifar100_python, load_cifar100, "cifar-100-python"),
    ],
)
def test_an_archive_is_read_as_it_is(tmp_path: Path, write: Any, load: Any, prefix: str) -> None:
    folder = write(tmp_path / "folder")
    archive = packed(folder, tmp_path / "a.tar.gz", prefix)
    before = sorted(tmp_path.rglob("*"))
    for a, b in zip(load(archive), load(folder), strict=True):
        assert same(a, b)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["a.tar.gz", "a.TGZ"])
def test_an_archive_is_a_data_set(tmp_path: Path, name: str) -> None:
    ten, hundred = write_binary(tmp_path / "ten"), write_cifar100_python(tmp_path / "hundred")
    assert open_data(packed(ten, tmp_path / name, "cifar-10-batches-bin"))[0].name == "CIFAR-10 train"
    assert open_data(packed(hundred, tmp_path / name, "cifar-100-python"))[1].name == "CIFAR-100 test"


def test_an_archive_cut_short_or_without_a_file(tmp_path: Path) -> None:
    folder = write_binary(tmp_path / "folder")
    content = packed(folder, tmp_path / "a.tar.gz", "cifar-10-batches-bin").read_bytes()
    for end in (0, 5, 100, len(content) // 2, len(content) * 3 // 4):
        (tmp_path / "cut.tar.gz").write_bytes(content[:end])
        with pytest.raises(DataError, match=r"cut\.tar\.gz (is no readable|does not hold)"):
            load_cifar10(tmp_path / "cut.tar.gz")
    (folder / "data_batch_4.bin").unlink()
    with pytest.raises(DataError, match=r"does not hold cifar-10-batches-bin/data_batch_4\.bin"):
        load_cifar10(packed(folder, tmp_path / "b.tar.gz", "cifar-10-batches-bin"))


def test_a_hostile_archive_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "a.tar.gz", "w:gz") as tar:
        for name, kind in (("../out", tarfile.REGTYPE), ("cifar-10-batches-bin/test_batch.bin", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member, io.BytesIO())
    with pytest.raises(DataError, match="does not hold"):
        load_cifar10(tmp_path / "in" / "a.tar.gz")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_by_name_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    write, prefix = (
        (write_binary, "cifar-10-batches-bin") if name == "cifar10" else (write_cifar100_binary, "cifar-100-binary")
    )
    archive = packed(write(tmp_path / "folder"), tmp_path / "a.tar.gz", prefix)
    asked = []
    monkeypatch.setattr(sources, "fetch", lambda archives, quiet: asked.append((archives, quiet)) or archive)
    train, test = open_data(name, quiet=True)
    assert asked == [(CIFAR10 if name == "cifar10" else CIFAR100, True)]
    assert len(train.classes) == int(name[5:])
    assert len(train) > len(test) or name == "cifar100"


# ---- Names ----


def test_shapes_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A name goes before a directory that is called so."""
    (tmp_path / "shapes").mkdir()
    monkeypatch.chdir(tmp_path)
    drawn = load_shapes(20, 10)
    monkeypatch.setattr("inception.data.sources.load_shapes", lambda: drawn)
    assert open_data("shapes") is drawn
    with pytest.raises(DataError, match="holds no data set"):
        open_data("./shapes")


def test_what_is_no_data_set_says_what_may_stand_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    for source, what in (
        ("nowhere", "no file or directory"),
        ("", "no file or directory|holds no data set"),
        ("cifar", "no file or directory — did you mean 'cifar10'. It may be shapes"),
        ("Shapes", "no file or directory — did you mean 'shapes'"),
        (tmp_path / "empty", "holds no data set that is known here"),
        (tmp_path / "notes.txt", "is no data set: it may be"),
        (tmp_path / "missing.npz", "no such file"),
    ):
        with pytest.raises(DataError, match=what) as caught:
            open_data(source)
        assert str(source) in str(caught.value)
        if "npz" not in str(source):
            assert "cifar100" in str(caught.value)
            assert "x_train" in str(caught.value)


# ---- Folders of pictures ----


@pytest.fixture
def image() -> Any:
    return pytest.importorskip("PIL.Image")


def write_folders(folder: Path, image: Any, count: int = 4, test: str = "test", suffix: str = "png") -> Path:
    for part, n in (("train", count), (test, 2)):
        for k, name in enumerate(("cat", "dog", "ünïcode bird")):
            (folder / part / name).mkdir(parents=True)
            for i, picture in enumerate(some_images(n, 20 + k, 30, seed=k)):
                image.fromarray(picture).save(folder / part / name / f"{i:03}.{suffix}")
    return folder


@pytest.mark.parametrize("test", ["test", "val"])
def test_folders_are_classes(tmp_path: Path, image: Any, test: str) -> None:
    folder = write_folders(tmp_path, image, test=test)
    (folder / "train" / "cat" / "Thumbs.db").write_text("no picture")
    (folder / "train" / "cat" / "._001.jpg").write_text("what a Mac leaves beside a picture")
    (folder / "train" / "readme.txt").write_text("no class")
    (folder / "train" / ".hidden").mkdir()
    train, held = open_data(folder, size=16)
    assert train.classes == held.classes == ("cat", "dog", "ünïcode bird")
    assert train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert held.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert train.images.shape == (12, 16, 16, 3)
    assert train.name == str(folder / "train")
    for row in (0, 5, 11):
        path = folder / "train" / train.classes[row // 4] / f"{row % 4:03}.png"
        assert np.array_equal(train.images[row], read_picture(path, (16, 16)))


def test_pictures_are_decoded_when_asked_for_and_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, image: Any
) -> None:
    decoded: list[str] = []
    read = pictures.read_picture
    monkeypatch.setattr(
        pictures, "read_picture", lambda path, size, **how: decoded.append(path) or read(path, size, **how)
    )
    train, _ = open_data(write_folders(tmp_path, image), size=8)
    first, held = split(train, 0.25, seed=0)
    assert (len(first), len(held)) == (9, 3)
    assert not decoded
    rows = np.array([7, 2, 7])
    pixels = train.images[rows]
    assert np.array_equal(pixels[0], pixels[2])
    decoded.clear()
    assert np.array_equal(train.images[rows], pixels)
    assert not decoded
    monkeypatch.setattr(pictures, "_KEPT", 0)
    train, _ = open_data(tmp_path, size=8)
    for _ in range(2):
        assert np.array_equal(train.images[rows], pixels)
    assert len(decoded) == 6


def test_folders_through_the_loader(tmp_path: Path, image: Any) -> None:
    """The same bits with any number of threads, with and without prefetch, as from an array of the same pictures."""
    train, _ = open_data(write_folders(tmp_path, image), size=12)
    mean, std = mean_and_std(train)
    whole = Dataset(train.images[:], train.labels, train.classes, "in memory")
    assert np.array_equal(mean, mean_and_std(whole)[0])
    options: dict[str, Any] = {"mean": mean, "std": std, "shuffle": True, "augment": Augment(), "seed": 1}
    expected = list(Loader(whole, 5, **options).batches(1))
    before = num_threads()
    try:
        for threads, prefetch in ((1, 0), (2, 0), (2, 3)):
            set_num_threads(threads)
            fresh, _ = open_data(tmp_path, size=12)
            for a, b in zip(Loader(fresh, 5, **options, prefetch=prefetch).batches(1), expected, strict=True):
                assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    finally:
        set_num_threads(before)


def test_mean_of_many_files_is_that_of_a_sample(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, image: Any) -> None:
    monkeypatch.setattr("inception.data.dataset._SAMPLE", 6)
    train, _ = open_data(write_folders(tmp_path, image), size=8)
    sample = Dataset(train.images[np.arange(0, 12, 2)], np.zeros(6, np.int64), ("a",), "sample")
    assert np.array_equal(mean_and_std(train), mean_and_std(sample))


def test_folders_that_do_not_fit(tmp_path: Path, image: Any) -> None:
    def refused(message: str) -> None:
        with pytest.raises(DataError, match=message):
            open_data(tmp_path, size=8)

    (tmp_path / "train").mkdir()
    refused("neither test nor val")
    (tmp_path / "test").mkdir()
    refused(r"train has no folders: it needs one for each class")
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir()
    refused(r"train/a: no pictures in this directory")
    for part in ("train", "test"):
        for name in ("a", "b"):
            image.new("RGB", (9, 9)).save(tmp_path / part / name / "p.png")
    open_data(tmp_path, size=8)
    (tmp_path / "test" / "c").mkdir()
    refused(r"test/c has no counterpart in .*train")
    (tmp_path / "train" / "c").mkdir()
    (tmp_path / "test" / "c").rmdir()
    refused(r"train/c has no counterpart in .*test")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable picture"),
        (b"not a picture", "not a readable picture: it is none of JPEG, PNG, BMP, GIF, WEBP, PPM"),
    ],
)
def test_a_bad_file_in_a_folder_is_named(tmp_path: Path, image: Any, content: bytes, message: str) -> None:
    bad = write_folders(tmp_path, image) / "train" / "dog" / "001.png"
    bad.write_bytes(content)
    train, _ = open_data(tmp_path, size=8)
    for prefetch in (0, 2):
        loader = Loader(train, 3, mean=np.full(3, 0.5), std=np.full(3, 0.5), prefetch=prefetch)
        with pytest.raises(DataError, match=f"{bad.name}.*{message}"):
            list(loader.batches(0))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_orientation(tmp_path: Path, image: Any, orientation: int, suffix: str) -> None:
    """Each of the eight ways to hold a camera gives the same picture."""
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :12], upright[:8, 12:], upright[8:, :12] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    stored = [
        upright,
        upright[:, ::-1],
        upright[::-1, ::-1],
        upright[::-1],
        upright.transpose(1, 0, 2),
        upright.transpose(1, 0, 2)[:, ::-1],
        upright.transpose(1, 0, 2)[::-1, ::-1],
        upright.transpose(1, 0, 2)[::-1],
    ]
    # what the camera stores so that a viewer who follows the tag sees `upright`
    inverse = {1: 0, 2: 1, 3: 2, 4: 3, 5: 4, 6: 7, 7: 6, 8: 5}
    exif = image.Exif()
    exif[0x0112] = orientation
    picture = image.fromarray(np.ascontiguousarray(stored[inverse[orientation]]))
    picture.save(tmp_path / f"p.{suffix}", exif=exif, **({"quality": 100, "subsampling": 0} if suffix == "jpg" else {}))
    out = read_picture(tmp_path / f"p.{suffix}", (16, 24)).astype(int)
    assert np.abs(out[2:6, 2:10] - [250, 0, 0]).max() < 12
    assert np.abs(out[2:6, 14:22] - [0, 250, 0]).max() < 12
    assert np.abs(out[10:14, 2:10] - [0, 0, 250]).max() < 12


def test_sixteen_bits_and_transparency_keep_their_orientation(tmp_path: Path, image: Any) -> None:
    exif = image.Exif()
    exif[0x0112] = 3  # upside down
    deep = np.repeat(np.arange(8, dtype=np.uint16)[:, None], 8, 1) * 257 * 30
    image.fromarray(deep).save(tmp_path / "deep.png", exif=exif)
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[:2] = 255
    image.fromarray(clear).save(tmp_path / "clear.png", exif=exif)
    assert read_picture(tmp_path / "deep.png", (8, 8))[:, 0, 0].tolist() == [210, 180, 150, 120, 90, 60, 30, 0]
    assert read_picture(tmp_path / "clear.png", (8, 8))[:, 0, 0].tolist() == [0] * 6 + [255] * 2


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 3)])
def test_tiny_pictures_are_enlarged(tmp_path: Path, image: Any, size: tuple[int, int]) -> None:
    image.new("RGB", size, (10, 20, 30)).save(tmp_path / "p.png")
    assert np.all(read_picture(tmp_path / "p.png", (7, 5)) == [10, 20, 30])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_hundred_million_pixels_are_refused(tmp_path: Path, image: Any, suffix: str) -> None:
    image.new("L", (10_000, 10_000)).save(tmp_path / f"p.{suffix}")
    with pytest.raises(DataError, match=r"10000×10000 pixels are too many"):
        read_picture(tmp_path / f"p.{suffix}", (8, 8))


def test_as_an_error_the_bomb_warning_is_a_sentence_too(tmp_path: Path, image: Any) -> None:
    image.new("L", (10_000, 10_000)).save(tmp_path / "p.png")
    with pytest.raises(DataError, match=r"p\.png: not a readable picture"):
        read_picture(tmp_path / "p.png", (8, 8))


def test_a_large_jpeg_is_decoded_small(tmp_path: Path, image: Any) -> None:
    """Of 45 million pixels, 135 MB, an eighth of each side is decoded."""
    image.new("RGB", (9_000, 5_000), (200, 100, 50)).save(tmp_path / "p.jpg")
    script = """
import resource, sys
from pathlib import Path
from inception.data import read_picture
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
Path("small.png").write_bytes(Path("p.jpg").read_bytes()[:100])
try:
    read_picture(Path("small.png"), (16, 16))  # imports Pillow
except Exception:
    pass
before = peak()
print(*read_picture(Path("p.jpg"), (16, 16)).reshape(-1, 3).mean(0), peak() - before)
"""
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *colour, megabytes = map(float, done.stdout.split())
    assert np.abs(np.subtract(colour, [200, 100, 50])).max() < 3
    assert megabytes < 60


def test_no_interpreter_is_started_for_a_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, image: Any) -> None:
    """A file is what its content says: PostScript under another name would be run by Ghostscript."""
    image.new("RGB", (9, 9)).save(tmp_path / "p.eps")
    (tmp_path / "p.eps").rename(tmp_path / "p.png")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("it was run"))
    with pytest.raises(DataError, match=r"p\.png: not a readable picture"):
        read_picture(tmp_path / "p.png", (8, 8))


def test_folders_without_pillow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, image: Any) -> None:
    train, _ = open_data(write_folders(tmp_path, image), size=8)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=r"pip install pillow"):
        train.images[:1]

"""Folders of pictures as people have them: links, a system's notes, other files, names spelt in two ways."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from inception.data import DataError, find_pictures, open_data

image = pytest.importorskip("PIL.Image")


def picture(path: Path, kind: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.new("RGB", (8, 8)).save(path, kind)


def two_classes(folder: Path, first: str = "cat", second: str = "dog") -> Path:
    for part in ("train", "test"):
        for name in (first, second):
            picture(folder / part / name / "p.png")
    return folder


def test_a_folder_above_the_classes_is_named(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            picture(tmp_path / part / "images" / name / "p.png")
    with pytest.raises(
        DataError, match=r"one folder, images, so there is one class; the folders in it \(cat, dog\) look"
    ):
        open_data(tmp_path)


def test_one_class_is_too_few(tmp_path: Path) -> None:
    for part in ("train", "test"):
        picture(tmp_path / part / "cat" / "p.png")
    with pytest.raises(DataError, match="one folder, cat, so there is one class: add a folder for each other class"):
        open_data(tmp_path)


@pytest.mark.parametrize("suffix", [".jfif", ".JPE", ".jpeg", ".JPG"])
def test_every_name_of_a_jpeg(tmp_path: Path, suffix: str) -> None:
    picture(tmp_path / f"p{suffix}", "jpeg")
    assert find_pictures([tmp_path]) == [tmp_path / f"p{suffix}"]


def test_files_that_are_passed_over_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two_classes(tmp_path)
    assert capsys.readouterr().err == ""
    for name in ("a.tif", "b.TIF", "c.heic", "Thumbs.db", ".hidden"):
        (tmp_path / "train" / "cat" / name).touch()
    os.mkfifo(tmp_path / "train" / "dog" / "pipe.png")
    train, _ = open_data(tmp_path, size=8)
    assert len(train) == 2
    line = f"{tmp_path / 'train'}: 4 files were passed over (.tif: 2, .heic: 1, .png: 1); pictures end in .jpg, .jpeg"
    assert capsys.readouterr().err.startswith(line)
    find_pictures([tmp_path / "train" / "cat"])
    assert "3 files were passed over" in capsys.readouterr().err


@pytest.mark.parametrize("note", ["@eaDir", "__MACOSX", ".ipynb_checkpoints", "#recycle"])
def test_what_a_system_leaves_is_no_picture_and_no_class(tmp_path: Path, note: str) -> None:
    two_classes(tmp_path)
    picture(tmp_path / "train" / note / "p.png")
    picture(tmp_path / "train" / "cat" / note / "x.png" / "THUMB.png")
    train, _ = open_data(tmp_path, size=8)
    assert train.classes == ("cat", "dog")
    assert len(train) == 2


def test_linked_folders_count_each_once(tmp_path: Path) -> None:
    two_classes(tmp_path / "d")
    picture(tmp_path / "elsewhere" / "q.png")
    cat = tmp_path / "d" / "train" / "cat"
    (cat / "more").symlink_to(tmp_path / "elsewhere")
    (cat / "again").symlink_to(tmp_path / "elsewhere")
    (cat / "circle").symlink_to(cat)
    (cat / "broken").symlink_to(tmp_path / "nowhere")
    assert [path.name for path in find_pictures([cat])] == ["q.png", "p.png"]
    train, _ = open_data(tmp_path / "d", size=8)
    assert train.labels.tolist() == [0, 0, 1]


def test_a_class_spelt_in_two_ways_is_one(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    picture(tmp_path / "train" / composed / "p.png")
    picture(tmp_path / "train" / decomposed / "q.png")
    picture(tmp_path / "test" / decomposed / "p.png")
    for part in ("train", "test"):
        picture(tmp_path / part / "tea" / "p.png")
    train, test = open_data(tmp_path, size=8)
    assert train.classes == test.classes == (composed, "tea")
    assert train.labels.tolist() == [0, 0, 1]
    assert test.labels.tolist() == [0, 1]
    assert np.all(train.images[:] == 0)


def test_an_address_of_a_picture(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is an address: download the picture first"):
        find_pictures([Path("https://example.org/cat.jpg")])


def test_names_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "a\x1b[31m\a\u202e\nerror: b"
    two_classes(tmp_path, name)
    (tmp_path / "train" / name / "p.png").write_bytes(b"no picture")
    (tmp_path / "train" / name / "x.t\x1b[2Jif").touch()
    train, _ = open_data(tmp_path, size=8)
    assert capsys.readouterr().err.rstrip("\n").isprintable()
    with pytest.raises(DataError, match=r"a\\x1b\[31m\\x07\\u202e\\nerror: b.*not a readable picture") as caught:
        train.images[:]
    assert str(caught.value).isprintable()

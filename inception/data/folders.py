"""Folders of pictures: the pictures below a directory, and data sets with a folder for each class."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np

from inception.console import warn
from inception.data.dataset import DataError, Dataset
from inception.data.pictures import SUFFIXES, Pictures, Preprocessing
from inception.files import DEEPEST

# files and folders that a system leaves beside pictures, in lower case
_NOTES = {
    "@eadir",
    "__macosx",
    "#recycle",
    "$recycle.bin",
    "system volume information",
    "lost+found",
    "thumbs.db",
    "desktop.ini",
}


def load_folders(directory: str | Path, size: tuple[int, int]) -> tuple[Dataset, Dataset]:
    """(train, test) from DIR/train/CLASS/PICTURE and DIR/test/CLASS/PICTURE, or val/ if there is no test/.

    size  (H, W) of the data set's pictures, as in `read_picture`
    Raises DataError if there are no such folders, if one of a class is empty, if the classes differ, or if there is
    only one.
    """
    directory = Path(directory)
    train = directory / "train"
    test = next((directory / name for name in ("test", "val") if (directory / name).is_dir()), None)
    if test is None:
        raise DataError(f"{directory} has a folder train but neither test nor val: put pictures to evaluate on there")
    classes, others = _class_folders(train), _class_folders(test)
    for here, there in ((train, set(classes) - set(others)), (test, set(others) - set(classes))):
        if there:
            raise DataError(
                f"{here / min(there)} has no counterpart in {test if here is train else train}: "
                f"both must have a folder for each class"
            )
    if len(classes) == 1:
        (only,) = classes
        inside = sorted(path.name for path in classes[only][0].iterdir() if path.is_dir() and not _is_note(path.name))
        raise DataError(
            f"{train} has one folder, {only}, so there is one class"
            + (
                f"; the folders in it ({', '.join(inside[:3])}{', …' * (len(inside) > 3)}) look like classes: "
                f"move them to {train} and {test}"
                if inside
                else ": add a folder for each other class"
            )
        )
    return _labelled(train, classes, size), _labelled(test, others, size)


def _class_folders(directory: Path) -> dict[str, list[Path]]:
    """The folders of each class, in order of the classes.

    One name can be spelt in two ways, é or e and an accent (NFC, NFD): such folders are one class.
    """
    classes: dict[str, list[Path]] = {}
    for path in sorted(path for path in directory.iterdir() if path.is_dir() and not _is_note(path.name)):
        classes.setdefault(unicodedata.normalize("NFC", path.name), []).append(path)
    if not classes:
        raise DataError(f"{directory} has no folders: it needs one for each class, with pictures in it")
    return dict(sorted(classes.items()))


def _labelled(directory: Path, classes: dict[str, list[Path]], size: tuple[int, int]) -> Dataset:
    found, passed_over = [], Counter[str]()
    for folders in classes.values():
        inside, others = zip(*map(_pictures_below, folders), strict=True)
        found.append([path for paths in inside for path in paths])
        passed_over += sum(others, Counter())
        if not found[-1]:
            raise DataError(f"{folders[0]}: no pictures in this directory ({', '.join(SUFFIXES)})")
    if passed_over:
        warn(f"{directory}{_passed_over(passed_over)}")
    labels = np.repeat(np.arange(len(classes)), [len(paths) for paths in found])
    files = np.array([str(path) for paths in found for path in paths], object)  # a Path takes four times the memory
    return Dataset(Pictures(files, Preprocessing(size)), labels, tuple(classes), str(directory))


def find_pictures(paths: list[Path]) -> list[Path]:
    """The files given, and all pictures below the directories given, in order of their names.

    Linked folders count, each folder once. A line on standard error says which files were passed over.
    Raises DataError for a directory without pictures, and for an address.
    """
    found, passed_over = [], Counter[str]()
    for path in paths:
        if re.match(r"https?:/", str(path)):
            raise DataError(f"{path} is an address: download the picture first, then name the file")
        if path.is_dir():
            inside, others = _pictures_below(path)
            passed_over += others
        else:
            inside = [path]
        if not inside:
            raise DataError(f"{path}: no pictures in this directory ({', '.join(SUFFIXES)}){_passed_over(others)}")
        found += inside
    if passed_over:
        warn(f"{', '.join(map(str, paths[:3]))}{_passed_over(passed_over)}")
    return found


def _passed_over(others: Counter[str]) -> str:
    """As ": 3 files passed over (.tif: 2, .txt: 1), pictures end in .jpg, …"; empty if there are none."""
    if not others:
        return ""
    kinds = ", ".join(f"{suffix or 'no suffix'}: {count:,}" for suffix, count in others.most_common(5))
    files = "file was" if others.total() == 1 else "files were"
    return f": {others.total():,} {files} passed over ({kinds}); pictures end in {', '.join(SUFFIXES)}"


def _pictures_below(directory: Path) -> tuple[list[Path], Counter[str]]:
    """The pictures in a directory and all folders in it, in order; of the other files, how many have each suffix.

    Notes that a system leaves are neither. Raises DataError for folders nested too deep, or that cannot be read.
    """
    found, others = [], Counter[str]()
    folders, seen = [(directory, 0)], set()
    while folders:
        folder, depth = folders.pop()
        try:
            about = folder.stat()
            if (about.st_dev, about.st_ino) in seen:  # a link to a folder around it, or a second one to this
                continue
            seen.add((about.st_dev, about.st_ino))
            for entry in os.scandir(folder):
                if _is_note(entry.name):
                    continue
                path = folder / entry.name
                if entry.is_dir():
                    folders.append((path, depth + 1))
                elif path.suffix.lower() in SUFFIXES and entry.is_file():
                    found.append(path)
                else:
                    others[path.suffix.lower()] += 1
        except OSError as error:
            raise DataError(f"{folder} cannot be read ({error.strerror})") from None
        if depth > DEEPEST:
            raise DataError(f"{directory} has folders nested more than {DEEPEST} deep: name the one with the pictures")
    return sorted(found), others


def _is_note(name: str) -> bool:
    """Whether a file or folder is some system's own, as all that begin with a dot."""
    return name.startswith(".") or name.lower() in _NOTES

"""Where data sets come from: every source by the name a user gives it."""

from __future__ import annotations

from pathlib import Path

from inception.data.arrays import load_arrays
from inception.data.cifar import CIFAR10, CIFAR100, holds_cifar, load_cifar, load_cifar10, load_cifar100
from inception.data.dataset import DataError, Dataset
from inception.data.folders import load_folders
from inception.data.shapes import load_shapes
from inception.download import fetch
from minigrad.errors import did_you_mean

_MAY_STAND = (
    "may be shapes, cifar10, cifar100, a directory with the batches of CIFAR-10 or CIFAR-100 or the .tar.gz of them, a "
    "directory with train/CLASS/PICTURE and test/CLASS/PICTURE, or a file .npz with x_train, y_train, x_test and y_test"
)


def open_data(source: str | Path, *, size: int = 224, quiet: bool = False) -> tuple[Dataset, Dataset]:
    """The data set (train, test) that `source` names.

    source  "shapes"                drawn by this project
            "cifar10", "cifar100"   downloaded once and kept in a cache (`inception.download.fetch`)
            DIR                     with CIFAR's batches, in the python or the binary version (./cifar10 is a DIR)
            FILE.tar.gz             with them, as their authors publish it
            DIR                     with train/CLASS/PICTURE and test/ (or val/) likewise (`load_folders`)
            FILE.npz                with arrays (`load_arrays`)
    size    pixels on a side to which the pictures of folders are brought; the other sources have their own
    quiet   no progress bar

    Raises DataError if it is none of these, or for what is wrong in it; DownloadError if it cannot be had.
    """
    match str(source):
        case "shapes":
            return load_shapes()
        case "cifar10":
            return load_cifar10(fetch(CIFAR10, quiet=quiet))
        case "cifar100":
            return load_cifar100(fetch(CIFAR100, quiet=quiet))
    path = Path(source)
    if path.is_dir():
        if holds_cifar(path):
            return load_cifar(path)
        if (path / "train").is_dir():
            return load_folders(path, (size, size))
        raise DataError(f"the directory {path} holds no data set that is known here: it {_MAY_STAND}")
    if path.suffix.lower() == ".npz":
        return load_arrays(path)
    if path.name.lower().endswith((".tar.gz", ".tgz")) and path.exists():
        return load_cifar(path)
    nothing = "" if path.exists() else ", and no file or directory"
    near = nothing and did_you_mean(source, ("shapes", "cifar10", "cifar100"))
    raise DataError(f"{str(source)!r} is no data set{nothing}{near + ' It' if near else ': it'} {_MAY_STAND}")

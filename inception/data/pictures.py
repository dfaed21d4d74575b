"""Pictures from files: one, some, or a data set of a folder for each class. Needs Pillow."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from inception.data.augment import normalise
from inception.data.dataset import DataError, Dataset
from minigrad.threads import each

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm")
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "PPM")  # and no other: for EPS, Pillow would run Ghostscript
_KEPT = 1 << 30  # bytes of decoded pictures that may stay in memory


def read_picture(
    path: str | Path, size: tuple[int, int], *, resize: int | None = None, interpolation: str = "bicubic"
) -> np.ndarray:
    """The picture as (H, W, 3) uint8 of `size` = (H, W): scaled so that it covers the size, cut in the middle.

    resize          scale it so that its shorter side has so many pixels instead, at least those of the size
    interpolation   bicubic, bilinear, …: a name of Pillow's Resampling

    It is turned as its EXIF orientation says. Grey, palette, transparent (on black), CMYK and 16-bit pictures are
    converted to RGB. JPEG is decoded at 1/2, 1/4 or 1/8 while that is at least twice the size.
    Raises DataError naming the file if it is missing, no readable picture or too large (Pillow's limit of 89 million
    pixels), or if Pillow is absent.
    """
    image, ops = _pillow()
    try:
        with image.open(path, formats=_FORMATS) as picture:
            if image.MAX_IMAGE_PIXELS and picture.width * picture.height > image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{picture.width}×{picture.height} pixels are too many: make it smaller")
            least = 2 * max(*size, resize or 0)
            picture.draft(None, (least, least))
            ops.exif_transpose(picture, in_place=True)
            return _framed(_to_rgb(picture), size, resize, interpolation)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except Exception as error:  # a damaged picture can raise anything
        if isinstance(error, image.UnidentifiedImageError):
            raise DataError(f"{path}: not a readable picture: it is none of {', '.join(_FORMATS)}") from None
        raise DataError(f"{path}: not a readable picture ({' '.join(str(error).split()) or repr(error)})") from None


def _framed(picture: Any, size: tuple[int, int], resize: int | None, interpolation: str) -> np.ndarray:
    """Scale and cut as `read_picture` says."""
    image, ops = _pillow()
    method, wanted = image.Resampling[interpolation.upper()], size[::-1]
    if resize is None:
        return np.asarray(ops.fit(picture, wanted, method), dtype=np.uint8)
    # Only what will be cut out is scaled: the whole of a picture of one line would take gigabytes.
    short = min(picture.size)
    scaled = [resize * side // short for side in picture.size]
    starts = [round((side - part) / 2) for side, part in zip(scaled, wanted, strict=True)]
    ends = [start + part for start, part in zip(starts, wanted, strict=True)]
    box = [at * whole / side for at, whole, side in zip(starts + ends, picture.size * 2, scaled * 2, strict=True)]
    return np.asarray(picture.resize(wanted, method, box=tuple(box)), dtype=np.uint8)


_Fits = Callable[[Any], Any]
_WANTED: dict[str, tuple[str, _Fits]] = {  # what `Preprocessing` takes: in words, and as a test
    "size": ("[height, width], pixels", lambda v: len(v) == 2 and all(type(side) is int and side > 0 for side in v)),
    "mean": ("three numbers", lambda v: _three_numbers(v)),
    "std": ("three numbers above 0", lambda v: _three_numbers(v) and min(v) > 0),
    "resize": ("a whole number", lambda v: v is None or type(v) is int),
    "interpolation": (
        "nearest, bilinear, bicubic or lanczos",
        lambda v: v in ("nearest", "bilinear", "bicubic", "lanczos"),
    ),
    "channels": ("RGB or BGR", lambda v: v in ("RGB", "BGR")),
}


def _three_numbers(v: Any) -> bool:
    return len(v) == 3 and all(type(x) in (int, float) and math.isfinite(x) for x in v)


def check_preparation(about: Mapping[str, Any]) -> None:
    """Raise DataError where a description of weights says something of pictures that cannot be done."""
    for name, (wanted, fits) in _WANTED.items():
        try:
            good = name not in about or bool(fits(about[name]))
        except (TypeError, ValueError):
            good = False
        if not good:
            raise DataError(f"the weights want pictures of {name} {str(about[name])[:80]}, which must be {wanted}")


class Preprocessing(NamedTuple):
    """How a network wants its pictures: stored beside its weights, applied before it, and no part of it."""

    size: tuple[int, int]  # (H, W), pixels
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)  # of each channel, of values in [0, 1]
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    resize: int | None = None  # see read_picture
    interpolation: str = "bicubic"
    channels: str = "RGB"  # or "BGR"

    @classmethod
    def of(cls, about: Mapping[str, Any]) -> Preprocessing:
        """From the description of weights. Raises DataError if it does not say, or says what cannot be done."""
        if lacking := [name for name in cls._fields[:3] if name not in about]:
            raise DataError(f"the weights do not say how pictures are prepared: {', '.join(lacking)} (export --about)")
        check_preparation(about)
        found = cls(**{name: about[name] for name in cls._fields if name in about})
        size = tuple(found.size)
        if found.resize is not None and found.resize < max(size):
            raise DataError(
                f"the weights want pictures of resize {found.resize}, which must be at least the size {size}"
            )
        mean, std = tuple(map(float, found.mean)), tuple(map(float, found.std))
        return found._replace(size=(size[0], size[1]), mean=mean, std=std)

    def picture(self, source: str | Path | np.ndarray) -> np.ndarray:
        """A file, or a picture (H, W, 3) uint8 in RGB, as (H, W, 3) uint8 of the size, in the network's channels.

        Raises what read_picture raises.
        """
        if isinstance(source, np.ndarray):
            framed = _framed(_pillow()[0].fromarray(source), self.size, self.resize, self.interpolation)
        else:
            framed = read_picture(source, self.size, resize=self.resize, interpolation=self.interpolation)
        return framed if self.channels == "RGB" else framed[:, :, ::-1]

    def read(self, path: str | Path) -> np.ndarray:
        """The picture as (1, 3, H, W) float32, ready for the network. Raises what read_picture raises."""
        return normalise(self.picture(path)[None], np.array(self.mean), np.array(self.std))

    def dataset(self, dataset: Dataset) -> Dataset:
        """The data set with its pictures, files or arrays, as `picture` makes them: what is left is to normalise."""
        images = dataset.images
        sources = images.sources if isinstance(images, Pictures) else np.asarray(images)
        if sources.shape[1:3] == self.size and self.resize is None and self.channels == "RGB":
            return dataset
        return replace(dataset, images=Pictures(sources, self))


def _pillow() -> tuple[Any, Any]:
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError:
        raise DataError("reading pictures needs Pillow: pip install pillow") from None
    return Image, ImageOps


def _to_rgb(picture: Any) -> Any:
    image, _ = _pillow()
    if picture.mode.startswith("I"):  # 16 bit: Pillow would clip, not scale
        values = np.array(picture, dtype=np.float32)
        values *= 1 / 257
        picture = image.fromarray(np.rint(values, out=values).clip(0, 255, out=values).astype(np.uint8))
    elif picture.has_transparency_data:  # convert("RGB") would show the colours under the transparency
        picture = picture.convert("RGBA")
        picture = image.alpha_composite(image.new("RGBA", picture.size, "black"), picture)
    return picture.convert("RGB")


def find_pictures(paths: list[Path]) -> list[Path]:
    """The files given, and all pictures below the directories given, in order of their names.

    Raises DataError for a directory without pictures.
    """
    found = []
    for path in paths:
        inside = [path]
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if _is_picture(p.relative_to(path)) and p.is_file())
        if not inside:
            raise DataError(f"{path}: no pictures in this directory ({', '.join(SUFFIXES)})")
        found += inside
    return found


def _is_picture(path: Path) -> bool:
    """By its name: what begins with a dot, or lies in such a folder, is some system's note on a picture."""
    return path.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in path.parts)


class Pictures:
    """Files or pictures that look like an array (N, H, W, 3) of uint8, each prepared when its row is asked for.

    sources   (N,) paths, or (N, H, W, 3) uint8 of any size
    how       gives each its size and its order of channels; nothing here normalises

    Prepared pictures stay in memory if all of them would take at most a gigabyte.
    """

    dtype, ndim = np.dtype(np.uint8), 4

    def __init__(self, sources: np.ndarray, how: Preprocessing):
        self.sources, self.how = sources, how
        self.shape: tuple[int, ...] = (len(sources), *how.size, 3)
        self._kept = np.empty(self.shape, np.uint8) if math.prod(self.shape) <= _KEPT else None
        self._is_kept = np.zeros(len(sources), bool)

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, rows: int | slice | np.ndarray) -> np.ndarray:
        """The pictures in `rows`, decoded over the threads. Raises DataError naming a file that is no picture."""
        numbers, kept = np.arange(len(self.sources))[rows], self._kept
        if numbers.ndim == 0:
            return self[numbers[None]][0]
        missing = numbers if kept is None else numbers[~self._is_kept[numbers]]
        prepared = np.empty((len(missing), *self.shape[1:]), np.uint8)

        def prepare(i: int) -> None:
            prepared[i] = self.how.picture(self.sources[missing[i]])

        each(prepare, range(len(missing)))
        if kept is None:
            return prepared
        kept[missing] = prepared
        self._is_kept[missing] = True
        return kept[numbers]

    def select(self, rows: np.ndarray) -> Pictures:
        """The pictures in `rows` as another such array; nothing is decoded."""
        return Pictures(self.sources[rows], self.how)


def load_folders(directory: str | Path, size: tuple[int, int]) -> tuple[Dataset, Dataset]:
    """(train, test) from DIR/train/CLASS/PICTURE and DIR/test/CLASS/PICTURE, or val/ if there is no test/.

    size  (H, W) of the data set's pictures, as in `read_picture`
    Raises DataError if there are no such folders, if one of a class is empty, or if the classes differ.
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
    return _labelled(train, classes, size), _labelled(test, classes, size)


def _class_folders(directory: Path) -> list[str]:
    names = sorted(path.name for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise DataError(f"{directory} has no folders: it needs one for each class, with pictures in it")
    return names


def _labelled(directory: Path, classes: list[str], size: tuple[int, int]) -> Dataset:
    found = [find_pictures([directory / name]) for name in classes]
    labels = np.repeat(np.arange(len(classes)), [len(paths) for paths in found])
    files = np.array([str(path) for paths in found for path in paths], object)  # a Path takes four times the memory
    return Dataset(Pictures(files, Preprocessing(size)), labels, tuple(classes), str(directory))

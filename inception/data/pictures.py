"""Pictures from files, one or many. Needs Pillow."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from inception.data.augment import normalise
from inception.data.dataset import DataError, Dataset
from inception.files import allow, open_file
from minigrad.threads import each

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".pbm")
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "PPM")  # and no other: for EPS, Pillow would run Ghostscript
_KEPT = 1 << 30  # bytes of decoded pictures that may stay in memory
_LARGEST = (1 << 28) + (1 << 16)  # bytes of a file: those of the most pixels that Pillow takes, uncompressed
_SCANS = 100  # of a progressive JPEG, each of which passes over all pixels; cameras and editors write about ten
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")  # the chunks that say how a picture looks
_TURNED = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
           7: "TRANSVERSE", 8: "ROTATE_90"}  # by EXIF's orientation, the names of Pillow's Transpose  # fmt: skip


def read_picture(
    path: str | Path, size: tuple[int, int], *, resize: int | None = None, interpolation: str = "bicubic"
) -> np.ndarray:
    """The picture as (H, W, 3) uint8 of `size` = (H, W): scaled so that it covers the size, cut in the middle.

    resize          scale it so that its shorter side has so many pixels instead, at least those of the size
    interpolation   bicubic, bilinear, …: a name of Pillow's Resampling

    It is turned as its EXIF orientation says, if that can be read; other metadata is passed over. Grey, palette,
    transparent (on black), CMYK and 16-bit pictures are converted to RGB. JPEG is decoded at 1/2, 1/4 or 1/8 while that
    is at least twice the size. A picture that is cut short is refused.
    Raises DataError naming the file if it is missing, no readable picture or too large (89 million pixels, which is
    Pillow's limit, or far more than its bytes suggest: `files.allow`), or if Pillow is absent.
    """
    image, _ = _pillow()
    path = Path(path)
    if not (_fits("size", size) and _fits("interpolation", interpolation)):
        raise DataError(
            f"a picture is read to a size of (H, W) pixels by bicubic, bilinear, …, got {size} and {interpolation!r}"
        )
    with open_file(path, DataError) as file:
        try:
            bytes_ = file.seek(0, io.SEEK_END)
            if bytes_ > _LARGEST:
                raise ValueError(f"its {bytes_:,} bytes are too many: make it smaller")
            _check_webp(path, file, bytes_)
            with image.open(_without_notes(file, bytes_), formats=_FORMATS) as picture:
                _check_pixels(path, picture, bytes_, least=2 * max(*size, resize or 0))
                return _framed(_to_rgb(_upright(picture)), size, resize, interpolation)
        except DataError:
            raise
        except Exception as error:  # a damaged picture can raise anything
            if isinstance(error, image.UnidentifiedImageError):
                raise DataError(f"{path}: not a readable picture: it is none of {', '.join(_FORMATS)}") from None
            reason = " ".join(str(error).split()) or repr(error)
            raise DataError(f"{path}: not a readable picture ({reason:.200})") from None


def _without_notes(file: BinaryIO, size: int) -> BinaryIO:
    """A PNG's chunks of pixels and its EXIF alone; other files as they are.

    Pillow refuses a PNG for a text, a colour profile or a later frame that is damaged or long.
    """
    file.seek(0)
    if file.read(8) != _PNG:
        file.seek(0)
        return file
    kept, kind = io.BytesIO(), b"IHDR"
    kept.write(_PNG)
    while kind.isalpha() and kind != b"IEND" and len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind in _PNG_PIXELS or (kind == b"eXIf" and length < 1 << 16):
            kept.write(head)
            kept.write(file.read(min(length + 4, size)))  # and the checksum
        else:
            file.seek(length + 4, io.SEEK_CUR)
    kept.seek(0)
    return kept


def _check_webp(path: Path, file: BinaryIO, size: int) -> None:
    """Refuse a WebP that would be too large in memory. Pillow makes room for it, twice, before it tells its size."""
    file.seek(0)
    head = file.read(30)
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return
    match head[12:16]:
        case b"VP8X":
            width, height = 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
        case b"VP8L":
            sides = int.from_bytes(head[21:25], "little")
            width, height = 1 + (sides & 0x3FFF), 1 + (sides >> 14 & 0x3FFF)
        case _:
            width, height = (int.from_bytes(head[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    allow(path, 4 * width * height, size, "its pixels", DataError, "make it smaller")


def _check_pixels(path: Path, picture: Any, size: int, least: int) -> None:
    """Refuse a picture that would be too large in memory; a JPEG is made smaller first, down to `least` on a side."""
    limit, pixels = _pillow()[0].MAX_IMAGE_PIXELS, picture.width * picture.height
    if limit and pixels > limit:
        raise ValueError(f"{picture.width}×{picture.height} pixels are too many: make it smaller")
    if "progressive" in picture.info:  # libjpeg keeps all coefficients, two bytes each, and adds to them in each scan
        picture.fp.seek(0)
        scans = picture.fp.read().count(b"\xff\xda")
        picture.fp.seek(0)
        if scans > _SCANS:
            raise ValueError(f"its {scans:,} scans are more than the {_SCANS} that are read: save it again")
        wanted = 6 * pixels
    else:
        wanted = 0
    picture.draft(None, (least, least))
    wanted += 4 * picture.width * picture.height
    allow(path, wanted, size, "its pixels", DataError, "make it smaller")


def _upright(picture: Any) -> Any:
    """The picture turned as its EXIF says, or as it is if that cannot be read."""
    try:
        turn = _TURNED.get(picture.getexif().get(0x0112))
    except Exception:  # damaged EXIF can raise anything, and says nothing of the pixels
        turn = None
    return picture.transpose(_pillow()[0].Transpose[turn]) if turn else picture


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


_WANTED: dict[str, tuple[str, Callable[[Any], Any]]] = {  # what `Preprocessing` takes: in words, and as a test
    "size": ("[height, width], pixels", lambda v: len(v) == 2 and all(_whole(side) and side > 0 for side in v)),
    "mean": ("three numbers", lambda v: _three_numbers(v)),
    "std": ("three numbers above 0", lambda v: _three_numbers(v) and min(v) > 0),
    "resize": ("a whole number", lambda v: v is None or _whole(v)),
    "interpolation": (
        "nearest, bilinear, bicubic or lanczos",
        lambda v: v in ("nearest", "bilinear", "bicubic", "lanczos"),
    ),
    "channels": ("RGB or BGR", lambda v: v in ("RGB", "BGR")),
}


def _three_numbers(v: Any) -> bool:
    return len(v) == 3 and all((_whole(x) or isinstance(x, (float, np.floating))) and math.isfinite(x) for x in v)


def _whole(v: Any) -> bool:
    return isinstance(v, (int, np.integer)) and not isinstance(v, bool)


def _fits(name: str, value: Any) -> bool:
    try:
        return bool(_WANTED[name][1](value))
    except (TypeError, ValueError):
        return False


def check_preparation(about: Mapping[str, Any]) -> None:
    """Raise DataError where a description of weights says something of pictures that cannot be done."""
    for name, (wanted, _) in _WANTED.items():
        if name in about and not _fits(name, about[name]):
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
    return picture if picture.mode == "RGB" else picture.convert("RGB")  # which would make a copy


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

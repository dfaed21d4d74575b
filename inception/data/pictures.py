"""Pictures from files, as arrays. Needs Pillow."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from inception.data.dataset import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm")


def read_picture(path: Path, size: tuple[int, int]) -> np.ndarray:
    """The picture as (H, W, 3) uint8 of `size` = (H, W): scaled so that it covers the size, cut in the middle.

    Grey, palette, transparent (on black), CMYK and 16-bit pictures are converted to RGB.
    Raises DataError naming the file if it is missing or no readable picture, or if Pillow is absent.
    """
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError:
        raise DataError("reading pictures needs Pillow: pip install 'inception-minigrad[images]'") from None
    try:
        with Image.open(path) as file:
            picture: Image.Image = file
            if picture.mode.startswith("I"):  # 16 bit: Pillow would clip, not scale
                values = np.asarray(picture, dtype=np.float64) / 257
                picture = Image.fromarray(np.rint(values).clip(0, 255).astype(np.uint8))
            elif picture.has_transparency_data:  # convert("RGB") would show the colours under the transparency
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture)
            picture = ImageOps.exif_transpose(picture).convert("RGB")
            fitted = ImageOps.fit(picture, (size[1], size[0]), Image.Resampling.BICUBIC)
            return np.asarray(fitted, dtype=np.uint8)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not a readable picture ({error})") from None


def find_pictures(paths: list[Path]) -> list[Path]:
    """The files given, and all pictures below the directories given, in order of their names.

    Raises DataError for a directory without pictures.
    """
    found = []
    for path in paths:
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        if not inside:
            raise DataError(f"{path}: no pictures in this directory ({', '.join(SUFFIXES)})")
        found += inside
    return found

"""How pictures are prepared: as the weights say, the same for evaluate and predict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_weights_foreign import ABOUT

from inception.__main__ import main
from inception.data import DataError, Preprocessing, find_pictures, read_picture
from inception.models import create_model
from inception.weights import save_weights
from inception.weights.pytorch import write_pytorch


def test_pictures_are_prepared_as_the_weights_say(tmp_path: Path) -> None:
    """Shorter side to 20, the middle 12×10, RGB or BGR: against Pillow's own steps."""
    image = pytest.importorskip("PIL.Image")
    picture = image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    picture.save(tmp_path / "p.png")
    about = {
        "size": [12, 10],
        "mean": [0.1, 0.2, 0.3],
        "std": [0.5, 0.25, 1],
        "resize": 20,
        "interpolation": "bilinear",
    }
    scaled = np.asarray(picture.resize((30, 20), image.Resampling.BILINEAR))[4:16, 10:20] / 255
    wanted = ((scaled - about["mean"]) / about["std"]).transpose(2, 0, 1)
    np.testing.assert_allclose(Preprocessing.of(about).read(tmp_path / "p.png")[0], wanted, atol=1e-5)
    turned = ((scaled[:, :, ::-1] - about["mean"]) / about["std"]).transpose(2, 0, 1)
    bgr = Preprocessing.of(about | {"channels": "BGR"})
    np.testing.assert_allclose(bgr.read(tmp_path / "p.png")[0], turned, atol=1e-5)
    for wrong in ({"size": [12]}, {"size": 12}, {"resize": 5}, {"std": [1, 0, 1]}, {"mean": "abc"}, {"channels": "HSV"},
                  {"interpolation": "fastest"}, {"size": [0, 4]}, {"mean": [np.nan] * 3}):  # fmt: skip
        with pytest.raises(DataError, match=f"the weights want pictures of {next(iter(wrong))} .*, which must be"):
            Preprocessing.of(about | wrong)


@pytest.mark.parametrize("size", [(60, 40), (41, 300), (300, 41), (20, 20), (19, 21), (7, 5), (1, 200)])
def test_only_what_is_seen_is_scaled(tmp_path: Path, size: tuple[int, int]) -> None:
    """The same to a level as scaling the whole picture and cutting the middle out."""
    image = pytest.importorskip("PIL.Image")
    picture = image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8))
    picture.save(tmp_path / "p.png")
    found = read_picture(tmp_path / "p.png", (16, 12), resize=20).astype(int)
    w, h = (20 * side // min(size) for side in size)
    top, left = round((h - 16) / 2), round((w - 12) / 2)
    whole = np.asarray(picture.resize((w, h), image.Resampling.BICUBIC)).astype(int)
    assert np.abs(found - whole[top : top + 16, left : left + 12]).max() <= 1


def test_a_picture_of_one_line_takes_no_gigabytes(tmp_path: Path) -> None:
    """Scaled as a whole it would have 256×15,360,000 pixels."""
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (60_000, 1), "red").save(tmp_path / "p.png")
    picture = Preprocessing((224, 224), resize=256).picture(tmp_path / "p.png")
    assert picture.shape == (224, 224, 3)
    assert (picture == [255, 0, 0]).all()


@pytest.mark.parametrize("form", ["folder", "npz"])
@pytest.mark.parametrize(
    "wanted",
    [
        {"size": [32, 32]},
        {"size": [24, 32], "interpolation": "lanczos"},
        {"size": [32, 24], "resize": 48, "interpolation": "bilinear", "channels": "BGR"},
        {"size": [30, 30], "channels": "BGR"},
    ],
    ids=str,
)
def test_evaluate_and_predict_see_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, wanted: dict[str, Any]
) -> None:
    """Accuracy and loss of a data set are those of predict's answers on its pictures, whatever the weights want."""
    image = pytest.importorskip("PIL.Image")
    about = ABOUT | wanted | {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    model = create_model("googlenet_small", num_classes=4, seed=3)
    model.fc1.weight.data *= 30  # pictures are told apart
    save_weights(tmp_path / "w.npz", model, about)
    rng = np.random.default_rng(1)
    pictures = np.stack([rng.integers(0, bright, (30, 30, 3), np.uint8) for bright in range(15, 255, 20)])
    labels = np.arange(12) % 4
    for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        for part in ("train", "test"):
            folder = tmp_path / "d" / part / about["classes"][label]
            folder.mkdir(parents=True, exist_ok=True)
            image.fromarray(picture).save(folder / f"{i}.png")
    arrays = {"x_train": pictures, "y_train": labels, "x_test": pictures, "y_test": labels}
    np.savez(tmp_path / "d.npz", classes=np.array(about["classes"]), **arrays)

    assert main(["predict", str(tmp_path / "w.npz"), str(tmp_path / "d" / "test"), "--json", "--top", "4"]) == 0
    right, losses = [], []
    for line in capsys.readouterr().out.splitlines():
        answer = json.loads(line)
        label = Path(answer["picture"]).parent.name
        chances = {row["class"]: row["probability"] for row in answer["classes"]}
        right.append(answer["classes"][0]["class"] == label)
        losses.append(-np.log(chances[label]))
    data = tmp_path / ("d" if form == "folder" else "d.npz")
    assert main(["evaluate", str(tmp_path / "w.npz"), "--data", str(data), "--json", "--batch-size", "5"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert 0 < sum(right) < 12
    assert result["accuracy"] == sum(right) / 12
    assert result["loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_weights_that_do_not_say_how_pictures_are_prepared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those taken by their order, for one."""
    state = create_model("googlenet_small", num_classes=10).state_dict()
    write_pytorch(tmp_path / "w.pth", {f"x{n}": array for n, array in state.items()}, {})
    for command in (["evaluate", str(tmp_path / "w.pth")], ["predict", str(tmp_path / "w.pth"), str(tmp_path)]):
        assert main([*command, "--model", "googlenet_small"]) == 1
        assert "do not say how pictures are prepared: size, mean, std" in capsys.readouterr().err


def test_hidden_folders_and_folders_called_like_pictures_are_none(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for name in ("a.png", ".hidden/b.png", ".c.png", "deep/.hidden/d.png", "deep/e.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "album.jpg").mkdir()
    assert find_pictures([tmp_path]) == [tmp_path / "a.png", tmp_path / "deep" / "e.png"]


@pytest.mark.parametrize("mean", [["0.5"] * 3, [0.5] * 2, 0.5, [True] * 3, [0.5, float("nan"), 0.5]], ids=str)
def test_what_is_no_mean(mean: Any) -> None:
    with pytest.raises(DataError, match=r"the weights want pictures of mean .*, which must be three numbers"):
        Preprocessing.of({"size": [8, 8], "mean": mean, "std": [1, 1, 1]})


# ---- metadata ----


def test_pixels_are_read_whatever_stands_beside_them(tmp_path: Path) -> None:
    """Damaged EXIF, a megabyte of text and a damaged colour profile: the same pixels as without, unturned."""
    image = pytest.importorskip("PIL.Image")
    from PIL.PngImagePlugin import PngInfo

    picture = image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8))
    text = PngInfo()
    text.add_text("x", "a" * 5_000_000, zip=True)
    text.add_itxt("y", "b" * 5_000_000, zip=True)
    files = {
        "plain.png": {},
        "exif.png": {"exif": b"garbage!"},
        "text.png": {"pnginfo": text},
        "profile.png": {"icc_profile": b"a" * 5_000_000},
        "plain.webp": {"lossless": True},
        "exif.webp": {"lossless": True, "exif": b"Exif\0\0garbage!"},
        "text.webp": {"lossless": True, "xmp": b"a" * 5_000_000},
        "profile.webp": {"lossless": True, "icc_profile": b"a" * 5_000_000},
        "plain.jpg": {},
        "exif.jpg": {"exif": b"Exif\0\0garbage!"},
        "comment.jpg": {"comment": "a" * 60_000},
        "profile.jpg": {"icc_profile": b"a" * 200_000},
    }
    for name, options in files.items():
        picture.save(tmp_path / name, **options)
        found = read_picture(tmp_path / name, (8, 8))
        assert np.array_equal(found, read_picture(tmp_path / f"plain.{name.rpartition('.')[2]}", (8, 8))), name
    assert np.array_equal(read_picture(tmp_path / "text.png", (8, 8)), np.asarray(picture))
    content = (tmp_path / "plain.png").read_bytes()
    (tmp_path / "bad.png").write_bytes(content[:33] + b"\0\0\0\4iCCPabcd\0\0\0\0" + content[33:])  # a wrong checksum
    assert np.array_equal(read_picture(tmp_path / "bad.png", (8, 8)), np.asarray(picture))


def test_pixels_that_are_cut_short_are_refused(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    picture = image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    for name in ("p.png", "p.jpg", "p.bmp", "p.webp", "p.ppm"):
        picture.save(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        read_picture(tmp_path / name, (64, 64))
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(DataError, match="not a readable picture"):
            read_picture(tmp_path / name, (64, 64))


def test_honest_pictures_of_many_pixels_are_read(tmp_path: Path) -> None:
    """A white page of 16 million pixels in a few kilobytes; a photo of 24 million in a megabyte."""
    image = pytest.importorskip("PIL.Image")
    image.new("L", (4000, 4000), 255).save(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size < 100_000
    assert (read_picture(tmp_path / "page.png", (8, 8)) == 255).all()
    image.new("RGB", (6000, 4000), (0, 0, 255)).save(tmp_path / "photo.jpg")
    assert (read_picture(tmp_path / "photo.jpg", (8, 8))[..., 2] > 250).all()


@pytest.mark.parametrize("size", [224, (0, 5), (5,), ("5", "5"), (5.0, 5)], ids=str)
def test_what_is_no_size(tmp_path: Path, size: Any) -> None:
    pytest.importorskip("PIL.Image")
    with pytest.raises(DataError, match=r"a size of \(H, W\) pixels"):
        read_picture(tmp_path / "p.png", size)
    with pytest.raises(DataError, match=r"got .* and 'fastest'"):
        read_picture(tmp_path / "p.png", (5, 5), interpolation="fastest")


def test_whole_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    about = {"size": np.array([8, 8]), "mean": np.zeros(3), "std": np.float32([1, 1, 1]), "resize": np.int64(9)}
    assert Preprocessing.of(about).resize == 9

"""The commands on trained weights: models that are shipped, predict, export, summary, compare."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_weights_foreign import ABOUT, same

from inception.__main__ import main
from inception.models import create_model
from inception.weights import WeightsError, load_model, save_weights, shipped
from inception.weights.pytorch import write_pytorch

# ---- a model that is shipped ----


def test_a_shipped_model_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inception.weights._SHIPPED", tmp_path / "shipped")
    with pytest.raises(WeightsError, match=r"no trained model is shipped .*python -m inception train"):
        shipped()
    (tmp_path / "shipped").mkdir()
    save_weights(tmp_path / "shipped" / "small.safetensors", create_model("googlenet_small", num_classes=4), ABOUT)
    assert shipped() == shipped("small") == tmp_path / "shipped" / "small.safetensors"
    with pytest.raises(WeightsError, match="no shipped model 'large': choose from small"):
        shipped("large")


def test_evaluate_knows_the_shipped_model_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    """It is read, and found to be of other classes than the shapes."""
    assert main(["evaluate", "googlenet_small", "--data", "shapes", "--quiet"]) == 1
    assert "are not those that googlenet_small tells apart (airplane, automobile, bird" in capsys.readouterr().err
    assert main(["evaluate", "googlenet_tiny", "--data", "shapes", "--quiet"]) == 1
    assert "there is no file and no shipped model 'googlenet_tiny'" in capsys.readouterr().err


# ---- the commands ----


def test_predicting_with_the_shipped_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (40, 30), "red").save(tmp_path / "p.png")
    monkeypatch.setattr("inception.weights._SHIPPED", tmp_path)
    assert main(["predict", str(tmp_path / "p.png")]) == 1
    assert "no trained model is shipped" in capsys.readouterr().err
    about = ABOUT | {"std": [0.25] * 3}
    save_weights(tmp_path / "small.safetensors", create_model("googlenet_small", num_classes=4), about)
    assert main(["predict", str(tmp_path / "p.png")]) == 0
    first = capsys.readouterr().out
    assert len(first.splitlines()) == 5
    assert main(["predict", str(tmp_path / "p.png"), "--weights", "small"]) == 0
    assert capsys.readouterr().out == first


def test_exporting_with_a_description(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights by order say nothing of pictures: what is lacking is named, and can be given."""
    model = create_model("googlenet_small", num_classes=2)
    write_pytorch(tmp_path / "w.pth", {f"x{n}": array for n, array in model.state_dict().items()}, {})
    arguments = [
        "export",
        str(tmp_path / "w.pth"),
        "--to",
        str(tmp_path / "w.safetensors"),
        "--model",
        "googlenet_small",
    ]
    assert main(arguments) == 1
    assert "size, mean, std" in capsys.readouterr().err
    about = {"classes": ["a", "b"], "size": [32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "channels": "BGR"}
    for wrong, sentence in (
        ([], "it must be a JSON object"),
        (about | {"classes": ["a"]}, "classes must be the 2 names of the outputs, in order, got a list of 1"),
        (about | {"model": "x"}, "leave out model, which the weights say themselves"),
    ):
        (tmp_path / "about.json").write_text(json.dumps(wrong))
        assert main([*arguments, "--about", str(tmp_path / "about.json")]) == 1
        assert f"--about {tmp_path / 'about.json'}: {sentence}" in capsys.readouterr().err
    assert not (tmp_path / "w.safetensors").exists()
    (tmp_path / "about.json").write_text(json.dumps(about))
    assert main([*arguments, "--about", str(tmp_path / "about.json")]) == 0
    assert "by order and shape" in capsys.readouterr().out
    loaded, found = load_model(tmp_path / "w.safetensors")
    assert same(loaded.state_dict(), model.state_dict())
    assert {key: found[key] for key in about} == about


def test_what_onnx_is_told_of_pictures_is_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "about.json").write_text(json.dumps({"size": 32}))
    arguments = ["export", "googlenet_small", "--to", str(tmp_path / "m.onnx"), "--about", str(tmp_path / "about.json")]
    assert main(arguments) == 1
    assert "the weights want pictures of size 32, which must be [height, width], pixels" in capsys.readouterr().err
    assert not (tmp_path / "m.onnx").exists()


def test_a_shipped_model_is_exported_with_its_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its name means the same for every command; else the weights are fresh, and it says so."""
    for name in ("googlenet_small", "googlenet_small_shapes"):
        assert main(["export", name, "--to", str(tmp_path / "m.npz")]) == 0
        assert "fresh" not in capsys.readouterr().out
        exported, trained = load_model(tmp_path / "m.npz")[0], load_model(shipped(name))[0]
        assert same(exported.state_dict(), trained.state_dict())
    assert main(["export", "googlenet_cifar", "--to", str(tmp_path / "m.npz")]) == 0
    assert capsys.readouterr().out.endswith("bytes, fresh weights, not trained\n")
    assert main(["export", "googlenet_smal", "--to", str(tmp_path / "m.npz")]) == 1
    assert "there is no file and no model 'googlenet_smal'" in capsys.readouterr().err


def test_a_shipped_model_may_stand_before_the_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (40, 30), "red").save(tmp_path / "p.png")
    assert main(["predict", "googlenet_small_shapes", str(tmp_path / "p.png")]) == 0
    assert "disc" in (said := capsys.readouterr().out) or "square" in said


def run_with(directory: Path, *names: str) -> Path:
    """A run's directory with weights of these names, and a plot."""
    image = pytest.importorskip("PIL.Image")
    directory.mkdir()
    image.new("RGB", (40, 30), "blue").save(directory / "curves.png")
    for seed, name in enumerate(names):
        about = ABOUT | {"classes": [f"{name} {k}" for k in range(4)], "std": [0.25] * 3}
        save_weights(directory / name, create_model("googlenet_small", num_classes=4, seed=seed), about)
    return directory


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (("best.npz", "weights.npz", "checkpoint-00000009.npz"), "weights.npz"),
        (("checkpoint-00000009.npz", "best.npz"), "best.npz"),
        (("checkpoint-00000009.npz", "checkpoint-00000010.npz"), "checkpoint-00000010.npz"),
    ],
)
def test_a_run_stands_for_its_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], names: tuple[str, ...], taken: str
) -> None:
    run = run_with(tmp_path / "run", *names)
    picture = str(run / "curves.png")
    for arguments in (["predict", str(run), picture], ["predict", "--weights", str(run), picture]):
        assert main([*arguments, "--top", "1"]) == 0
        said = capsys.readouterr()
        assert said.out.startswith(f"{picture}\n")
        assert f" {taken} " in said.out
        assert said.err == f"{run}: a run, with the weights in {taken}\n"
    assert main(["export", str(run), "--to", str(tmp_path / "w.npz"), "--quiet"]) == 0
    assert load_model(tmp_path / "w.npz")[1]["classes"][0] == f"{taken} 0"
    assert main(["evaluate", str(run), "--quiet"]) == 1
    assert f"({taken} 0, {taken} 1, " in capsys.readouterr().err


def test_what_does_not_stand_for_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_with(tmp_path / "run", "best.npz")
    plots = run_with(tmp_path / "plots")
    picture = str(plots / "curves.png")
    for arguments, sentence in (
        (["predict", picture, str(run)], f"{run}: a training run, not pictures"),
        (["predict", str(run)], "are weights: name pictures after them"),
        (["predict", "https://a.b/photo.JPG", picture], "an address of a picture: download it first"),
        (["predict", picture, "https://a.b/photo.png"], "an address of a picture: download it first"),
        (["evaluate", str(plots)], f"{plots}: a directory without weights"),
        (["export", str(plots), "--to", str(tmp_path / "w.npz")], f"{plots}: a directory without weights"),
    ):
        assert main(arguments) == 1
        said = capsys.readouterr()
        assert sentence in said.err
        assert said.out == ""
    assert main(["predict", str(plots), "--top", "1"]) == 0  # a directory of pictures, by the shipped model


@pytest.mark.parametrize("name", ["best.pth.tar", "weights", "w.PTH", "w.bin", "w.png"])
def test_weights_are_weights_whatever_their_name(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Pictures are never classified by another model because the weights have a name without a known end."""
    picture = str(run_with(tmp_path / "plots") / "curves.png")
    about = ABOUT | {"classes": list("abcd"), "std": [0.25] * 3}
    save_weights(tmp_path / "w.pth", create_model("googlenet_small", num_classes=4), about)
    (tmp_path / "w.pth").rename(tmp_path / name)
    for arguments in ([str(tmp_path / name), picture], [picture, "--weights", str(tmp_path / name)]):
        assert main(["predict", *arguments, "--json"]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["picture"] for line in lines] == [picture]
        assert sorted(row["class"] for row in lines[0]["classes"]) == list("abcd")
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:5000])
    assert main(["predict", str(tmp_path / name), picture]) == 1
    assert capsys.readouterr().out == ""


def test_names_in_files_do_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = pytest.importorskip("PIL.Image")
    evil = "\x1b[31m\a\u202e\n"
    about = ABOUT | {"classes": [f"{evil}{k}" for k in range(4)], "std": [0.25] * 3, "source": evil}
    save_weights(tmp_path / "w.npz", create_model("googlenet_small", num_classes=4), about)
    picture = tmp_path / f"p{evil}.png"
    image.new("RGB", (40, 30), "red").save(picture)
    (tmp_path / f"q{evil}.png").write_bytes(b"no picture")
    assert main(["predict", str(tmp_path / "w.npz"), str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert main(["export", str(tmp_path / "w.npz"), "--to", str(tmp_path / "x.npz")]) == 0
    assert main(["evaluate", str(tmp_path / "w.npz")]) == 1
    for text in (*said, *capsys.readouterr()):
        assert text.replace("\n", "").isprintable()
        assert "\\x1b[31m\\x07\\u202e\\n" in text or not text


def test_table_1_and_the_family_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summary", "googlenet", "--table-1", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"] for row in rows if not row["parameters_agree"]] == ["conv1", "4a", "4c", "4d", "4e", "5a", "5b"]
    assert main(["compare", "googlenet_small", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 260_650
    assert main(["compare", "vgg"]) == 1
    assert "googlenet_small" in capsys.readouterr().err


def test_classes_of_one_name_do_not_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As ImageNet has two cranes, the bird and the machine."""
    rng, classes = np.random.default_rng(0), ["crane", "crane", "kite"]
    x, y = rng.integers(0, 256, (9, 32, 32, 3), dtype="uint8"), np.arange(9) % 3
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x, y_test=y, classes=np.array(classes))
    model = create_model("googlenet_small", num_classes=3, seed=0)
    about = ABOUT | {"classes": classes, "std": [0.25] * 3, "options": {"num_classes": 3}}
    save_weights(tmp_path / "w.npz", model, about)
    assert main(["evaluate", str(tmp_path / "w.npz"), "--data", str(tmp_path / "d.npz"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["accuracy_by_class"]) == ["crane", "crane (2)", "kite"]
    assert np.mean(list(result["accuracy_by_class"].values())) == pytest.approx(result["accuracy"])

"""The examples to learn from, each in its quickest form, as a user runs them: what they print and draw is checked."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from inception.models import create_model
from inception.weights import load_model, save_weights, shipped

ROOT = Path(__file__).parents[1]
Example = Callable[..., str]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Example:
    """Run an example in an empty folder; return what it printed, or what it said as it failed with `code`."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: object, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        printed, said = capsys.readouterr()
        assert ended.value.code == code, said
        return said if code else printed

    return run


def pixels_drawn(path: Path) -> np.ndarray:
    """The values of a PNG."""
    image = pytest.importorskip("PIL.Image")
    with image.open(path) as picture:
        return np.asarray(picture.convert("L"))


def test_every_op_is_a_stop_with_its_code_and_a_gradient(example: Example) -> None:
    printed = example("follow_one_batch")
    rows = re.findall(r"^(\d+) +(\S.*?)  +(\w+)(?: \(.*?\))? +([\d×]+) +(\S+:\d+) .* (\S+)$", printed, re.MULTILINE)
    assert [int(row[0]) for row in rows] == list(range(1, len(rows) + 1))
    assert rows[0][1:4] == ("conv1", "conv_bn_relu", "4×64×32×32")
    assert rows[-1][1:4] == ("outside the model", "cross_entropy", "1")
    assert all(float(row[5]) > 0 for row in rows)
    for op, place in {row[2]: row[4] for row in rows}.items():
        file, line = place.split(":")
        assert f"def {op}(" in (ROOT / file).read_text().splitlines()[int(line) - 1]
    assert "(1 of 3 at once)" in printed
    assert "↑ ‖gradient‖ is the length of dL/dy" in printed
    assert "y[n, c, i, j] = max_{u, v}" in printed  # the formula, from the docstring


@pytest.mark.parametrize("model", ["inception_resnet_v2_cifar", "inception_v2", "googlenet_paper"])
def test_every_kind_of_network_can_be_followed(example: Example, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import inception.models as models

    full = models.create_model
    monkeypatch.setattr(models, "create_model", lambda name, **options: full(name, **options, width=0.25))
    printed = example("follow_one_batch", "--model", model, "--batch", 2)
    assert "the gradient of the pixels has length" in printed
    assert "no graph" not in printed
    losses = re.findall(r"cross_entropy +1 .* (\S+)$", printed, re.MULTILINE)
    assert losses == (["1", "0.3", "0.3"] if model == "googlenet_paper" else ["1"])  # each head's loss counts 0.3


def test_a_convolution_in_depth_agrees_with_its_parts(example: Example, tmp_path: Path) -> None:
    printed = example("follow_one_batch", "--stop", "inception3a.branch2.1", "--out", tmp_path)
    by_hand, by_op = (
        float(re.search(rf"{what} +(?:.* = )?(\S+)$", printed, re.MULTILINE)[1]) for what in ("sum ", "conv2d ")
    )
    assert by_hand == pytest.approx(by_op, rel=1e-5)
    forward, backward = map(float, re.search(r"by (\S+) in its result, and by (\S+) of", printed).groups())
    assert forward < 1e-5
    assert backward < 1e-4
    assert pixels_drawn(tmp_path / "inception3a.branch2.1.png").std() > 10


def test_the_gradient_of_a_shared_input_is_said_to_be_of_all(example: Example, tmp_path: Path) -> None:
    printed = example("follow_one_batch", "--stop", "inception3a.branch1", "--out", tmp_path)
    assert re.search(r"\S+ for input 0 \(4, 64, 32, 32\), from all 3 units that see it", printed)


@pytest.mark.parametrize("stop", ["pixels", "maxpool1", "concat"])
def test_other_stops_are_drawn(example: Example, tmp_path: Path, stop: str) -> None:
    example("follow_one_batch", "--stop", stop, "--out", tmp_path)
    assert pixels_drawn(tmp_path / f"{stop}.png").std() > 10


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--stop", "conv7"], "there is no stop 'conv7'"),
        (["--model", "lenet"], "there is no model 'lenet'"),
        (["--weights", "none.npz"], "none.npz: there is no such file"),
        (["--data", "nowhere"], "'nowhere' is no data set"),
        (["--batch", 1], "--batch must be at least 2"),
    ],
)
def test_what_is_not_there_gets_a_sentence(example: Example, options: list[object], sentence: str) -> None:
    said = example("follow_one_batch", *options, code=1)
    assert sentence in said
    assert said.count("\n") == 1


def test_pictures_from_files_are_named_with_their_bytes(example: Example, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for part in ("train", "test"):
        for name in ("dark", "light"):
            (tmp_path / part / name).mkdir(parents=True)
            noise = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)
            image.fromarray(noise).save(tmp_path / part / name / "noise.png")
    printed = example("follow_one_batch", "--data", tmp_path, "--batch", 2)
    size = (tmp_path / "train" / "dark" / "noise.png").stat().st_size
    assert f"noise.png, {size:,} bytes" in printed
    assert "labels dark, light" in printed


def test_own_op_is_proved_refused_and_trained(example: Example) -> None:
    printed = example("own_op", "--steps", 60)
    assert float(re.search(r"finite differences (\S+)", printed)[1]) < 1e-6
    assert "swish_wrong: gradcheck: backward gives" in printed
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", printed)]
    assert losses[-1] < 0.6 < losses[0]


def test_naive_against_reduced(example: Example, tmp_path: Path) -> None:
    printed = example("naive_vs_reduced", "--train", 16, "--epochs", 1, "--test", 10, "--out", tmp_path)
    assert printed.count("NEAR CHANCE (10%)") == 2
    assert printed.count("pass 1 of 1: loss") == 2
    assert pixels_drawn(tmp_path / "naive_vs_reduced.png").std() > 10
    naive, reduced = (
        int(re.search(rf"^{name} +\d+ +\S+ +(\S+)", printed, re.MULTILINE)[1].replace(",", ""))
        for name in ("naive", "reduced")
    )
    pixels = 28 * 28
    # 1×1, then each reduction and its convolution, then the projection, of 3a and 3b
    a = 192 * 64 + 192 * 96 + 96 * 128 * 9 + 192 * 16 + 16 * 32 * 25 + 192 * 32
    b = 256 * 128 + 256 * 128 + 128 * 192 * 9 + 256 * 32 + 32 * 96 * 25 + 256 * 64
    assert reduced == pixels * (a + b)
    wide = 192 + 64 + 128 + 32  # the pool of the naive module passes all its input on
    assert naive == pixels * (192 * (64 + 128 * 9 + 32 * 25) + wide * (128 + 192 * 9 + 96 * 25))


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that have learnt nothing, of the narrow network."""
    about = load_model(shipped("googlenet_small_shapes"))[1] | {"options": {"num_classes": 10, "width": 0.25}}
    path = tmp_path_factory.mktemp("untrained") / "weights.npz"
    save_weights(path, create_model("googlenet_small", **about["options"]), about)
    return path


def test_channels_of_the_shipped_model_know_classes(example: Example, tmp_path: Path) -> None:
    printed = example("features", "--out", tmp_path, "--pictures", 150, "--channels", 3)
    assert float(re.search(r"([\d.]+)% of 500 pictures of shapes test recognised", printed)[1]) > 95
    assert "NEAR CHANCE" not in printed
    fresh, trained = map(int, re.search(r"fresh one passes (\d+)%.* trained one (\d+)%", printed).groups())
    assert trained < fresh
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["filters.png", "inception5b.png"]
    assert all(pixels_drawn(path).std() > 10 for path in tmp_path.glob("*.png"))


def test_a_network_that_has_learnt_nothing_is_said_to(example: Example, untrained: Path, tmp_path: Path) -> None:
    printed = example("features", "--weights", untrained, "--out", tmp_path, "--pictures", 50, "--layer", "inception4a")
    assert "NEAR CHANCE (10%)" in printed


def test_the_evidence_lies_where_the_class_is(example: Example, tmp_path: Path) -> None:
    printed = example("gradcam", "--mosaics", 4, "--out", tmp_path)
    assert int(re.search(r"(\d+)% of the evidence", printed)[1]) > 50
    assert pixels_drawn(tmp_path / "gradcam.png").std() > 10


def test_a_dream_excites_its_channels_more(example: Example, tmp_path: Path) -> None:
    printed = example("deepdream", "--out", tmp_path, "--steps", 3, "--size", 32, "--layer", "inception3a")
    before, after = map(float, re.search(r"mean (\S+) before, (\S+) after", printed).groups())
    assert after > 1.2 * before
    assert pixels_drawn(tmp_path / "inception3a.png").std() > 10


def test_data_of_other_classes_gets_a_sentence(example: Example) -> None:
    said = example("gradcam", "--weights", "googlenet_small", code=1)
    assert "googlenet_small tells airplane, automobile, bird, … apart, and --data shapes has striped disc" in said


def test_weights_meet_pictures_of_their_classes_alone(example: Example) -> None:
    said = example("follow_one_batch", "--weights", "googlenet_small", code=1)
    assert "googlenet_small tells airplane, automobile, bird, … apart, and --data shapes has striped disc" in said


def test_pictures_are_prepared_as_the_weights_say(example: Example) -> None:
    """By the mean of all that the network was trained on; less their own, the pictures of a batch would have none."""
    own = example("follow_one_batch", "--batch", 4)
    assert re.search(r"normalised .*, mean -?0\.000, std 1\.000$", own, re.MULTILINE)
    trained = example("follow_one_batch", "--weights", "googlenet_small_shapes", "--batch", 4)
    assert re.search(r"normalised .*, mean -?0\.(?!000)\d+, std", trained, re.MULTILINE)


@pytest.mark.parametrize("option", ["--pictures", "--channels"])
def test_none_at_all_gets_a_sentence(example: Example, option: str) -> None:
    assert f"error: {option} must be at least 1, got 0" in example("features", option, 0, code=1)


def test_a_network_without_heads_gets_a_sentence(example: Example) -> None:
    said = example("aux_heads", "--model", "inception_v2", code=1)
    assert "error: inception_v2 has no auxiliary heads: take googlenet, googlenet_paper" in said


def test_a_network_of_ones_own_is_trained_saved_and_loaded(example: Example, tmp_path: Path) -> None:
    printed = example("own_network", "--pictures", 64, "--epochs", 1, "--out", tmp_path / "mine.npz")
    assert "classes cross, disc, ring, square, triangle" in printed
    assert "loaded again" in printed
    right = re.findall(r"^  test picture \d+, (\w+): \w+$", printed, re.MULTILINE)
    assert right == ["cross", "disc", "ring", "square", "triangle"]
    assert load_model(tmp_path / "mine.npz")[1]["model"] == "mine"


def test_heads_send_gradient_to_what_lies_before_them_alone(example: Example, tmp_path: Path) -> None:
    printed = example("aux_heads", "--model", "googlenet_small", "--out", tmp_path)
    times = {name: float(t) for name, t in re.findall(r"^(\w+) +\S+ +\S+ +([\d.]+)$", printed, re.MULTILINE)}
    assert times["inception5b"] == times["maxpool2"] == 1
    assert times["inception4d"] != 1
    assert times["conv1"] != 1
    assert pixels_drawn(tmp_path / "googlenet_small.png").std() > 10


@pytest.mark.parametrize("name", ["gradcam", "features", "deepdream", "naive_vs_reduced"])
def test_matplotlib_is_missed_at_once(
    example: Example, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in example(name, code=1)
    assert list(tmp_path.iterdir()) == []

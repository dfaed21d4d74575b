"""The two programs, as a user runs them: what they print, what they write, and one sentence for every mistake."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from test_data import NAMES, write_binary, write_python

from inception.__main__ import main
from inception.data import DataError, load_cifar10, normalise, read_picture
from inception.models import create_model
from inception.training import RECIPES, Recipe, Training, to_tensor
from inception.weights import load_model, load_weights, save_weights
from minigrad import backend, no_grad, num_threads, ops, set_num_threads
from minigrad.backend import to_host

ROOT = Path(__file__).parents[1]


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Program = Callable[..., Outcome]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[Program]:
    """Run an example's main() here, in an empty folder; what it sets for the whole process is put back."""
    threads, before = num_threads(), backend.backend()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def call(name: str, *arguments: Any) -> Outcome:
        main = runpy.run_path(str(ROOT / "examples" / name), run_name="example")["main"]
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capfd.readouterr()
        try:
            code = main()
        except SystemExit as stop:  # argparse
            code = stop.code
        return Outcome(code, *capfd.readouterr())

    yield call
    backend.set_backend(before)
    set_num_threads(threads)


def sentence(outcome: Outcome) -> str:
    """The program must have failed with one line of explanation; argparse prints its usage before it."""
    assert outcome.code in (1, 2)
    assert "Traceback" not in outcome.err
    *usage, last = outcome.err.strip().splitlines()
    assert "error: " in last
    assert not usage or usage[0].startswith("usage: ")
    return last.partition("error: ")[2]


def run_alone(name: str, *arguments: Any, **environment: str) -> Outcome:
    """Run an example as a program of its own."""
    variables = os.environ | {"PYTHONPATH": str(ROOT), "MINIGRAD_NUM_THREADS": "1", "MINIGRAD_BACKEND": "numpy"}
    command = [sys.executable, "-W", "error", ROOT / "examples" / name, *map(str, arguments)]
    done = subprocess.run(command, env=variables | environment, capture_output=True, timeout=120)
    return Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_binary(tmp_path_factory.mktemp("cifar"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as train_cifar.py writes it, of a model that has learnt nothing."""
    path = tmp_path_factory.mktemp("weights") / "w.npz"
    about = {
        "model": "googlenet_small",
        "options": {"num_classes": 10, "aux_logits": False},
        "classes": NAMES,
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.25, 0.3],
        "size": [32, 32],
    }
    save_weights(path, create_model("googlenet_small", seed=4), about)
    return path


# ---- train_cifar.py ----


def test_the_example_as_a_program_of_its_own(cifar: Path, tmp_path: Path) -> None:
    path = tmp_path / "runs" / "w.npz"
    outcome = run_alone("train_cifar.py", "--data", cifar, "--epochs", 2, "--batch-size", 16, "--save", path)
    assert outcome.code == 0, outcome.err
    first, *epochs, last = outcome.out.splitlines()
    assert first.endswith(": 35 pictures of 10 classes, 4 steps")
    assert [line.split(":")[0] for line in epochs] == ["epoch 1", "epoch 2"]
    assert last == f"weights in {path}"
    _, about = load_model(path)
    assert about["classes"] == NAMES
    assert about["size"] == [32, 32]


def test_the_examples_loop_takes_the_steps_of_the_command(program: Program, cifar: Path, tmp_path: Path) -> None:
    """Shown in a page, and the same to the last bit: README's numbers are of either."""
    options = ["--data", cifar, "--epochs", 2, "--batch-size", 16, "--threads", 1, "--quiet", "--save"]
    assert program("train_cifar.py", *options, tmp_path / "example.npz") == (0, "", "")
    assert main(["train", *map(str, options), str(tmp_path / "command.npz"), "--no-aux", "--no-report"]) == 0
    (example, _), (command, _) = (load_weights(tmp_path / f"{name}.npz") for name in ("example", "command"))
    assert example.keys() == command.keys()
    assert [name for name in example if not np.array_equal(example[name], command[name])] == []


def test_the_example_writes_over_nothing(program: Program, cifar: Path) -> None:
    options = ["--data", cifar, "--epochs", 1, "--batch-size", 16]
    for name in ("weights", "weights-2"):
        outcome = program("train_cifar.py", *options)
        assert outcome.out.splitlines()[-1] == f"weights in runs/{name}.npz"
    before = Path("runs/weights.npz").read_bytes()
    assert "exists already" in sentence(program("train_cifar.py", *options, "--save", "runs/weights.npz"))
    assert Path("runs/weights.npz").read_bytes() == before


def test_the_example_says_what_is_wrong_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, program: Program, cifar: Path
) -> None:
    assert "nowhere" in sentence(program("train_cifar.py", "--data", "nowhere"))
    assert "vgg16" in sentence(program("train_cifar.py", "--model", "vgg16", "--data", cifar))
    assert "--epoch" in sentence(program("train_cifar.py", "--epoch", "3"))
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert "CuPy is not installed" in sentence(program("train_cifar.py", "--data", cifar, "--backend", "cupy"))


# ---- python -m inception ----


@pytest.fixture
def inception(program: Program, capfd: pytest.CaptureFixture[str]) -> Program:
    """Run a command of the command line here."""

    def call(*arguments: Any) -> Outcome:
        capfd.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            code = stop.code  # type: ignore[assignment]
        return Outcome(code, *capfd.readouterr())

    return call


def test_training_quietly_with_all_options(inception: Program, cifar: Path, tmp_path: Path) -> None:
    """Nothing is printed, and the file is at its default place, below the working directory."""
    write_python(tmp_path / "python")
    options = "--aux --width 0.5 --epochs 1 --batch-size 14 --lr 0.05 --seed 3 --validation 0.2 --backend numpy"
    options += " --threads 1 --quiet"
    data = tmp_path / "python"
    assert inception("train", "--data", data, "--no-report", *options.split()) == (0, "", "")
    arrays, about = load_weights(Path("runs/python-googlenet_small/weights.npz"))
    assert about["options"] == {"num_classes": 10, "aux_logits": True, "width": 0.5}
    assert arrays["conv1.conv.weight"].shape == (32, 3, 3, 3)
    load_model(Path("runs/python-googlenet_small/weights.npz"))
    assert all(np.isfinite(value).all() for value in arrays.values())
    assert os.listdir("runs") == ["python-googlenet_small"]


@pytest.mark.parametrize(
    ("data", "epochs", "batch_size"), [("shapes", 1, 64), ("a directory", 4, 128)], ids=["shapes", "cifar"]
)
def test_the_defaults_are_those_of_the_help(
    monkeypatch: pytest.MonkeyPatch, inception: Program, data: str, epochs: int, batch_size: int
) -> None:
    """Every option reaches the run, and is left out at its default."""
    seen: list[Any] = []
    monkeypatch.setattr("inception.commands.train.run", seen.append)
    assert inception("train", "--data", data).code == 0
    (options,) = seen
    assert (options.data, options.recipe.epochs, options.recipe.batch_size) == (data, epochs, batch_size)
    assert options.aux_logits is None
    assert options.validation == 0
    assert not options.quiet

    given = "--model googlenet_bn --aux --epochs 9 --batch-size 7 --lr 0.25 --seed 5 --validation 0.5 --save w --quiet"
    assert inception("train", *given.split()).code == 0
    options = seen[1]
    recipe = options.recipe
    assert (options.data, options.model, options.aux_logits) == ("shapes", "googlenet_bn", True)
    assert (recipe.epochs, recipe.batch_size, recipe.lr, recipe.seed) == (9, 7, 0.25, 5)
    assert (options.validation, options.save, options.quiet) == (0.5, Path("w"), True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--threads 0", "threads"),
        ("--threads -2", "threads"),
        ("--threads two", "threads"),
        ("--epochs 0", "epochs"),
        ("--epochs -1", "epochs"),
        ("--batch-size 0", "batch[ _-]size"),
        ("--batch-size -8", "batch[ _-]size"),
        ("--batch-size 36", "35 training pictures do not fill a batch of 36"),
        ("--lr nan", "lr"),
        ("--lr -1", "lr"),
        ("--lr inf", "lr"),
        ("--validation 1.5", "validation"),
        ("--validation -0.5", "validation"),
        ("--validation 0.001", "validation"),
        ("--validation nan", "validation"),
        ("--model vgg16", "vgg16"),
        ("--model googlenet", "224"),
        ("--backend jax", "jax"),
    ],
)
def test_an_option_out_of_range(inception: Program, cifar: Path, arguments: str, words: str) -> None:
    options = ["--data", cifar, "--epochs", 1, "--batch-size", 16, *arguments.split()]
    message = sentence(inception("train", *options, "--quiet"))
    assert re.search(words, message), message
    assert not list(Path().rglob("weights.npz"))


def test_data_that_is_not_there(inception: Program, tmp_path: Path) -> None:
    assert "nowhere" in sentence(inception("train", "--data", "nowhere"))
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in sentence(inception("train", "--data", tmp_path / "empty"))
    (tmp_path / "file").write_text("no directory")
    assert str(tmp_path / "file") in sentence(inception("train", "--data", tmp_path / "file"))


def test_damaged_data(inception: Program, tmp_path: Path) -> None:
    write_binary(tmp_path / "cifar")
    bad = tmp_path / "cifar" / "data_batch_3.bin"
    bad.write_bytes(bad.read_bytes()[:-5])
    assert str(bad) in sentence(inception("train", "--data", tmp_path / "cifar"))


def test_cupy_where_there_is_none(monkeypatch: pytest.MonkeyPatch, inception: Program, cifar: Path) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)  # importing it fails, whether it is installed or not
    outcome = inception("train", "--data", cifar, "--backend", "cupy")
    assert "CuPy is not installed: pip install" in sentence(outcome)
    assert outcome.code == 1


@pytest.mark.parametrize("place", ["a directory", "below a file"])
def test_weights_that_cannot_be_written_fail_before_training(
    monkeypatch: pytest.MonkeyPatch, inception: Program, cifar: Path, tmp_path: Path, place: str
) -> None:
    monkeypatch.setattr(Training, "run", lambda *_, **__: pytest.fail("it trained"))
    (tmp_path / "file").touch()
    path = tmp_path if place == "a directory" else tmp_path / "file" / "w.npz"
    before = sorted(os.listdir(tmp_path))
    message = sentence(inception("train", "--data", cifar, "--batch-size", 16, "--save", path))
    assert str(path) in message
    assert sorted(os.listdir(tmp_path)) == before


def test_a_second_run_takes_another_directory(inception: Program, cifar: Path) -> None:
    options = ["--data", cifar, "--epochs", 1, "--batch-size", 16, "--no-report"]
    for number, name in ((1, f"{cifar.name}-googlenet_small"), (2, f"{cifar.name}-googlenet_small-2")):
        outcome = inception("train", *options)
        assert outcome.code == 0, outcome.err
        last = rf"test accuracy \d+\.\d\d%, loss \d+\.\d{{4}}; weights in runs/{name}/weights.npz"
        assert re.fullmatch(last, outcome.out.splitlines()[-1])
        assert len(os.listdir("runs")) == number


def objects(outcome: Outcome) -> list[dict[str, Any]]:
    """Standard output must be JSON, one object a line, and nothing else; standard error empty."""
    assert (outcome.code, outcome.err) == (0, "")
    return [json.loads(line, parse_constant=pytest.fail) for line in outcome.out.splitlines()]


def test_training_in_json(inception: Program, cifar: Path) -> None:
    options = ["--data", cifar, "--epochs", 2, "--batch-size", 16, "--out", "runs/here", "--no-report"]
    *epochs, result = objects(inception("train", *options, "--json"))
    assert [row["epoch"] for row in epochs] == [1, 2]
    assert epochs == [json.loads(line) for line in Path("runs/here/log.jsonl").read_text().splitlines()]
    assert result["test_accuracy"] == epochs[-1]["test_accuracy"]
    assert result["weights"] == "runs/here/weights.npz"
    assert Path(result["weights"]).exists()


def test_a_recipe_by_name_and_what_differs_from_it(monkeypatch: pytest.MonkeyPatch, inception: Program) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("inception.commands.train.run", seen.append)
    given = (
        "--recipe googlenet_2014 --data d --no-nesterov --step-at 1 2.5 --flip no --clip-norm 3 --no-aux --width 0.5"
        " --prefetch 4"
    )
    assert inception("train", *given.split()).code == 0
    (options,) = seen
    assert options.recipe == dataclasses.replace(
        RECIPES["googlenet_2014"], nesterov=False, step_at=(1.0, 2.5), flip="no", clip_norm=3.0
    )
    assert (options.aux_logits, options.prefetch, options.out) == (False, 4, Path("runs/d-googlenet_small"))
    words = shlex.split(options.command())
    assert inception(*words[3:]).code == 0
    assert (seen[1].recipe, seen[1].aux_logits, seen[1].data, seen[1].width) == (options.recipe, False, "d", 0.5)


def test_resuming_by_the_command_line(inception: Program, cifar: Path) -> None:
    options = ["--data", cifar, "--epochs", 1, "--batch-size", 16, "--out", "r", "--no-report", "--quiet"]
    assert inception("train", *options) == (0, "", "")
    for name in ("r", "r/best.npz"):
        outcome = inception("train", "--resume", name, "--threads", 1)
        assert outcome.code == 0, outcome.err
    message = sentence(inception("train", "--resume", "r", "--epochs", 3, "--recipe", "cifar_fast"))
    assert "--epochs 3 (it has 1)" in message
    assert "--recipe cifar_fast (it has cifar_small)" in message
    assert "--ema" not in message  # which --recipe implies
    assert "holds a run already" in sentence(inception("train", *options))


@pytest.mark.parametrize("split", ["test", "train"])
def test_evaluating_by_class(inception: Program, weights: Path, cifar: Path, split: str) -> None:
    """What is printed and what is JSON agree with the model's own answers."""
    dataset = dict(zip(("train", "test"), load_cifar10(cifar), strict=True))[split]
    model, about = load_model(weights)
    with no_grad():
        logits = model(to_tensor(normalise(dataset.images, np.array(about["mean"]), np.array(about["std"]))))
    right = to_host(logits.data).argmax(axis=1) == dataset.labels
    (result,) = objects(inception("evaluate", weights, "--data", cifar, "--split", split, "--json", "--batch-size", 3))
    assert result["accuracy"] == right.mean()
    assert result["loss"] == pytest.approx(ops.cross_entropy(logits, dataset.labels).item(), rel=1e-5)
    for k, name in enumerate(NAMES):
        of_class = dataset.labels == k
        assert result["accuracy_by_class"][name] == (right[of_class].mean() if of_class.any() else None)
    lines = inception("evaluate", weights, "--data", cifar, "--split", split).out.splitlines()
    assert f"accuracy {right.mean():.2%}" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == NAMES


def test_evaluating_on_other_classes(inception: Program, weights: Path) -> None:
    message = sentence(inception("evaluate", weights, "--data", "shapes"))
    assert "striped disc" in message
    assert NAMES[0] in message


def test_predicting_in_json_names_a_bad_file_and_goes_on(inception: Program, weights: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (40, 30), "red").save(tmp_path / "b.png")
    (tmp_path / "a.png").write_text("no picture")
    outcome = inception("predict", weights, tmp_path, "--json", "--top", 2)
    assert outcome.code == 1
    bad, good = (json.loads(line) for line in outcome.out.splitlines())
    assert (bad["picture"], good["picture"]) == (str(tmp_path / "a.png"), str(tmp_path / "b.png"))
    assert "not a readable picture" in bad["error"]
    first, second = good["classes"]
    assert first["class"] in NAMES
    assert 1 > first["probability"] >= second["probability"] > 0


def test_a_summary(inception: Program) -> None:
    (result,) = objects(inception("summary", "googlenet_small", "--size", 32, "--json"))
    assert (result["parameters"], result["multiply_adds"]) == (260650, 79643904)
    outcome = inception("summary", "googlenet_small", "--size", 32, "--depth", 1)
    assert outcome.code == 0
    assert "260,650" in outcome.out.splitlines()[-1]
    assert "224" in sentence(inception("summary", "googlenet", "--size", 32))
    assert "--size" in sentence(inception("summary", "googlenet", "--size", 0))


@pytest.mark.parametrize("command", [[], ["train"], ["evaluate"], ["predict"], ["export"], ["summary"], ["compare"]])
def test_help_tells_exit_codes(inception: Program, command: list[str]) -> None:
    outcome = inception(*command, "--help")
    assert outcome.code == 0
    assert "exit codes:" in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 120
    if command == ["train"]:
        assert all(name in outcome.out for name in RECIPES)
        assert all(f"--{option.name.replace('_', '-')}" in outcome.out for option in dataclasses.fields(Recipe)[:-1])


class OutOfMemoryError(Exception):
    """As CuPy names it."""


@pytest.mark.parametrize("error", [MemoryError("Unable to allocate 7 GiB"), OutOfMemoryError("Out of memory")])
def test_out_of_memory_says_what_to_lower(
    monkeypatch: pytest.MonkeyPatch, inception: Program, cifar: Path, error: Exception
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("inception.training.step.training_step", fail)
    message = sentence(inception("train", "--data", cifar, "--batch-size", 16, "--quiet"))
    assert message.startswith(f"out of memory ({error}; at most ")
    assert "): lower --batch-size or --width, choose a smaller network, or set `recompute`" in message


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch, inception: Program) -> None:
    monkeypatch.setattr("inception.commands.train.run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        inception("train")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("trian", "argument COMMAND: there is no command 'trian' — did you mean 'train'?"),
        ("train --epoch 3", "there is no option --epoch — did you mean '--epochs'?"),
        ("train --batch_size=3", "there is no option --batch_size — did you mean '--batch-size'?"),
        ("train --bogus", "there is no option --bogus: see --help"),
        ("train cifar10", "'cifar10' belongs to no option: see --help"),
        ("train --model googlnet_small", "there is no model 'googlnet_small' — did you mean 'googlenet_small'?"),
        ("train --recipe cifar_fst", "there is no recipe 'cifar_fst' — did you mean 'cifar_fast'? Choose from cifar_s"),
        ("train --optimizer adam", "there is no optimizer 'adam' — did you mean 'adamw'?"),
        ("train --backend cuda", "there is no backend 'cuda': choose from numpy, cupy"),
        ("train --epochs 0", "epochs must be at least 1, got 0"),
        ("train --lr -1", "lr must be at least 0, got -1.0"),
        ("train --lr 1e16", "lr must be from 0 to 1e+15, got 1e+16"),
        ("train --momentum 0", "nesterov needs a momentum above 0: set one, or leave it out (--no-nesterov)"),
        ("train --data Shapes", "did you mean 'shapes'?"),
        ("predict --top 0 a.png", "--top must be at least 1, got 0"),
        ("summary googlenet --size 0", "--size must be at least 1, got 0"),
        ("summary googlenet --depth -1", "--depth must be at least 0, got -1"),
        ("compare googlnet", "there is no model 'googlnet' — did you mean 'googlenet'?"),
        ("export googlnet --to a.npz", "there is no file and no model 'googlnet' — did you mean 'googlenet'?"),
        ("export googlenet --to a.npz --size -1", "--size must be at least 1, got -1"),
        ("export googlenet --to a.npz --about no.json", "--about no.json: there is no such file"),
        ("evaluate .", ".: a directory without weights (weights.npz, best.npz, checkpoint-….npz)"),
        ("evaluate googlenet_smal", "no shipped model 'googlenet_smal' — did you mean 'googlenet_small'?"),
    ],
)
def test_what_is_misspelt_or_out_of_range(inception: Program, command: str, says: str) -> None:
    assert says in sentence(inception(*command.split()))


def test_what_diverges_is_told_once(inception: Program, cifar: Path) -> None:
    """In one sentence, without NumPy's warnings of every array on the way."""
    options = ["--lr", 1e15, "--schedule", "constant", "--batch-size", 16, "--width", 0.25, "--no-report", "--quiet"]
    outcome = inception("train", "--data", cifar, *options)
    assert "RuntimeWarning" not in outcome.err
    assert "try a lower learning rate" in sentence(outcome)


def test_weights_that_are_not_finite(inception: Program, weights: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    model, about = load_model(weights)
    model.fc1.weight.data[...] = np.nan
    save_weights(tmp_path / "nan.npz", model, about)
    message = sentence(inception("predict", tmp_path / "nan.npz", tmp_path / "a.png"))
    assert message == f"{tmp_path / 'nan.npz'} makes NaN of {tmp_path / 'a.png'}: its weights are damaged"


@pytest.mark.parametrize(
    ("command", "says"),
    [("train", "nothing saved is lost"), ("evaluate", "lower --batch-size"), ("predict", "choose a smaller network")],
)
def test_what_to_lower_is_what_the_command_has(
    monkeypatch: pytest.MonkeyPatch, inception: Program, command: str, says: str
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    for name in ("__main__.load_model", "commands.train.open_checkpoint"):
        monkeypatch.setattr(f"inception.{name}", fail)
    arguments = {"train": ["--resume", "r"], "evaluate": ["w.npz"], "predict": ["w.npz", "a.png"]}[command]
    assert says in sentence(inception(command, *arguments))


# ---- predict.py ----


def save_pictures(folder: Path) -> list[Path]:
    """One picture of each kind, none of them 32×32."""
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)

    def values(*shape: int, dtype: Any = np.uint8) -> np.ndarray:
        return rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)

    colour = image.fromarray(values(40, 50, 3))
    pictures = {
        "01 grey.png": image.fromarray(values(20, 30)),
        "02 palette.png": colour.quantize(16),
        "03 transparent.png": image.fromarray(values(33, 31, 4)),
        "04 grey and transparent.png": image.fromarray(values(33, 31, 2)),
        "05 cmyk.jpg": colour.convert("CMYK"),
        "06 16 bit.png": image.fromarray(values(32, 64, dtype=np.uint16)),
        "07 one pixel.png": image.fromarray(values(1, 1, 3)),
        "08 one bit.PNG": colour.convert("1"),
        "09 a line.bmp": image.fromarray(values(1, 300, 3)),
        "10 ünïcode.webp": colour,
        "12 large.jpg": image.new("RGB", (5000, 3000), "green"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        picture.save(folder / name)
    palette = colour.quantize(4)
    palette.save(folder / "11 transparent palette.png", transparency=b"\x00\x80\xff\xff")
    return sorted([*(folder / name for name in pictures), folder / "11 transparent palette.png"])


def test_pictures_of_every_kind(program: Program, weights: Path, tmp_path: Path) -> None:
    """A directory and what is below it, in order of names; what is no picture in it is passed over."""
    paths = save_pictures(tmp_path / "pictures" / "below")
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    outcome = program("predict.py", weights, tmp_path / "pictures", "--top", 10)
    assert outcome.code == 0
    assert "1 file was passed over (.txt: 1)" in outcome.err
    assert len(outcome.err.splitlines()) == 1
    lines = outcome.out.splitlines()
    assert [line for line in lines if not line.startswith("  ")] == [str(path) for path in paths]
    assert len(lines) == 11 * len(paths)
    for i in range(len(paths)):
        chances = [float(line.split("%")[0]) for line in lines[11 * i + 1 : 11 * i + 11]]
        assert chances == sorted(chances, reverse=True)
        assert sum(chances) == pytest.approx(100, abs=1)
        assert sorted(line.split()[-1] for line in lines[11 * i + 1 : 11 * i + 11]) == sorted(NAMES)


def test_the_prediction_is_the_models(program: Program, weights: Path, cifar: Path, tmp_path: Path) -> None:
    """A picture of the data set gives what the model says of it, and five classes if nothing else is asked for."""
    image = pytest.importorskip("PIL.Image")
    picture = load_cifar10(cifar)[1].images[2]
    image.fromarray(picture).save(tmp_path / "p.png")
    model, about = load_model(weights)
    with no_grad():
        logits = model(to_tensor(normalise(picture[None], np.array(about["mean"]), np.array(about["std"]))))
    best = to_host(logits.data)[0].argsort()[::-1][:5]
    lines = program("predict.py", weights, tmp_path / "p.png").out.splitlines()
    assert [line.split()[-1] for line in lines[1:]] == [NAMES[k] for k in best]


def test_unreadable_pictures_are_named_and_skipped(program: Program, weights: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    good, cut, text, empty, missing = (tmp_path / f"{name}.png" for name in ("good", "cut", "text", "empty", "missing"))
    image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(good)
    cut.write_bytes(good.read_bytes()[:2000])
    text.write_text("not a picture at all")
    empty.touch()
    bad = (cut, text, empty, missing)
    outcome = program("predict.py", weights, *bad, good, "--top", 1)
    assert outcome.code == 1
    errors = outcome.err.splitlines()
    assert all(f"error: {path}: " in line for path, line in zip(bad, errors, strict=True))
    assert len(outcome.out.splitlines()) == 2
    assert outcome.out.startswith(f"{good}\n")


def test_a_picture_cut_short_anywhere(tmp_path: Path) -> None:
    """Whatever the decoder raises becomes a sentence; a lost end without pixels in it may pass."""
    image = pytest.importorskip("PIL.Image")
    colour = image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8))
    for suffix in ("png", "jpg", "gif", "bmp", "webp", "ppm"):
        content = io.BytesIO()
        colour.save(content, {"jpg": "jpeg"}.get(suffix, suffix))
        path, whole = tmp_path / f"p.{suffix}", content.getvalue()
        refused = 0
        for end in range(0, len(whole), 3):
            path.write_bytes(whole[:end])
            try:
                assert read_picture(path, (4, 4)).shape == (4, 4, 3)
            except DataError as error:
                refused += str(error).startswith(f"{path}: ") and "\n" not in str(error)
            except Exception as error:
                raise AssertionError(f"{suffix} cut after {end} bytes: {type(error).__name__}: {error}") from error
        assert refused > 0.2 * len(whole) / 3, suffix


def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path) -> None:
    """257·v is v in 16 bits. The scale is the format's: a dark picture must not come out bright."""
    image = pytest.importorskip("PIL.Image")
    grey = np.arange(100, dtype=np.uint8).reshape(10, 10)
    image.fromarray(grey).save(tmp_path / "8.png")
    image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    np.testing.assert_array_equal(
        read_picture(tmp_path / "16.png", (10, 10)), read_picture(tmp_path / "8.png", (10, 10))
    )


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_black(tmp_path: Path, mode: str) -> None:
    """As read_picture says. The colour under full transparency is not to be seen."""
    image = pytest.importorskip("PIL.Image")
    path = tmp_path / "p.png"
    if mode == "P":
        palette = image.new("P", (8, 8), 0)
        palette.putpalette([250, 200, 150, 1, 2, 3])
        palette.save(path, transparency=b"\x00\xff")
    else:
        image.new(mode, (8, 8), (250, 200, 150, 0) if mode == "RGBA" else (250, 0)).save(path)
    assert not read_picture(path, (8, 8)).any()


def test_a_directory_without_pictures(program: Program, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    outcome = program("predict.py", weights, tmp_path / "empty")
    assert str(tmp_path / "empty") in sentence(outcome)
    assert outcome.code == 1


@pytest.mark.parametrize("top", ["0", "-1", "many"])
def test_a_number_of_classes_that_makes_no_sense(program: Program, weights: Path, top: str) -> None:
    assert "top" in sentence(program("predict.py", weights, weights, "--top", top))


def test_weights_that_are_none(program: Program, tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("hello")
    for name in ("text.npz", "missing.npz"):
        assert str(tmp_path / name) in sentence(program("predict.py", tmp_path / name, tmp_path / "p.png"))


@pytest.mark.parametrize("lost", ["size", "mean", "std", "classes"])
def test_weights_that_do_not_say_how_to_prepare_pictures(
    program: Program, weights: Path, tmp_path: Path, lost: str
) -> None:
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (32, 32)).save(tmp_path / "p.png")
    model, about = load_model(weights)
    del about[lost]
    save_weights(tmp_path / "w.npz", model, about)
    message = sentence(program("predict.py", tmp_path / "w.npz", tmp_path / "p.png"))
    assert str(tmp_path / "w.npz") in message
    assert lost in message


def test_without_pillow(monkeypatch: pytest.MonkeyPatch, program: Program, weights: Path, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    message = sentence(program("predict.py", weights, tmp_path / "p.png"))
    assert "pip install" in message


def test_a_terminal_that_knows_ascii_only(weights: Path, tmp_path: Path) -> None:
    """As a program of its own, as into a file on Windows: the bars must not end it."""
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (32, 32), "white").save(tmp_path / "p.png")
    outcome = run_alone("predict.py", weights, tmp_path / "p.png", PYTHONIOENCODING="ascii")
    assert outcome.code == 0, outcome.err
    assert len(outcome.out.splitlines()) == 6


def test_whoever_reads_may_stop() -> None:
    """As in `| head -1`."""
    variables = os.environ | {"PYTHONPATH": str(ROOT), "MINIGRAD_BACKEND": "numpy"}
    command = [sys.executable, "-m", "inception", "summary", "googlenet_small"]
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        program.stdout.close()
        assert program.stderr.read() == b""
    assert program.returncode == 0

"""Checkpoints: a stopped run goes on to the last bit; what is kept; options that contradict."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import fake_cupy
import numpy as np
import pytest
import tiny_run
from tiny_run import RECIPE, STEPS, assert_same, go_on, options, outcome

from inception.__main__ import main
from inception.data import Loader, Preprocessing, mean_and_std
from inception.data.pictures import Pictures
from inception.files import FileError
from inception.training import Recipe, Run, Stopped, Training, open_checkpoint, resumed, run
from inception.training.checkpoint import BEST, CheckpointError, find_checkpoints, restore, save_checkpoint
from inception.weights import CHECKPOINT, WeightsError, load_weights, read_arrays
from minigrad import set_backend, set_num_threads
from minigrad.errors import MinigradError

run_module = importlib.import_module("inception.training.run")
directory_module = importlib.import_module("inception.training.directory")


# ---- Going on ----


@pytest.mark.parametrize("prefetch", [0, 4])
@pytest.mark.parametrize("steps", [1, 2, STEPS - 1, STEPS, STEPS + 1, 2 * STEPS, 4 * STEPS - 1, 4 * STEPS])
def test_a_stopped_run_goes_on_to_the_last_bit(
    whole: Path, tmp_path: Path, stop_after: Any, steps: int, prefetch: int
) -> None:
    """Between epochs, inside them, before an evaluation, and when all steps are taken but the last evaluation."""
    out = tmp_path / "run"
    stop_after(steps)
    with pytest.raises(Stopped) as stop:
        run(options(out, prefetch=prefetch))
    assert stop.value.signal == signal.SIGTERM
    assert f"saved up to step {steps}: go on with python -m inception train --resume {out}" in str(stop.value)
    assert not (out / "weights.npz").exists()
    stop_after(-1)
    go_on(out)
    assert_same(out, outcome(whole))


@pytest.mark.parametrize(("first", "then"), [("numpy", "cupy"), ("cupy", "numpy")])
def test_a_run_goes_on_on_the_other_backend(
    whole: Path, tmp_path: Path, stop_after: Any, monkeypatch: pytest.MonkeyPatch, first: str, then: str
) -> None:
    """With the very arrays that were saved, and to the same result but for rounding; the GPU is pretended."""
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy)
    out = tmp_path / "run"
    try:
        set_backend(first)
        stop_after(STEPS + 2)
        with pytest.raises(Stopped):
            run(options(out, graph=False))  # a replay would not pass by where this asks it to stop
        before = find_checkpoints(out)[0]
        checkpoint = open_checkpoint(before)
        set_backend(then)
        data, _ = tiny_run.make_data("")
        mean, std = mean_and_std(data)
        loader = Loader(data, RECIPE.batch_size, mean=mean, std=std, drop_last=True)
        training = Training(tiny_run.make_model("", num_classes=len(data.classes), aux_logits=True), loader, RECIPE)
        restore(checkpoint, training)
        assert type(training.model.conv.weight.data).__module__ == {"numpy": "numpy", "cupy": "cupy"}[then]
        save_checkpoint(tmp_path / "again.npz", training, {}, checkpoint.state["run"])
        again = read_arrays(tmp_path / "again.npz")
        for name, array in read_arrays(before).items():
            if not name.endswith(".json"):
                np.testing.assert_array_equal(again[name], array, err_msg=name)
        stop_after(-1)
        go_on(out)
    finally:
        set_backend("numpy")
    log, wanted = (
        [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()] for path in (out, whole)
    )
    assert len(log) == len(wanted) == RECIPE.epochs
    assert log[-1]["loss"] == pytest.approx(wanted[-1]["loss"], rel=0.05)


def test_stopped_at_every_step_in_turn(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process takes a single step: nothing but the file carries over."""
    out = tmp_path / "run"
    plain = Training._update

    def update(self: Training) -> None:
        plain(self)
        self.stopping = signal.SIGINT

    monkeypatch.setattr(Training, "_update", update)
    with pytest.raises(Stopped):
        run(options(out))
    for _ in range(4 * STEPS - 1):
        with pytest.raises(Stopped):
            go_on(out)
    go_on(out)
    assert_same(out, outcome(whole))


def test_two_epochs_and_two_are_four(whole: Path, tmp_path: Path) -> None:
    """From the checkpoint that stands after an epoch, among later ones: the log is cut back to it."""
    out = tmp_path / "run"
    run(options(out, keep=99))
    assert len((out / "log.jsonl").read_text().splitlines()) == 4
    reference = outcome(out)
    rows: list[int] = []
    plain = Training.run

    def look_and_run(self: Training, **hooks: Any) -> None:
        rows.append(len((out / "log.jsonl").read_text().splitlines()))
        rows.append(len((out / "log.csv").read_text().splitlines()))
        plain(self, **hooks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "run", look_and_run)
        go_on(out / f"checkpoint-{2 * STEPS:08d}.npz")
    assert rows == [2, 3]
    assert_same(out, reference)
    assert_same(out, outcome(whole))


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": "rmsprop", "momentum": 0.9, "schedule": "step", "step_every": 0.5, "ema": 0.0, "lr": 0.01},
        {"optimizer": "adamw", "schedule": "cosine", "warm_up": 1.0, "spare_norms": True, "lr": 0.01},
        {"optimizer": "sgd", "momentum": 0.0, "nesterov": False, "schedule": "constant", "clip_norm": 0.0},
    ],
    ids=lambda change: change["optimizer"],
)
def test_every_optimizer_goes_on_to_the_last_bit(tmp_path: Path, stop_after: Any, change: dict[str, Any]) -> None:
    recipe = dataclasses.replace(RECIPE, epochs=2, **change)
    run(options(tmp_path / "whole", recipe=recipe, validation=0.2))
    stop_after(STEPS + 2)
    with pytest.raises(Stopped):
        run(options(tmp_path / "run", recipe=recipe, validation=0.2))
    stop_after(-1)
    go_on(tmp_path / "run")
    assert_same(tmp_path / "run", outcome(tmp_path / "whole"))


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 0), (1, 4), (2, 4)])
def test_threads_prefetching_and_the_rhythm_of_saving_change_nothing(
    whole: Path, tmp_path: Path, threads: int, prefetch: int
) -> None:
    set_num_threads(threads)
    run(options(tmp_path / "run", save_every=5, keep=1, prefetch=prefetch))
    assert_same(tmp_path / "run", outcome(whole))
    assert len(find_checkpoints(tmp_path / "run")) == 1


@pytest.mark.parametrize("jitter", [0.0, 0.3])
def test_on_every_backend(xp: Any, tmp_path: Path, stop_after: Any, jitter: float) -> None:
    """Written from the device and put back there; with jitter pictures come from the host, without they may stay."""
    recipe = dataclasses.replace(RECIPE, epochs=1, jitter=jitter)
    run(options(tmp_path / "whole", recipe=recipe, prefetch=4))
    stop_after(3)
    with pytest.raises(Stopped):
        run(options(tmp_path / "run", recipe=recipe, prefetch=4))
    stop_after(-1)
    go_on(tmp_path / "run", prefetch=0)
    assert_same(tmp_path / "run", outcome(tmp_path / "whole"))


def test_a_stop_during_the_evaluation_leaves_the_weights_as_trained(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last evaluation looks at the averaged weights; what is saved then must not be those."""
    out = tmp_path / "run"
    loop = importlib.import_module("inception.training.loop")
    plain, calls = loop.evaluate, []

    def evaluate(*args: Any, check: Any, **more: Any) -> Any:
        calls.append(check)
        if len(calls) == 5:  # after four epochs, the second of the last
            check.__self__.stopping = signal.SIGINT
        return plain(*args, check=check, **more)

    monkeypatch.setattr(loop, "evaluate", evaluate)
    with pytest.raises(Stopped):
        run(options(out))
    assert len(calls) == 5
    go_on(out)
    assert_same(out, outcome(whole))


def test_a_finished_run_can_be_asked_for_its_weights_again(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "weights.npz").unlink()
    go_on(tmp_path / "run", save=tmp_path / "again.npz")
    assert not (tmp_path / "run" / "weights.npz").exists()
    shutil.move(tmp_path / "again.npz", tmp_path / "run" / "weights.npz")
    assert load_weights(tmp_path / "run" / "weights.npz")[1]["weights"].startswith("average")
    found, reference = outcome(tmp_path / "run"), outcome(whole)
    assert [name for name in reference if found[name] != reference[name]] == []


# ---- What is kept ----


def test_the_last_ones_and_the_best_are_kept(whole: Path) -> None:
    names = sorted(path.name for path in whole.iterdir())
    last = [f"checkpoint-{n:08d}.npz" for n in (4 * STEPS - 2, 4 * STEPS)]
    assert names == ["best.npz", *last, "log.csv", "log.jsonl", "weights.npz"]
    rows = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    best = max(rows, key=lambda row: row["test_accuracy"])  # the first of them
    assert open_checkpoint(whole / BEST).state["step"] == best["step"]


def test_the_best_is_judged_and_used_by_the_weights_that_were_evaluated(tmp_path: Path) -> None:
    for name, test_average in (("raw", False), ("average", True)):
        run(options(tmp_path / name, test_average=test_average))
        best = read_arrays(tmp_path / name / BEST)
        count = json.loads(best[CHECKPOINT].item())["average_count"]
        weights, about = load_weights(tmp_path / name / BEST)
        assert about["weights"].startswith("average" if test_average else "as trained")
        for key, value in weights.items():
            wanted = best[f"average/{key}"] * (1.0 / count) if test_average else best[key]
            np.testing.assert_array_equal(value, wanted)
    rows = [json.loads(line) for line in (tmp_path / "average" / "log.jsonl").read_text().splitlines()]
    best_row = max(rows, key=lambda row: row["ema_test_accuracy"])
    assert open_checkpoint(tmp_path / "average" / BEST).state["step"] == best_row["step"]


def test_a_checkpoint_says_the_same_as_the_weights_at_the_end(whole: Path) -> None:
    weights, about = load_weights(whole / "weights.npz")
    last, about_last = load_weights(find_checkpoints(whole)[0])
    assert weights.keys() == last.keys()
    assert all(np.array_equal(weights[name], last[name]) for name in weights)
    assert about_last["classes"] == about["classes"]


def test_a_directory_that_holds_a_run_is_not_overwritten(whole: Path) -> None:
    before = {path: path.read_bytes() for path in whole.iterdir()}
    with pytest.raises(CheckpointError, match=f"{whole} holds a run already: .*--resume"):
        run(options(whole))
    assert {path: path.read_bytes() for path in whole.iterdir()} == before


def test_two_processes_do_not_train_in_one_directory(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    descriptor = directory_module._lock(tmp_path / "run")
    with pytest.raises(CheckpointError, match="another process is training there"):
        go_on(tmp_path / "run")
    os.close(descriptor)
    go_on(tmp_path / "run")


def test_a_run_that_does_not_begin_holds_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("inception.training.log.import_module", lambda name: importlib.import_module(f"no_{name}"))
        with pytest.raises(MinigradError, match="--tensorboard needs a package"):
            run(options(tmp_path / "run", tensorboard=True))
    run(options(tmp_path / "run"))


def test_what_a_killed_process_left_behind_is_removed(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    for name in (".best.npz.123", ".checkpoint-00000004.npz.5", ".weights.npz.77", ".log.jsonl.8", ".curves.png.9"):
        (tmp_path / "run" / name).touch()
    (tmp_path / "run" / ".mine").touch()
    go_on(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").glob(".*")] == [".mine"]


def test_whoever_went_back_is_not_sent_to_what_is_damaged(whole: Path, tmp_path: Path, stop_after: Any) -> None:
    """The newest file may be of a run from which this one went back, and broken: then a directory does not do."""
    shutil.copytree(whole, tmp_path / "run")
    newest, older = find_checkpoints(tmp_path / "run")
    newest.write_bytes(b"half")
    stop_after(older_step := int(older.stem[-8:]) + 1)
    with pytest.raises(Stopped) as stopped:
        go_on(older)
    place = tmp_path / "run" / f"checkpoint-{older_step:08d}.npz"
    assert str(stopped.value).endswith(
        f"saved up to step {older_step}: go on with python -m inception train --resume {place}"
    )


def test_the_best_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later epoch that is better than the file, if worse than what could not be written, replaces it."""
    accuracies, plain, tries = (0.3, 0.9, 0.8, 0.5), directory_module.save_checkpoint, []

    def save(path: Path, *rest: Any) -> None:
        if path.name == BEST:
            tries.append(path)
            if len(tries) == 2:
                raise FileError(f"{path} could not be written")
        plain(path, *rest)

    monkeypatch.setattr(directory_module, "save_checkpoint", save)
    monkeypatch.setattr(directory_module.RunDirectory, "_accuracy", lambda _, epoch: accuracies[epoch.number - 1])
    run(options(tmp_path / "run"))
    assert open_checkpoint(tmp_path / "run" / BEST).state["step"] == 3 * STEPS


def test_weights_that_could_not_be_read_again_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"m\.pt: weights are written as"):
        run(options(tmp_path / "run", save=tmp_path / "m.pt"))
    assert not (tmp_path / "run").exists()


def test_without_a_directory_nothing_but_the_weights_is_written(tmp_path: Path) -> None:
    run(Run(recipe=Recipe(epochs=1, batch_size=8), save=tmp_path / "w.npz", quiet=True))
    assert os.listdir(tmp_path) == ["w.npz"]


# ---- Contradictions ----


def test_options_that_contradict_the_checkpoint_are_all_named(whole: Path) -> None:
    checkpoint = open_checkpoint(whole)
    given = {"epochs": 5, "lr": 0.1, "model": "googlenet", "aux_logits": False, "save_every": 9, "out": Path("other")}
    with pytest.raises(CheckpointError) as caught:
        resumed(checkpoint, given)
    message = str(caught.value)
    for words in ("--epochs 5 (it has 4)", "--model googlenet (it has", "--aux False (it has True)", "--out other"):
        assert words in message
    assert "--lr" not in message  # the same
    assert "save" not in message  # free


def test_options_that_change_no_result_may_be_given_anew(whole: Path) -> None:
    given = {"save_every": 9, "keep": 7, "quiet": False, "save": Path("w"), "data": "elsewhere", "out": whole}
    own = resumed(open_checkpoint(whole), given)
    assert (own.save_every, own.keep, own.quiet, own.save) == (9, 7, False, Path("w"))
    assert (own.data, own.out, own.recipe) == ("elsewhere", whole, RECIPE)


def test_other_pictures_are_refused(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tiny_run.make_data("")
    darker = dataclasses.replace(first, images=first.images // 2)
    monkeypatch.setattr(run_module, "open_data", lambda *_, **__: (darker, second))
    with pytest.raises(CheckpointError, match=r"trained on other pictures than --data .*: not the same mean, std"):
        go_on(whole)


def test_the_same_pictures_called_otherwise_are_refused(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tiny_run.make_data("")
    turned = dataclasses.replace(first, labels=first.labels[::-1], classes=first.classes[::-1])
    monkeypatch.setattr(run_module, "open_data", lambda *_, **__: (turned, second))
    with pytest.raises(CheckpointError, match=r": not the same classes, labels$"):
        go_on(whole)


def test_the_same_pictures_in_another_place_are_taken(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: Any
) -> None:
    stop_after(9)
    with pytest.raises(Stopped):
        run(options(tmp_path / "run"))
    stop_after(0)
    first, second = tiny_run.make_data("")
    moved = dataclasses.replace(first, name="elsewhere")
    monkeypatch.setattr(run_module, "open_data", lambda *_, **__: (moved, second))
    go_on(tmp_path / "run", data="elsewhere")
    assert read_arrays(tmp_path / "run" / "weights.npz").keys() == read_arrays(whole / "weights.npz").keys()


def test_files_are_known_by_their_names_in_order() -> None:
    images = np.array(["here/train/a/1.png", "here/train/b/2.png"], object)
    first = tiny_run.make_data("")[0]
    prints = []
    for files in (images, np.array(["there/train/a/1.png", "there/train/b/2.png"], object), images[::-1]):
        pictures = dataclasses.replace(first, images=Pictures(files, Preprocessing((4, 4))), labels=np.array([0, 1]))
        sets = run_module.Sets(pictures, pictures, pictures, "test", np.zeros(3), np.ones(3))
        prints.append(run_module.fingerprint(sets))
    assert prints[0] == prints[1]
    assert prints[0] != prints[2]


def test_the_command_of_a_run_repeats_it(whole: Path, tmp_path: Path) -> None:
    command = load_weights(whole / "weights.npz")[1]["command"]
    words = command.split()
    assert words[:4] == ["python", "-m", "inception", "train"]
    assert main([*words[3:], "--out", str(tmp_path / "run"), "--quiet", "--no-report", "--save-every", "2"]) == 0
    assert_same(tmp_path / "run", outcome(whole))

"""Checkpoints that are damaged, foreign, of another version or hostile: one sentence, nothing executed."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
from tiny_run import STEPS, go_on

from inception.data import Loader, mean_and_std
from inception.training import Training, open_checkpoint, resumed
from inception.training.checkpoint import find_checkpoints, restore
from inception.weights import CHECKPOINT, read_arrays
from minigrad.errors import MinigradError

run_module = importlib.import_module("inception.training.run")


# ---- Damaged files ----


def refused(where: Path) -> str:
    """Going on must fail with one sentence that names a file."""
    with pytest.raises(MinigradError) as caught:
        go_on(where)
    message = str(caught.value)
    assert "\n" not in message
    assert str(where) in message
    return message


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def rewrite(path: Path, change: Any = None, **arrays: Any) -> None:
    """The file again, its JSON changed in place by `change`, arrays replaced, added or (None) left out."""
    found: dict[str, Any] = read_arrays(path)
    if change is not None:
        state = json.loads(found[CHECKPOINT].item())
        change(state)
        found[CHECKPOINT] = np.array(json.dumps(state))
    found = {name: value for name, value in (found | arrays).items() if value is not None}
    np.savez(path, allow_pickle=True, **found)


@pytest.mark.parametrize("damage", ["empty", "half", "flipped", "text", "no zip end"])
def test_a_damaged_checkpoint_names_the_next_older_one_that_is_whole(copy: Path, damage: str) -> None:
    newest, older = find_checkpoints(copy)
    content = newest.read_bytes()
    changed = {
        "empty": b"",
        "half": content[: len(content) // 2],
        "flipped": content[:400] + bytes([content[400] ^ 1]) + content[401:],
        "text": b"hello",
        "no zip end": content[:-10],
    }
    newest.write_bytes(changed[damage])
    message = refused(copy)
    assert str(newest) in message
    assert f"the next older one, {older}, is whole: --resume {older}" in message
    go_on(older)
    older.write_bytes(b"")
    newest.write_bytes(b"")
    assert "is whole" not in refused(copy)


def test_every_single_bit(copy: Path) -> None:
    """Somewhere in each stretch of the file: never a wrong array, always a sentence or what was written."""
    path = find_checkpoints(copy)[0]
    content, wanted, sentences = bytearray(path.read_bytes()), read_arrays(path), []
    for place in range(0, len(content), 97):
        content[place] ^= 1 << place % 8
        path.write_bytes(content)
        content[place] ^= 1 << place % 8
        try:
            found = open_checkpoint(path)
        except MinigradError as error:
            sentences.append(str(error))
            continue
        assert all(found.arrays[name].tobytes() == wanted[name].tobytes() for name in found.arrays)
    assert len(sentences) > 100
    assert all(str(path) in sentence and "\n" not in sentence for sentence in sentences)


def test_of_a_newer_version(copy: Path) -> None:
    path = find_checkpoints(copy)[0]
    rewrite(path, lambda state: state.update(format=2))
    assert "written in format 2, this version reads format 1: update inception-minigrad" in refused(path)


def test_of_another_model(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = find_checkpoints(copy)[0]
    monkeypatch.setattr(
        run_module, "create_model", lambda name, **o: tiny_run.make_model(name, **o | {"num_classes": 9})
    )
    assert "fc.weight has (10, 6), the model wants (9, 6)" in refused(path)


def test_weights_are_no_checkpoint(copy: Path) -> None:
    assert "no checkpoint (weights without a training to go on with)" in refused(copy / "weights.npz")


def test_a_place_without_checkpoints(tmp_path: Path) -> None:
    assert "no checkpoint in this directory" in refused(tmp_path)
    assert "there is no such file" in refused(tmp_path / "missing")


@pytest.mark.parametrize(
    "arrays",
    [
        {"conv.weight": None},
        {"conv.weight": np.zeros((6, 3, 3, 3), complex)},
        {"conv.weight": np.full((6, 3, 3, 3), "x")},
        {"extra": np.zeros(3, np.float32)},
        {"other/part": np.zeros(3, np.float32)},
        {"optimizer/velocity.0": None},
        {"optimizer/updates": np.zeros(3)},
        {"average/fc.bias": np.zeros(11, np.float32)},
        {"average/fc.bias": None},
        {"average/fc.bias": np.full(10, "x")},
        {"sums/loss": np.zeros(2)},
        {"sums/hits": None, "sums/loss": np.float32(1), "sums/aux1": np.float32(1)},
        {"sums/hits": np.array("many"), "sums/loss": np.float32(1)},
    ],
    ids=lambda arrays: "-".join(arrays),
)
def test_arrays_that_do_not_fit(copy: Path, arrays: dict[str, Any]) -> None:
    path = find_checkpoints(copy)[0]
    rewrite(path, **arrays)
    assert "cannot be continued" in refused(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.pop("step"),
        lambda s: s.update(step=7),
        lambda s: s.update(step="many"),
        lambda s: s.update(epochs=s["epochs"][:2]),
        lambda s: s.update(epochs=s["epochs"] * 2, step=8 * STEPS),
        lambda s: s.update(epochs=3),
        lambda s: s["epochs"][0].pop("losses"),
        lambda s: s["epochs"][0].update(losses=[1.0]),
        lambda s: s["epochs"][0].update(test="good"),
        lambda s: s["epochs"][0].update(test=[1.0]),
        lambda s: s["sums"].update(steps=3),
        lambda s: s["sums"].update(steps=float("inf")),
        lambda s: s["recipe"].pop("lr"),
        lambda s: s["recipe"].update(colour="red"),
        lambda s: s["recipe"].update(lr="high"),
        lambda s: s["recipe"].update(name="unheard of"),
        lambda s: s["recipe"].update(step_at=["one"]),
        lambda s: s.update(recipe=None),
        lambda s: s.update(run=None),
        lambda s: s["run"].update(options=[]),
        lambda s: s["run"]["options"].update(keep="all"),
        lambda s: s["run"]["options"].update(keep=0),
        lambda s: s["run"].pop("data"),
        lambda s: s.update(average_count=None),
    ],
)
def test_a_description_that_does_not_fit(copy: Path, change: Any) -> None:
    path = find_checkpoints(copy)[0]
    rewrite(path, change)
    refused(path)


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.sentinel),)


def test_nothing_in_a_checkpoint_is_executed(copy: Path) -> None:
    path, sentinel = find_checkpoints(copy)[0], copy / "executed"
    content = path.read_bytes()
    for name in ("conv.weight", CHECKPOINT, "optimizer/updates", "new"):
        path.write_bytes(content)
        rewrite(path, **{name: np.array([Touch(sentinel)], dtype=object)})
        refused(path)
    path.write_bytes(pickle.dumps(Touch(sentinel)))
    refused(path)
    assert not sentinel.exists()


def damaged(content: bytes, chance: random.Random) -> bytes:
    """The bytes with something done to them that a disk, a network or a stranger might do."""
    changed = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 8])):
        at = chance.randrange(len(changed))
        kind = chance.randrange(5)
        if kind == 0:
            changed[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            changed[at : at + chance.randrange(1, 64)] = bytes(chance.randrange(256) for _ in range(8))
        elif kind == 2:
            del changed[at : at + chance.randrange(1, 2000)]
        elif kind == 3:
            changed[at:at] = changed[at // 2 : at // 2 + chance.randrange(1, 500)]
        else:
            changed[at : at + 4] = chance.choice([b"\x00" * 4, b"\xff" * 4, b"PK\x01\x02", b"PK\x05\x06"])
        if not changed:
            return b""
    return bytes(changed)


def strange(value: Any, chance: random.Random) -> Any:
    """A JSON value with something in it replaced, lost or doubled."""
    odd = [None, True, -1, 10**400, 1e308, float("nan"), float("-inf"), "", "x" * 99, [], [[]], {}, {"a": 1}]
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        if chance.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: strange(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        return [*value[:at], strange(value[at], chance), *value[at + 1 :]]
    return chance.choice(odd)


@pytest.mark.parametrize("rounds", [300, pytest.param(6000, marks=pytest.mark.slow)])
def test_whatever_is_in_a_file_only_sentences_come_out(copy: Path, rounds: int) -> None:
    """Damage to bytes, and to values within a sound archive; what passes must be good enough to be put in place."""
    newest = find_checkpoints(copy)[0]
    path = copy / "checkpoint-00000099.npz"
    content, arrays = newest.read_bytes(), read_arrays(newest)
    state = json.loads(arrays[CHECKPOINT].item())
    first, _ = tiny_run.make_data("")
    mean, std = mean_and_std(first)
    chance, passed, sentences = random.Random(0), 0, []
    for number in range(rounds):
        if number % 2:
            path.write_bytes(damaged(content, chance))
        else:
            odd = strange(state, chance)
            np.savez(path, **arrays | {CHECKPOINT: np.array(json.dumps(odd))})
        try:
            checkpoint = open_checkpoint(path)
            own = resumed(checkpoint, {})
            loader = Loader(first, own.recipe.batch_size, mean=mean, std=std, drop_last=True)
            training = Training(tiny_run.make_model("", num_classes=10, aux_logits=True), loader, own.recipe)
            restore(checkpoint, training)
            passed += 1
        except MinigradError as error:
            sentences.append(str(error))
        except Exception as error:
            (copy / "found").write_bytes(path.read_bytes())
            raise AssertionError(f"round {number}: {type(error).__name__}: {error}, from {copy / 'found'}") from error
    assert passed < 0.6 * rounds
    assert not any("\n" in sentence for sentence in sentences)


def test_a_zip_with_a_lying_header(copy: Path) -> None:
    """An array that says it is larger than the file is not allocated and filled with what happens to be there."""
    path = find_checkpoints(copy)[0]
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    parts["fc.bias.npy"] = parts["fc.bias.npy"].replace(b"(10,)", b"(10000000000,)", 1)
    with zipfile.ZipFile(path, "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    assert "is described as (10000000000,)" in refused(path)

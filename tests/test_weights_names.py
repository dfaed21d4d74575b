"""Names of other projects, against lists taken from the projects themselves: tests/keys.

A list has the names, shapes and dtypes of a state dict, and the first logits of the project's own network, in float64,
where array i of the list is `drawn(i)` and the picture `drawn(1000)`.
"""

from __future__ import annotations

import gzip
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_weights_foreign import ABOUT, FOUR, archive, refuse, same, state, tensor, text

from inception.models import create_model
from inception.weights import WeightsError, are_weights, load_model, load_weights, names, save_weights
from inception.weights.projects import PROJECTS
from inception.weights.pytorch import write_pytorch
from inception.weights.safetensors import write_safetensors
from minigrad import Tensor, no_grad

KEYS = Path(__file__).with_name("keys")
OURS = {
    "torchvision_googlenet": "googlenet_torchvision",
    "torchvision_inception_v3": "inception_v3",
    "timm_inception_v3": "inception_v3",
    "timm_inception_v4": "inception_v4",
    "timm_inception_resnet_v2": "inception_resnet_v2",
    "facenet_inception_resnet_v1": "inception_resnet_v1_facenet",
    "pytorch_cifar_googlenet": "googlenet_cifar",
    "uva_googlenet": "googlenet_small",
}
LARGE = {key for key, model in OURS.items() if model.startswith("inception")}  # 20 million parameters and more


@cache
def published(key: str) -> dict[str, Any]:
    with gzip.open(KEYS / f"{key}.json.gz") as file:
        return json.load(file)


def numbered(key: str) -> dict[str, np.ndarray]:
    """Each array of a list filled with its own number, without memory."""
    arrays = published(key)["arrays"]
    return {name: np.broadcast_to(np.array(i, dtype), shape) for i, (name, shape, dtype) in enumerate(arrays, start=1)}


def without_counters(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array for name, array in arrays.items() if not name.endswith(".num_batches_tracked")}


def drawn(key: str) -> dict[str, np.ndarray]:
    """Arrays with which a network's logits are neither tiny nor huge; RandomState's numbers never change."""
    made = {}
    for i, (name, shape, dtype) in enumerate(published(key)["arrays"]):
        random, word = np.random.RandomState(i), name.rpartition(".")[2]
        if word == "running_var" or (word == "weight" and len(shape) == 1):
            array = random.uniform(0.5, 1.5, shape)
        elif len(shape) == 1:
            array = 0.1 * random.standard_normal(shape)
        else:
            array = random.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:])) if shape else np.array(0)
        made[name] = array.astype(dtype)
    return made


# ---- lists ----


def test_every_project_has_a_list() -> None:
    assert set(OURS) == {path.name.removesuffix(".json.gz") for path in KEYS.iterdir()}
    assert {project.model for project in PROJECTS} == set(OURS.values())


@pytest.mark.parametrize("key", OURS)
def test_names_in_and_out(key: str) -> None:
    """Every array goes into the network, and leaves it under the name that it came with."""
    given = numbered(key)
    model, about = names.adopt(given, None)
    assert about["model"] == OURS[key]
    assert "left out" not in about["source"]
    theirs = names.outward(model)
    written = {theirs[name]: array for name, array in model.state_dict().items()}
    assert same(written, {name: array.copy() for name, array in without_counters(given).items()})
    ours = names.inward(model, written)
    assert same(ours, model.state_dict())


def check_logits(tmp_path: Path, key: str) -> None:
    write_pytorch(tmp_path / "theirs.pth", drawn(key), {})
    model, about = load_model(tmp_path / "theirs.pth")
    size, wanted = published(key)["size"], np.array(published(key)["logits"])
    picture = np.random.RandomState(1000).uniform(-1, 1, (1, 3, size, size)).astype(np.float32)
    with no_grad():
        logits = model(Tensor(picture)).data[0, : len(wanted)]
    assert np.abs(logits - wanted).max() < 1e-5 * np.abs(wanted).max()
    for path in (tmp_path / "ours.pth", tmp_path / "ours.safetensors"):
        save_weights(path, model, about)
        assert same(load_weights(path)[0], without_counters(drawn(key)))
        assert same(load_model(path)[0].state_dict(), model.state_dict())


@pytest.mark.parametrize("key", sorted(set(OURS) - LARGE))
def test_logits_are_those_of_the_project(tmp_path: Path, key: str) -> None:
    check_logits(tmp_path, key)


@pytest.mark.slow
@pytest.mark.parametrize("key", sorted(LARGE))
def test_logits_are_those_of_the_project_large(tmp_path: Path, key: str) -> None:
    check_logits(tmp_path, key)


def test_pytorch_and_we_agree_on_the_names_of_a_written_file(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="reads with PyTorch, which is not installed")
    save_weights(tmp_path / "w.pth", create_model("googlenet_small"), ABOUT)
    found = torch.load(tmp_path / "w.pth", weights_only=True)
    wanted = without_counters(numbered("uva_googlenet"))
    assert len(found) == 296
    assert {name: tuple(value.shape) for name, value in found.items()} == {n: a.shape for n, a in wanted.items()}


def test_files_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """They wrote "input_net.11" for the second member of "input_net", and had no names of pytorch-cifar."""
    arrays = without_counters(drawn("uva_googlenet"))
    right = {n: n for n in arrays}
    for name in arrays:  # convolutions, all of rank 4, and their biases had the right names
        path, _, word = name.rpartition(".")
        if arrays[f"{path}.weight"].ndim == 1:
            head, _, number = path.rpartition(".")
            right[name] = f"{head}.{number}{number}.{word}"
    assert "input_net.11.weight" in right.values()
    assert "inception_blocks.0.conv_3x3.44.running_var" in right.values()
    about = {"format": 1, **ABOUT, "model": "googlenet_small", "options": {"num_classes": 10, "aux_logits": False}}
    about["classes"] = list("abcdefghij")
    write_pytorch(tmp_path / "old.pth", {right[n]: array for n, array in arrays.items()}, about)
    write_pytorch(tmp_path / "new.pth", arrays, about)
    assert same(load_model(tmp_path / "old.pth")[0].state_dict(), load_model(tmp_path / "new.pth")[0].state_dict())
    model = create_model("googlenet_cifar")
    words = {"gamma": "weight", "beta": "bias"}
    state = {re.sub(r"gamma$|beta$", lambda end: words[end[0]], n): a for n, a in model.state_dict().items()}
    write_pytorch(tmp_path / "old.pth", state, about | {"model": "googlenet_cifar"})
    assert same(load_model(tmp_path / "old.pth")[0].state_dict(), model.state_dict())
    write_safetensors(tmp_path / "old.safetensors", model.state_dict(),
                      {"about.json": json.dumps(about | {"model": "googlenet_cifar"})})  # fmt: skip
    assert same(load_model(tmp_path / "old.safetensors")[0].state_dict(), model.state_dict())


def test_classes_of_imagenet_have_names() -> None:
    """Four of the thousand, by their numbers in ILSVRC 2012."""
    _, about = names.adopt(numbered("torchvision_googlenet"), None)
    assert len(about["classes"]) == 1000
    known = {0: "tench", 207: "golden retriever", 281: "tabby", 999: "toilet tissue"}
    assert {k: about["classes"][k] for k in known} == known


# ---- recognition ----


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "_orig_mod.", "module._orig_mod.", "model.module.",
                                    "_orig_mod.module.model."])  # fmt: skip
def test_prefixes_of_wrappers(prefix: str) -> None:
    given = {prefix + name: array for name, array in numbered("uva_googlenet").items()} | {"n_averaged": np.array(3)}
    model, about = names.adopt(given, None)
    assert about["source"] == "the UvA tutorial's GoogLeNet: 296 arrays by name"
    assert model.fc1.bias.data[0] == given[f"{prefix}output_net.2.bias"][0]


@pytest.mark.parametrize("key", ["uva_googlenet", "facenet_inception_resnet_v1", "timm_inception_v4"])
def test_a_file_that_nearly_fits_is_named(key: str) -> None:
    title = next(project.title for project in PROJECTS if project.model == OURS[key])
    given = without_counters(numbered(key))
    name = list(given)[7]
    with pytest.raises(names.NamesError, match=rf"^nearly {re.escape(title)}, but it lacks {re.escape(name)}: "):
        names.adopt({n: array for n, array in given.items() if n != name}, None)
    with pytest.raises(names.NamesError, match=rf"^nearly {re.escape(title)}, but {re.escape(name)} has 3×5 instead"):
        names.adopt(given | {name: np.zeros((3, 5))}, None)
    with pytest.raises(names.NamesError, match="names of no project known here"):
        names.adopt({f"x{i}": array for i, array in enumerate(given.values())}, None)


def test_heads_that_exchanged_their_names() -> None:
    given = numbered("torchvision_googlenet")
    other = {"aux1": "aux2", "aux2": "aux1"}
    swapped = {other.get(n[:4], n[:4]) + n[4:]: array for n, array in given.items()}
    found, about = names.adopt(swapped, None)
    assert same(found.state_dict(), names.adopt(given, None)[0].state_dict())
    assert "its heads had exchanged their names" in about["source"]
    assert "exchanged" not in names.adopt(given, None)[1]["source"]


def test_heads_are_left_out_where_there_are_none() -> None:
    given = numbered("torchvision_googlenet")
    trunk = {n: array for n, array in given.items() if not n.startswith("aux2.")}
    _, about = names.adopt(trunk, None)
    assert not about["options"]["aux_logits"]
    assert "left out: aux1.conv.bn.bias, " in about["source"]


def table(entries: dict[str, bytes]) -> bytes:
    """A pickled table, within another pickle."""
    return b"}(" + b"".join(text(name) + content for name, content in entries.items()) + b"u"


HELD = table({"a": tensor((4,), (1,))})
OTHER = table({"b": tensor((4,), (1,)), "c": tensor((2,), (1,))})
ENTRIES = {
    "net": {"net": HELD, "acc": b"K\x5d", "epoch": b"K\x07"},
    "state_dict": {"epoch": b"K\x03", "state_dict": HELD, "optimizer": OTHER},
    "model": {"model": HELD},
    "model_state_dict": {"model_state_dict": HELD, "loss": b"N"},
    "averaged first": {"state_dict": OTHER, "state_dict_ema": HELD},
    "averaged, of torchvision": {"model": OTHER, "model_ema": HELD},
    "no average": {"ema": b"N", "state_dict": HELD},
    "two levels": {"ema": table({"model": HELD, "updates": b"K\x01"}), "model": OTHER},
}


@pytest.mark.parametrize("kind", ENTRIES)
@pytest.mark.parametrize("name", ["net.pth", "best.pth.tar", "w.bin", "W.PTH", "w.pt", "w.ckpt", "weights", "w.npz"])
def test_entries_of_a_checkpoint(tmp_path: Path, kind: str, name: str) -> None:
    path = archive(tmp_path / name, b"\x80\x02" + table(ENTRIES[kind]) + b".", FOUR)
    assert {name: array.tolist() for name, array in load_weights(path)[0].items()} == {"a": [1, 2, 3, 4]}
    assert are_weights(path)


def test_entries_that_are_not_known_are_named(tmp_path: Path) -> None:
    content = table({"epoch": b"K\x01", "generator": HELD, "critic": OTHER})
    assert "tensors are in 'generator' (1 tensors), 'critic' (2 tensors): save one of these alone" in refuse(
        archive(tmp_path / "w.pth", b"\x80\x02" + content + b".", FOUR)
    )
    itself = b"\x80\x02}q\x00" + text("model") + b"h\x00s."
    assert "no state dict" in refuse(archive(tmp_path / "w.pth", itself))
    assert "its entry 'a' is no tensor but int" in refuse(
        archive(tmp_path / "w.pth", state(("a", b"K\x01"), ("b", tensor((4,), (1,)))), FOUR)
    )


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pth"])
def test_a_kind_is_recognised_by_its_content(tmp_path: Path, suffix: str) -> None:
    model = create_model("googlenet_small", num_classes=4)
    save_weights(tmp_path / f"w{suffix}", model, ABOUT)
    for name in ("weights", "w.npz", "w.safetensors", "w.pth", "W.PTH", "w.png"):
        (tmp_path / f"w{suffix}").rename(tmp_path / name)
        assert same(load_model(tmp_path / name)[0].state_dict(), model.state_dict())
        assert are_weights(tmp_path / name)
        (tmp_path / name).rename(tmp_path / f"w{suffix}")


def test_what_are_no_weights(tmp_path: Path) -> None:
    for content in (b"", b"P6 1 1", b"\x89PNG\r\n", b"{}", b"\x80", b"\x80\x07"):
        (tmp_path / "x").write_bytes(content)
        assert not are_weights(tmp_path / "x")
        with pytest.raises(WeightsError):
            load_weights(tmp_path / "x")
    assert not are_weights(tmp_path / "absent")
    assert not are_weights(tmp_path)
    assert not are_weights(Path("a\0b"))


@pytest.mark.parametrize("heads", [False, True])
def test_by_order_and_shape(heads: bool) -> None:
    model = create_model("googlenet_small", num_classes=7, aux_logits=heads)
    paths: dict[str, str] = {}
    given = {}
    for name, array in model.state_dict().items():
        path, _, word = name.rpartition(".")
        word = {"gamma": "weight", "beta": "bias"}.get(word, word)
        given[f"{paths.setdefault(path, f'layer{len(paths)}')}.{word}"] = array
    found, about = names.adopt(given, "googlenet_small")
    assert same(found.state_dict(), model.state_dict())
    assert about["options"] == {"num_classes": 7, "aux_logits": heads}
    assert "by order and shape" in about["source"]
    with pytest.raises(names.NamesError, match="--model"):
        names.adopt(given, None)
    with pytest.raises(names.NamesError, match=r"layer 1 of googlenet_cifar, conv1.conv, has .*192"):
        names.adopt(given, "googlenet_cifar")
    with pytest.raises(names.NamesError, match="fully connected"):
        names.adopt({"a.weight": np.zeros((1, 2, 3, 3))}, "googlenet_small")

"""Thousands of damaged files of weights: each is read, or refused in one line; nothing runs, nothing is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_data_fuzz import mutated
from test_hostile_weights import ENTRIES, header, old_pth
from test_weights_foreign import ABOUT, FOUR, entry, state, tensor, text

from inception.models import create_model
from inception.weights import WeightsError, load_model, load_weights, save_weights
from inception.weights.npz import as_text, write_arrays
from inception.weights.pytorch import write_pytorch
from minigrad.random import Key

SECONDS = 10  # for a file


def good_files(folder: Path) -> dict[str, bytes]:
    """One small good file of each kind, and a real network in each of our forms."""
    arrays = {"fc1.weight": np.arange(4, dtype=np.float32), "b": np.ones((2, 3))}
    about = {"format": 1, **ABOUT}
    write_arrays(folder / "npz", {**arrays, "about.json": as_text(about)})
    average = {f"average/{name}": array for name, array in arrays.items()}
    write_arrays(folder / "checkpoint", {
        **average, "about.json": as_text({**about, "average_count": 2.0}), "checkpoint.json": as_text({"format": 1})
    })  # fmt: skip
    header({"a": entry(0, 16, [2, 2]), "b": entry(16, 20, [2], "BF16"), "__metadata__": {"k": "v"}}, FOUR + bytes(4))(
        folder / "safetensors"
    )
    write_pytorch(folder / "pth", arrays, about)
    entries = state(("a.weight", tensor((2, 2), (1, 2))), ("b", tensor((2,), (1,), offset=2)))
    (folder / "old pth").write_bytes(old_pth(entries))
    nested = b"\x80\x02}(" + b"".join(text(name) + entries[2:-1] for name in ENTRIES[:3]) + b"u."
    (folder / "old checkpoint").write_bytes(old_pth(nested))
    (folder / "protocol 4").write_bytes(old_pth(b"\x80\x04\x95" + bytes(8) + entries[2:]))
    model = create_model("googlenet_small", num_classes=4)
    for suffix in ("npz", "safetensors", "pth"):
        save_weights(folder / f"network.{suffix}", model, ABOUT | {"options": {"num_classes": 4}})
    for path in folder.glob("*.npz"):
        path.rename(path.with_suffix("")) if path.stem in ("npz", "checkpoint") else None
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def fuzz(folder: Path, count: int, seed: int) -> dict[str, int]:
    """Read `count` damaged files of each kind; returns how many of each kind were refused."""
    import signal

    good = {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}
    refused = dict.fromkeys(good, 0)
    for kind, content in good.items():
        path = folder / kind
        for i in range(count if len(content) < 100_000 else count // 10):
            path.write_bytes(mutated(content, Key(seed).fold(kind, i)))
            signal.alarm(SECONDS)
            try:
                (load_model if kind.startswith("network") else load_weights)(path)
            except WeightsError as error:
                refused[kind] += 1
                if not str(error).isprintable() or not str(error).startswith(f"{path}: ") or len(str(error)) > 1500:
                    raise AssertionError(f"{kind}, seed {seed}, file {i}: {str(error)!r}") from error
                if "MemoryError" in str(error):
                    raise AssertionError(f"{kind}, seed {seed}, file {i}: {error}") from error
            except Exception as error:
                raise AssertionError(f"{kind}, seed {seed}, file {i}: {type(error).__name__}: {error}") from error
            signal.alarm(0)
        path.write_bytes(content)
    assert sorted(os.listdir(folder)) == sorted(good)
    return refused


def watched(folder: Path, count: int, seed: int) -> None:
    """`fuzz` in a process of its own, with 1 GB of memory, where starting, importing or writing elsewhere ends it."""
    kinds = set(good_files(folder))
    script = f"""
import json, os, resource, sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
from pathlib import Path
import test_weights_fuzz as t
t.fuzz(Path({str(folder)!r}), 3, 99)  # whatever is imported late is now
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.", "ctypes.", "exec",
             "pickle.find_class", "os.mkdir", "os.remove", "os.rename")
def hook(event, arguments):
    written = event == "open" and isinstance(arguments[1], str) and set("wax+") & set(arguments[1])
    elsewhere = written and not str(arguments[0]).startswith({str(folder)!r})
    imported = event == "exec" and os.path.isfile(arguments[0].co_filename)
    if elsewhere or (event.startswith(FORBIDDEN) and not imported):
        os.write(2, f"forbidden: {{event}} {{arguments}}".encode()); os._exit(9)
sys.addaudithook(hook)
print(json.dumps(t.fuzz(Path({str(folder)!r}), {count}, {seed})))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env=os.environ | {"MINIGRAD_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        timeout=120 + count,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    refused = json.loads(done.stdout)
    print(refused)
    assert set(refused) == kinds
    assert all(number > 0 for number in refused.values()), refused


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
def test_a_few_hundred_damaged_files_of_weights(tmp_path: Path) -> None:
    watched(tmp_path, 40, seed=1)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
def test_ten_thousand_damaged_files_of_weights(tmp_path: Path) -> None:
    watched(tmp_path, 1400, seed=2)

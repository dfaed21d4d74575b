"""What the README shows: the sums of its course, by hand and by the code, its snippets, and its table of a network."""

from __future__ import annotations

import inspect
import re
import runpy
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import plain_loops
import pytest

from inception import models
from inception.__main__ import main
from minigrad import Tensor, graph, ops
from minigrad.backend import to_host
from minigrad.graph import Node
from minigrad.kernels import textbook
from minigrad.layout import Window, filter_matrix, pixels

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "minigrad/README.md", ROOT / "inception/README.md"]

# A picture of one channel, 3×3, and one filter, 2×2: four windows.
PICTURE = [[1, 2, 3],
           [4, 5, 6],
           [7, 8, 9]]  # fmt: skip
FILTER = [[1, 2],
          [0, -1]]  # fmt: skip
PATCHES = [[1, 2, 4, 5],
           [2, 3, 5, 6],
           [4, 5, 7, 8],
           [5, 6, 8, 9]]  # fmt: skip
RESULT = [0, 2, 6, 8]  # 1·1 + 2·2 + 4·0 − 5·1 = 0, and so on
UPSTREAM = [1, 0, 2, -1]  # dL/dy, chosen
DFILTER = [4, 6, 10, 12]  # patchesᵀ · upstream: 1·1 + 2·0 + 4·2 − 5·1 = 4, and so on
DPICTURE = [[1, 2, 0],
            [2, 2, -2],
            [0, -2, 1]]  # fmt: skip


def test_im2col_forward_by_hand() -> None:
    assert (np.array(PATCHES) @ np.ravel(FILTER)).tolist() == RESULT
    x, w = (Tensor(np.array(a, np.float64)[None, None]) for a in (PICTURE, FILTER))
    y = ops.conv2d(x, w)
    assert pixels(y.data).ravel().tolist() == RESULT
    window = Window.of((3, 3), 2)
    assert plain_loops.conv2d(x.data, w.data, None, window).ravel().tolist() == RESULT
    assert filter_matrix(w.data).tolist() == [np.ravel(FILTER).tolist()]


def test_the_kernels_patches_are_those_by_hand() -> None:
    x, window = np.array(PICTURE, np.float64)[None, None], Window.of((3, 3), 2)
    patches = textbook.im2col(x, window)
    assert patches.tolist() == PATCHES
    spread = textbook.col2im(np.outer(UPSTREAM, np.ravel(FILTER)), 1, window)
    assert spread[0, 0].tolist() == DPICTURE


def test_im2col_backward_by_hand() -> None:
    assert (np.array(PATCHES).T @ UPSTREAM).tolist() == DFILTER
    # dL/dpatches is one outer product; col2im adds its rows up where the patches lay.
    spread, dx = np.outer(UPSTREAM, np.ravel(FILTER)), np.zeros((3, 3))
    for row, (i, j) in zip(spread, ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True):
        dx[i : i + 2, j : j + 2] += row.reshape(2, 2)
    assert dx.tolist() == DPICTURE
    x, w = (Tensor(np.array(a, np.float64)[None, None], requires_grad=True) for a in (PICTURE, FILTER))
    ops.conv2d(x, w).backward(np.array(UPSTREAM, np.float64).reshape(1, 1, 2, 2))
    assert w.grad.ravel().tolist() == DFILTER
    assert x.grad[0, 0].tolist() == DPICTURE


def the_example_in_the_docstring() -> list[str]:
    """The four lines of graph.py that show why the order matters."""
    return [line.strip() for line in inspect.getdoc(graph).splitlines() if line.startswith("    ")]


def test_the_docstrings_counterexample_is_true() -> None:
    names: dict[str, Any] = {"Tensor": Tensor}
    exec("\n".join(the_example_in_the_docstring()), names)
    names["d"].backward()
    assert names["a"].grad == 16
    assert [node.name for node in graph._topological(names["c"].node)] == ["leaf", "multiply", "multiply"]


@pytest.mark.parametrize(("sends_all", "gradient"), [(True, 28), (False, 16)])
def test_what_a_walk_that_goes_on_at_once_makes_of_it(sends_all: bool, gradient: float) -> None:
    """On the graph of the docstring's example: wrong, or right with b run twice."""
    names: dict[str, Any] = {"Tensor": Tensor}
    exec("\n".join(the_example_in_the_docstring()), names)
    arrived: Counter[Node] = Counter()
    runs: Counter[Node] = Counter()

    def go_on(node: Node, dy: Any) -> None:
        arrived[node] += dy
        runs[node] += 1
        if node.backward is None:
            return
        for parent, dx in zip(node.inputs, node.backward(arrived[node] if sends_all else dy), strict=True):
            if parent is not None:
                go_on(parent, dx)

    go_on(names["d"].node, np.float32(1))
    assert arrived[names["a"].node] == gradient
    assert runs[names["b"].node] == 2


def test_batch_norm_backward_in_five_lines() -> None:
    """Each line of the derivation as an array: x̂ and its Jacobian over the m pixels of one channel."""
    rng = np.random.default_rng(0)
    x, dy, gamma, eps, m = rng.standard_normal(6), rng.standard_normal(6), 1.5, 1e-5, 6
    sigma = np.sqrt(x.var() + eps)
    x_hat = (x - x.mean()) / sigma
    dgamma, dbeta = (dy * x_hat).sum(), dy.sum()
    dsigma = x_hat / m
    jacobian = (np.eye(m) - 1 / m) / sigma - np.outer(x_hat, dsigma) / sigma  # dx̂ᵢ/dxⱼ
    dx = (gamma * dy) @ jacobian
    assert np.allclose(dx, gamma / sigma * (dy - dbeta / m - x_hat * dgamma / m), rtol=0, atol=1e-14)
    t = Tensor(x.reshape(1, 1, 2, 3), requires_grad=True)
    scale, shift = Tensor(np.array([gamma]), requires_grad=True), Tensor(np.zeros(1), requires_grad=True)
    y = ops.batch_norm(t, scale, shift, np.zeros(1), np.ones(1), training=True, eps=eps)
    y.backward(dy.reshape(1, 1, 2, 3))
    assert np.allclose(t.grad.ravel(), dx, rtol=0, atol=1e-14)
    assert np.allclose([scale.grad[0], shift.grad[0]], [dgamma, dbeta], rtol=0, atol=1e-14)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_snippets_of_the_pages_run_as_they_stand(page: Path) -> None:
    """Each from an empty namespace; a network of 1000 classes at 224×224 is among them."""
    snippets = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert snippets
    try:
        for snippet in snippets:
            exec(compile(snippet, page.name, "exec"), {})
    finally:
        models._forms.cache_clear()  # one of them registers a network


def test_links_between_the_pages_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md"]:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert "://" in link or (page.parent / link).exists(), f"{page}: {link}"


def test_the_rows_of_a_summary_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "inception/README.md").read_text(encoding="utf-8")
    found = re.search(r"^    \$ python -m inception (summary .*)\n((?:    .*\n)+)", text, re.MULTILINE)
    assert found is not None
    assert main(found[1].split()) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    shown = [line.removeprefix("    ") for line in found[2].splitlines()]
    assert len(shown) >= 3
    assert set(shown) - {"…"} <= set(printed)


def test_the_recipes_for_an_own_op_are_channels_last_on_both_backends(xp: Any) -> None:
    """CuPy lays the result of arithmetic out in C order; images of minigrad are channels-last."""
    snippets = re.findall(r"^```python\n(.*?)^```", PAGES[1].read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    recipe: dict[str, Any] = {}
    exec(next(snippet for snippet in snippets if "def square" in snippet).split("\n\n\ngradcheck")[0], recipe)
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        swish = runpy.run_path(str(ROOT / "examples/own_op.py"))["swish"]
    finally:
        sys.path.remove(str(ROOT / "examples"))
    values = np.random.default_rng(0).standard_normal((2, 4, 5, 3))  # (N, H, W, C)
    x = Tensor(xp.asarray(values).transpose(0, 3, 1, 2), requires_grad=True)
    for op, wanted in ((recipe["square"], values**2), (swish, values / (1 + np.exp(-values)))):
        y = op(x).data.transpose(0, 2, 3, 1)
        assert y.flags.c_contiguous
        assert np.allclose(to_host(y), wanted, rtol=0, atol=1e-14)

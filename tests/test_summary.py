"""Summary: counted by hand, adding up, and no more and no less memory than is held."""

from __future__ import annotations

import re
import tracemalloc
from typing import Any

import numpy as np
import pytest

from inception.models import create_model
from minigrad import Tensor, nn, num_threads, ops, set_num_threads, summary
from minigrad.errors import ShapeError
from minigrad.random import Key, normal


def pictures(*shape: int) -> Tensor:
    return Tensor(normal(Key(11).fold(*shape), shape).astype("float32"))


def parameters(model: nn.Module) -> int:
    return sum(parameter.size for parameter in model.parameters())


def test_summary_of_a_layer_by_hand() -> None:
    """3×3 from 3 to 4 channels on 5×6: 120 pixels·channels out, 27 multiply-adds each; it keeps its input."""
    found = summary(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)), (3, 5, 6))
    (row,) = found.rows
    assert (row.path, row.kind, row.output) == ("0", "Conv2d", (4, 5, 6))
    assert (row.parameters, row.multiply_adds) == (4 * 27 + 4, 120 * 27)
    assert row.saved_bytes == 3 * 5 * 6 * 4


def test_what_two_ops_share_is_kept_once() -> None:
    """ReLU keeps its result, which the convolution after it keeps as its input."""
    found = summary(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 1)), (3, 6, 6))
    assert [row.saved_bytes for row in found.rows] == [3 * 36 * 4, 4 * 36 * 4, 0]


def test_rows_add_up_to_the_totals() -> None:
    model = create_model("googlenet_small", aux_logits=True)
    found = summary(model, (3, 16, 16))
    assert found.parameters == sum(row.parameters for row in found.rows) == parameters(model)
    assert found.multiply_adds == sum(row.multiply_adds for row in found.rows)
    assert found.saved_bytes == sum(row.saved_bytes for row in found.rows)


def test_depth_folds_layers_into_rows_of_the_papers_table() -> None:
    """With the same totals."""
    model = create_model("googlenet_small")
    whole, folded = summary(model, (3, 16, 16)), summary(model, (3, 16, 16), depth=1)
    assert whole[1:] == folded[1:]
    assert sum(row.parameters for row in folded.rows) == parameters(model)
    paths = [row.path.removeprefix("inception") for row in folded.rows]
    assert " ".join(paths) == "conv1 3a 3b maxpool1 4a 4b 4c 4d maxpool2 5a 5b avgpool flatten fc1"
    assert folded.rows[1].output == (64, 16, 16)
    assert folded.rows[1].kind == "InceptionBlock"


def test_summary_prints_a_table() -> None:
    lines = str(summary(nn.Sequential(nn.Conv2d(3, 64, 7)), (3, 9, 9))).splitlines()
    assert [line.split()[0] for line in lines] == ["layer", "0", "total"]
    assert "9,472" in lines[1]
    assert "64×3×3" in lines[1]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_summary_leaves_no_trace(mode: str) -> None:
    """Running statistics that saw a batch of zeros, or a model left in training mode, would spoil what follows."""
    model = create_model("googlenet_small", aux_logits=True).train(mode != "eval")
    if mode == "mixed":  # a frozen stage
        model.inception3a.eval()
    modes = [module.training for _, module in model.named_modules()]
    state = model.state_dict()
    summary(model, (3, 16, 16))
    assert [module.training for _, module in model.named_modules()] == modes
    assert all((state[name] == value).all() for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_summary_cleans_up_after_an_error() -> None:
    model = create_model("googlenet_small").eval()
    with pytest.raises(ShapeError, match=r"takes pictures of shape \(N, 3, H, W\), got \(2, 4, 16, 16\)"):
        summary(model, (4, 16, 16))
    assert not model.training
    assert model(pictures(1, 3, 8, 8)).shape == (1, 10)


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), 32, (3, 0, 8)], ids=str)
def test_summary_wants_one_image(shape: Any) -> None:
    with pytest.raises(ShapeError, match=rf"shape of one image, \(C, H, W\), .*, got {re.escape(str(shape))}$"):
        summary(create_model("googlenet_small"), shape)


def test_summary_of_a_negative_depth() -> None:
    with pytest.raises(ShapeError, match="a depth of at least 0, got -1"):
        summary(nn.ReLU(), (3, 8, 8), depth=-1)


def test_summary_of_a_module_without_parameters() -> None:
    assert summary(nn.ReLU(), (3, 8, 8)).parameters == 0


@pytest.mark.parametrize("name", ["googlenet_small", "inception_resnet_v2_cifar"])
def test_what_is_kept_is_what_is_held(name: str) -> None:
    """Between forward and backward, as Python's own book-keeping has it: units that share one array, views of parts."""
    model, batch = create_model(name, width=1 / 4), 8
    x = pictures(batch, 3, 32, 32)
    ops.global_avg_pool2d(x)  # what is made once
    threads = num_threads()
    set_num_threads(1)  # a helper that had nothing to do in the first pass makes its working memory in the second
    tracemalloc.start()
    try:
        model(x).sum().backward()
        before = tracemalloc.get_traced_memory()[0]
        loss = model(x).sum()
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
        set_num_threads(threads)
    kept = summary(model, (3, 32, 32)).saved_bytes * batch - x.data.nbytes  # which was there before
    assert kept == pytest.approx(held, rel=0.02)
    loss.backward()


def test_rows_stand_in_the_order_of_definition() -> None:
    """Though the first convolutions of the branches run as one op, before the second ones."""
    paths = [row.path for row in summary(create_model("googlenet_small"), (3, 32, 32)).rows]
    module = [path.removeprefix("inception3a.") for path in paths if path.startswith("inception3a.")]
    assert module == [f"branch{name}" for name in ("1", "2.0", "2.1", "3.0", "3.1", "4.0", "4.1")]


def test_summary_does_not_move_the_next_masks() -> None:
    """A layer without a key counts its calls; one that was told its rows would meet two pictures that have none."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Dropout(0.5))
    x, masks = pictures(8, 3, 5, 5), []
    for looked_at in (False, True):
        model[1]._calls = 0
        if looked_at:
            summary(model, (3, 5, 5))
        masks.append(model(x).numpy() == 0)
    assert (masks[0] == masks[1]).all()
    rows = np.arange(8)
    model.set_key(Key(0), rows=rows)
    before = model(x).numpy()
    assert summary(model, (3, 5, 5)).rows[1].kind == "Dropout"
    assert model[1].rows is rows
    assert (model(x).numpy() == before).all()

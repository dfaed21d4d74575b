"""The engine: the graph that `record` builds, the order of `backward`, what is kept and for how long."""

from __future__ import annotations

import copy
import math
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from minigrad import Tensor, nn, no_grad, ops, record
from minigrad.errors import DtypeError, GraphError, ShapeError
from minigrad.random import Key, normal

Function = Callable[..., Tensor]


def leaf(*shape: int, name: str = "x", dtype: str = "float64") -> Tensor:
    """A host leaf of reproducible normal numbers."""
    return Tensor(normal(Key(3).fold(name, *shape), shape).astype(dtype), requires_grad=True)


def positive(xp: Any, *shape: int, name: str = "x", dtype: str = "float64") -> Tensor:
    """A leaf of the backend `xp` with values from 0.5 up: safe for log, sqrt and division."""
    values = 0.5 + np.abs(normal(Key(3).fold(name, *shape), shape))
    return Tensor(xp.asarray(values.astype(dtype)), requires_grad=True)


def doubled(x: Tensor, kept: Any = None) -> Tensor:
    """A user's op, 2x; its backward holds on to `kept`."""
    return record("double", x.data * 2, (x,), lambda dy: (kept, dy * 2)[1])


class Saved:
    """Something an op keeps for backward, whose end can be seen."""


# ---- Order: every node after all of its users ----


def test_the_example_of_the_docstring() -> None:
    """Walked depth first, b would hand on 1·2a and then count it again, or lose the part that comes through c."""
    a = Tensor(2.0, requires_grad=True)
    b = a * a
    c = b * 3.0
    (c + b).backward()
    assert a.grad is not None
    assert a.grad == 16.0


@pytest.mark.parametrize("swap", [False, True], ids=["c+b", "b+c"])
def test_a_long_and_a_short_way_meet(swap: bool) -> None:
    """A breadth-first walk reaches the shared node through the short way before the long one is done."""
    a = Tensor(2.0, requires_grad=True)
    b = a * a
    c = b
    for _ in range(5):
        c = c * 2.0
    (b + c if swap else c + b).backward()
    assert a.grad == 33 * 2 * 2.0  # d(32a² + a²)/da


def test_sixty_diamonds_take_sixty_steps() -> None:
    """A walk over paths instead of nodes would take 2^60 steps."""
    x = Tensor(np.ones(1), requires_grad=True)
    y = x
    for _ in range(60):
        y = y + y
    y.backward()
    np.testing.assert_array_equal(x.grad, [2.0**60])


def test_depth_is_no_limit() -> None:
    """A recursive walk ends in RecursionError after 1,000 ops."""
    x = Tensor(np.ones(1), requires_grad=True)
    y = x
    for _ in range(100_000):
        y = record("step", y.data, (y,), lambda dy: dy)
    y.backward()
    np.testing.assert_array_equal(x.grad, [1.0])


def test_a_deep_graph_can_be_dropped() -> None:
    """Destructors that call each other would overflow the C stack when a loss is thrown away."""
    x = Tensor(np.ones(1), requires_grad=True)
    y = x
    for _ in range(100_000):
        y = record("step", y.data, (y,), lambda dy: dy)
    last = weakref.ref(y)
    del y
    assert last() is None


def test_a_branch_that_leads_nowhere_is_not_walked() -> None:
    """An op whose result the loss does not use has no gradient to hand on."""
    x = Tensor(np.ones(2), requires_grad=True)
    doubled(x)
    (x * 3.0).sum().backward()
    np.testing.assert_array_equal(x.grad, [3.0, 3.0])


def test_an_op_without_a_gradient_stops_the_walk() -> None:
    """None from a backward means no gradient: what lies behind gets none, and nothing fails."""
    x = Tensor(np.ones(2), requires_grad=True)
    y = record("round", x.data.round(), (doubled(x),), lambda dy: None)
    y.backward(np.ones(2))
    assert x.grad is None


# ---- Joins: where gradients meet ----


def test_x_plus_x() -> None:
    """add hands the same dy to both inputs: adding in place into it would give 3 or more."""
    x = leaf(3)
    upstream = np.array([1.0, 10.0, 100.0])
    (x + x).backward(upstream)
    np.testing.assert_array_equal(x.grad, 2 * upstream)


@pytest.mark.parametrize("uses", [1, 2, 3, 5])
def test_uses_are_summed(uses: int) -> None:
    """The third gradient of a join is added in place into the engine's own sum, the second is not."""
    x = leaf(2, 3)
    h = x * 1.0  # an inner node, and not a leaf, is what joins here
    total = h
    for _ in range(uses - 1):
        total = total + h
    total.backward(np.ones((2, 3)))
    np.testing.assert_array_equal(x.grad, np.full((2, 3), float(uses)))


@pytest.mark.parametrize(
    "hand_on",
    [
        pytest.param(lambda a, b: a + b, id="add"),
        pytest.param(lambda a, b: ops.concat([a, b]), id="concat"),
        pytest.param(lambda a, b: a.reshape(3, 2) + b.reshape(3, 2), id="reshape"),
        pytest.param(lambda a, b: a.transpose() + b.transpose(), id="transpose"),
        pytest.param(lambda a, b: a.sum(0) + b.sum(0), id="sum"),
    ],
)
def test_the_upstream_gradient_is_never_changed(hand_on: Function) -> None:
    """These backwards hand on dy or a view of it; a later join must not add into that memory."""
    x, w = leaf(2, 3), leaf(2, 3, name="w")
    h, g = x * 1.0, w * 1.0
    y = hand_on(h, g)
    upstream = normal(Key(1), y.shape)
    before = upstream.copy()
    h_again, g_again = h * 5.0, g * 7.0  # second uses, whose gradients join those of y
    total = (y * Tensor(upstream)).sum() + h_again.sum() + g_again.sum() + h.sum() + g.sum()
    y2 = hand_on(h, g)
    total.backward()
    np.testing.assert_array_equal(upstream, before)
    assert y2.shape == y.shape


@pytest.mark.parametrize("hand_on", ["add", "concat", "reshape"])
def test_a_join_sums_right_behind_views(hand_on: str) -> None:
    """h's first gradient is a view of dy that g holds too: += into it would change g's."""
    x, w = leaf(2, 3), leaf(2, 3, name="w")
    h, g = x * 1.0, w * 1.0
    y = {"add": lambda: h + g, "concat": lambda: ops.concat([h, g]), "reshape": lambda: h.reshape(6) + g.reshape(6)}
    (y[hand_on]().sum() + (h * 10.0).sum() + (h * 100.0).sum()).backward()
    np.testing.assert_array_equal(x.grad, np.full((2, 3), 111.0))
    np.testing.assert_array_equal(w.grad, np.ones((2, 3)))


def twins(a: Tensor, b: Tensor) -> Tensor:
    """A user's op whose backward returns one fresh array twice."""

    def backward(dy: Any) -> Any:
        g = dy * 2
        return g, g

    return record("twins", 2 * (a.data + b.data), (a, b), backward)


@pytest.mark.parametrize(
    "join",
    [
        pytest.param(lambda a, b: a + b, id="add"),
        pytest.param(lambda a, b: (a + b).reshape(4), id="reshape"),
        pytest.param(twins, id="one array for two inputs"),
    ],
)
def test_leaves_do_not_share_gradients(join: Function) -> None:
    """Whoever changes one .grad in place (clipping, weight decay by hand) would change another's."""
    a, b = leaf(2, 2), leaf(2, 2, name="b")
    join(a, b).sum().backward()
    assert not np.shares_memory(a.grad, b.grad)


def test_the_upstream_gradient_is_not_kept() -> None:
    """The caller may reuse the array; a .grad that is the same memory would change with it."""
    x = leaf(3)
    upstream = np.ones(3)
    y = (x + 0.0).retain_grad()
    y.backward(upstream)
    assert not np.shares_memory(x.grad, upstream)
    assert not np.shares_memory(y.grad, upstream)


@pytest.mark.parametrize(
    "f",
    [lambda x: x.mean(), lambda x: x.sum(), lambda x: x.sum(0).sum(), lambda x: (x * 2.0).sum() * 0.5],
    ids=["mean", "sum", "sum of sums", "scaled"],
)
def test_a_leafs_gradient_is_an_ordinary_array(f: Function) -> None:
    """The gradient of a sum is one number seen many times (stride 0, read-only): no .grad to hand to a user."""
    x = leaf(2, 3)
    f(x).backward()
    x.grad *= 2
    assert x.grad.flags.c_contiguous


def test_a_number_has_an_array_as_gradient() -> None:
    """NumPy turns 0-d results into scalars, which are no arrays: no in-place change, the wrong kernel module."""
    x = Tensor(2.0, requires_grad=True)
    (x * 3.0).backward()
    assert isinstance(x.grad, np.ndarray)


def test_images_keep_their_layout_in_a_leafs_gradient() -> None:
    """A copy in C order would cost every op behind a retained gradient a layout copy."""
    x = Tensor(np.zeros((2, 4, 5, 3)).transpose(0, 3, 1, 2), requires_grad=True)
    upstream = np.ones((2, 4, 5, 3)).transpose(0, 3, 1, 2)
    (x + 1.0).backward(upstream)
    assert x.grad.strides == x.data.strides


# ---- backward: what it is called with, and how often ----


def test_the_upstream_gradient_weights_the_result() -> None:
    """Without it a non-scalar would silently be summed."""
    x = leaf(2, 3)
    upstream = normal(Key(1), (2, 3))
    (x * 3.0).backward(upstream)
    np.testing.assert_array_equal(x.grad, 3 * upstream)


@pytest.mark.parametrize("given", [np.float32([1, 2, 3]), [1, 2, 3], Tensor(np.array([1.0, 2.0, 3.0]))], ids=type)
def test_upstream_gradients_of_other_types_are_converted(given: Any) -> None:
    """The engine checks every gradient's dtype; the first one, which the user writes, is converted."""
    x = leaf(3, dtype="float32")
    (x * 2.0).backward(given)
    assert x.grad.dtype == np.float32
    np.testing.assert_array_equal(x.grad, [2, 4, 6])


def test_a_non_scalar_needs_an_upstream_gradient() -> None:
    with pytest.raises(ShapeError, match=r"shape \(2, 3\) needs the upstream gradient: .*\.sum\(\)"):
        (leaf(2, 3) * 2.0).backward()


def test_one_element_of_any_shape_needs_none() -> None:
    x = leaf(1, 1)
    (x * 2.0).backward()
    np.testing.assert_array_equal(x.grad, [[2.0]])


def test_the_upstream_gradients_shape_is_checked() -> None:
    """It would broadcast, and scale the gradients by a wrong number."""
    with pytest.raises(ShapeError, match=r"backward\(\) got a gradient of shape \(3,\) for a tensor of shape \(2, 3\)"):
        (leaf(2, 3) * 2.0).backward(np.ones(3))


def test_a_second_backward_is_explained() -> None:
    y = (leaf(3) * 2.0).sum()
    y.backward()
    with pytest.raises(GraphError, match=r"reached 'sum' a second time.*compute the loss again"):
        y.backward()


def test_a_second_backward_through_a_shared_part_is_explained() -> None:
    """The second loss is new, but the op it shares with the first has been used."""
    h = leaf(3).exp()
    h.sum().backward()
    with pytest.raises(GraphError, match=r"reached 'exp' a second time.*sum losses"):
        (h * 2.0).sum().backward()


def test_backward_on_constants_is_explained() -> None:
    with pytest.raises(GraphError, match=r"without a graph: it was computed under no_grad\(\), or from nothing"):
        (Tensor(np.ones(3)) * 2.0).sum().backward()


@pytest.mark.parametrize("used", [False, True])
def test_backward_on_a_leaf_is_explained(used: bool) -> None:
    """Whether an op has used the leaf makes no difference."""
    x = Tensor(1.0, requires_grad=True)
    if used:
        _ = x * 2.0
    with pytest.raises(GraphError, match="without a graph: it is a leaf: call"):
        x.backward()
    assert x.grad is None


def test_gradients_add_up_over_losses() -> None:
    """Two losses, two graphs, one .grad: accumulating over micro-batches relies on it."""
    x = leaf(3)
    (x * 2.0).sum().backward()
    first = x.grad
    (x * 3.0).sum().backward()
    np.testing.assert_array_equal(x.grad, [5.0] * 3)
    np.testing.assert_array_equal(first, [2.0] * 3)  # a sum was made; what the user holds stays


def test_zero_grad_forgets() -> None:
    x = leaf(3)
    (x * 2.0).sum().backward()
    x.zero_grad()
    (x * 3.0).sum().backward()
    np.testing.assert_array_equal(x.grad, [3.0] * 3)


def test_constants_get_no_gradient() -> None:
    x, constant = leaf(3), Tensor(np.ones(3))
    (x * constant).sum().backward()
    assert constant.grad is None


def test_intermediate_results_get_no_gradient() -> None:
    """They would hold the memory of every activation a second time."""
    x = leaf(3)
    h = x * 2.0
    h.sum().backward()
    assert h.grad is None


def test_retain_grad_keeps_an_intermediate_gradient() -> None:
    x = leaf(3)
    h = (x * 2.0).retain_grad()
    (h * h).sum().backward()
    np.testing.assert_allclose(h.grad, 2 * h.data)
    np.testing.assert_allclose(x.grad, 4 * h.data)


def test_a_retained_gradient_is_complete() -> None:
    """Taken at the first of two uses, it would miss the second."""
    h = (leaf(3) * 2.0).retain_grad()
    (h + h.exp()).sum().backward()
    np.testing.assert_allclose(h.grad, 1 + np.exp(h.data))


def test_retain_grad_needs_a_graph() -> None:
    with pytest.raises(GraphError, match="retain_grad"):
        (Tensor(np.ones(3)) * 2.0).retain_grad()


# ---- no_grad and detach ----


def test_no_grad_records_nothing() -> None:
    x = leaf(3)
    with no_grad():
        y = x * 2.0
    assert y.node is None


def test_no_grad_ends_with_its_block() -> None:
    """An exception inside must not leave the process without gradients."""
    x = leaf(3)
    with pytest.raises(ZeroDivisionError), no_grad():
        _ = 1 / 0
    (x * 2.0).sum().backward()
    assert x.grad is not None


def test_no_grad_blocks_nest() -> None:
    """Leaving the inner block must not switch recording on in the outer one."""
    x = leaf(3)
    with no_grad():
        with no_grad():
            pass
        assert (x * 2.0).node is None


def test_no_grad_holds_for_its_thread_alone() -> None:
    """A validation thread in no_grad must not silence the training thread."""
    x, inside, done = leaf(3), threading.Event(), threading.Event()

    def validate() -> None:
        with no_grad():
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=validate)
    thread.start()
    inside.wait(10)
    recorded_here = (x * 2.0).node is not None
    done.set()
    thread.join()
    assert recorded_here


def test_a_thread_started_inside_no_grad_records() -> None:
    x, results = leaf(3), []
    with no_grad():
        thread = threading.Thread(target=lambda: results.append(x * 2.0))
        thread.start()
        thread.join()
    results[0].sum().backward()
    np.testing.assert_array_equal(x.grad, [2.0] * 3)


def test_detach_cuts_the_graph_and_shares_the_data() -> None:
    x = leaf(3)
    h = x * 2.0
    d = h.detach()
    (d * h).sum().backward()  # d counts as a constant
    np.testing.assert_allclose(x.grad, 2 * h.data)
    assert d.data is h.data


# ---- Memory: what a backward names is kept until it has run, and nothing else ----


def test_what_was_saved_is_freed_as_backward_goes() -> None:
    """Kept to the end, the peak of backward would be all activations and all gradients at once."""
    late = Saved()
    seen = weakref.ref(late)
    alive: list[bool] = []
    x = leaf(3)
    early = record("early", x.data, (x,), lambda dy: (alive.append(seen() is not None), dy)[1])
    y = doubled(early, kept=late)
    del late
    assert seen() is not None
    y.backward(np.ones(3))
    assert alive == [False]


def test_after_backward_the_loss_keeps_nothing() -> None:
    """A training loop that holds on to its last loss must not hold on to the step's activations."""
    saved = Saved()
    seen = weakref.ref(saved)
    loss = doubled(leaf(3), kept=saved).sum()
    del saved
    loss.backward()
    assert seen() is None


def test_inference_keeps_nothing() -> None:
    """Without a leaf that wants a gradient there is no graph, and inputs go as soon as the user lets go."""
    x = Tensor(np.ones(3))
    h = x.exp()
    seen = weakref.ref(h.data)
    y = h.exp()
    del h
    assert seen() is None
    assert y.node is None


@pytest.mark.parametrize(
    "f",
    [
        pytest.param(lambda h: h + 1.0, id="add"),
        pytest.param(lambda h: h.sum(), id="sum"),
        pytest.param(lambda h: 2.0 * h, id="times a number, which keeps the number"),
        pytest.param(lambda h: h.exp(), id="exp, which needs its result only"),
        pytest.param(lambda h: h.sqrt(), id="sqrt, likewise"),
        pytest.param(ops.relu, id="relu, likewise"),
        pytest.param(lambda h: ops.avg_pool2d(h, 2), id="avg_pool2d"),
        pytest.param(lambda h: ops.concat([h, h]), id="concat"),
        pytest.param(lambda h: ops.dropout(h, 0.5, Key(0)), id="dropout, which keeps its mask"),
    ],
)
def test_the_graph_does_not_keep_results_that_nobody_names(f: Function) -> None:
    """A node that referred to its output tensor would keep every activation of the network."""
    x = leaf(1, 2, 4, 4)
    h = x * x
    seen = weakref.ref(h.data if h.data.base is None else h.data.base)
    y = f(h)
    del h
    assert seen() is None
    assert y.node is not None


def test_a_graph_is_no_cycle() -> None:
    """In a cycle, activations would stay until the garbage collector happens to run."""
    saved = Saved()
    seen = weakref.ref(saved)
    y = doubled(leaf(3), kept=saved)
    del saved, y
    assert seen() is None


# ---- record: a user's own op ----


def test_a_users_op() -> None:
    x = leaf(3)
    doubled(doubled(x)).sum().backward()
    np.testing.assert_array_equal(x.grad, [4.0] * 3)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        pytest.param(lambda dy: (dy,), "returned 1 gradients for 2 inputs", id="too few"),
        pytest.param(lambda dy: (dy, dy, dy), "returned 3 gradients for 2 inputs", id="too many"),
        pytest.param(lambda dy: dy, "returned 1 gradients for 2 inputs", id="one array"),
        pytest.param(lambda dy: (dy, dy[:1]), r"returned float64 \(1,\) for an input of float64 \(3,\)", id="shape"),
        pytest.param(lambda dy: (dy, dy.sum()), r"returned float64 \(\) for an input of float64 \(3,\)", id="scalar"),
        pytest.param(lambda dy: (dy, dy.astype("f4")), r"returned float32 \(3,\) for an input of float64", id="dtype"),
        pytest.param(lambda dy: (dy, 1.0), "returned a float, not an array", id="number"),
        pytest.param(lambda dy: (dy, [1.0] * 3), "returned a list, not an array", id="list"),
    ],
)
def test_a_wrong_backward_is_named(returned: Callable[[Any], Any], message: str) -> None:
    """It would broadcast into another gradient far from where the mistake is."""
    a, b = leaf(3), leaf(3, name="b")
    y = record("mine", a.data + b.data, (a, b), returned)
    with pytest.raises(GraphError, match=f"backward of 'mine' {message}"):
        y.sum().backward()


def test_an_input_may_be_left_out() -> None:
    """A bias of None takes its place among the inputs, and None comes back for it."""
    x = leaf(3)
    record("biased", x.data, (x, None), lambda dy: (dy, None)).sum().backward()
    np.testing.assert_array_equal(x.grad, [1.0] * 3)


REBOUND: dict[str, tuple[Function, tuple[int, ...]]] = {
    "multiply": (lambda x: x * x, (3,)),
    "divide": (lambda x: 1.0 / x, (3,)),
    "power": (lambda x: x**3, (3,)),
    "matmul": (lambda x: x @ x, (3, 3)),
    "log": (lambda x: x.log(), (3,)),
    "exp": (lambda x: x.exp(), (3,)),
    "sqrt": (lambda x: x.sqrt(), (3,)),
    "relu": (ops.relu, (3,)),
    "softmax": (ops.softmax, (2, 3)),
    "log_softmax": (ops.log_softmax, (2, 3)),
    "linear": (lambda x: ops.linear(x, x), (3, 3)),
    "conv2d": (lambda x: ops.conv2d(x, x, padding=1), (3, 3, 3, 3)),
    "max_pool2d": (lambda x: ops.max_pool2d(x, 2), (1, 2, 4, 4)),
    "local_response_norm": (lambda x: ops.local_response_norm(x, alpha=1.0), (1, 7, 2, 2)),
    "batch_norm": (
        lambda x: ops.batch_norm(x, x[0, :, 0, 0], x[1, :, 0, 0], np.zeros(3), np.ones(3), training=True),
        (2, 3, 4, 4),
    ),
}


@pytest.mark.parametrize("name", REBOUND)
def test_backward_sees_the_values_of_the_forward_pass(name: str) -> None:
    """`tensor.data` may be another array by then (an optimizer, loaded weights): that is not what was computed."""
    f, shape = REBOUND[name]
    grads = []
    for rebind in (False, True):
        x = Tensor(np.abs(normal(Key(0), shape)) + 0.5, requires_grad=True)
        y = f(x)
        if rebind:
            x.data, y.data = np.full(shape, 7.0), np.full(y.shape, 7.0)
        y.backward(normal(Key(1), y.shape))
        grads.append(x.grad)
    np.testing.assert_array_equal(*grads)


# ---- Mistakes ----


def scaled(x: Tensor, result: Any = None, inputs: Any = None) -> Tensor:
    """An op of one's own, whose author makes a mistake."""
    return record(
        "scaled", x.data * 2, (x,) if inputs is None else inputs, lambda dy: dy * 2 if result is None else result
    )


@pytest.mark.parametrize(
    ("mistake", "error", "sentence"),
    [
        (
            lambda x: Tensor([[1, 2], [3]]),
            DtypeError,
            r"numbers in rows of equal length, got \[\[1, 2\], \[3\]\]",
        ),
        (lambda x: Tensor(None), DtypeError, "made of numbers in rows of equal length, got None"),
        (lambda x: Tensor("12"), DtypeError, "made of numbers in rows of equal length, got '12'"),
        (lambda x: x + None, DtypeError, "made of numbers in rows of equal length, got None"),
        (
            lambda x: Tensor(np.zeros(2, np.uint8)),
            DtypeError,
            r"'float32'\), and divide pictures of 0 … 255 by 255",
        ),
        (lambda x: Tensor(np.zeros(2, int)), DtypeError, r"got int64: convert with \.astype\('float32'\)$"),
        (lambda x: np.argmax(x), DtypeError, r"a NumPy function got a Tensor: hand it the array, x\.numpy\(\)"),
        (lambda x: np.asarray(x), DtypeError, "a NumPy function got a Tensor"),
        (lambda x: x + leaf(4, 5), ShapeError, r"shapes \(2, 3\) and \(4, 5\) do not go together: .* must be equal"),
        (lambda x: x * leaf(2), ShapeError, r"shapes \(2, 3\) and \(2,\) do not go together"),
        (
            lambda x: x + np.zeros(3, np.float32),
            DtypeError,
            r"add got float64 \(2, 3\) and float32 \(3,\): convert",
        ),
        (lambda x: x.transpose(0, 2), ShapeError, r"transpose of \(2, 3\) wants each of its 2 axes once, got \(0, 2\)"),
        (lambda x: x.transpose(2, 1), ShapeError, "wants each of its 2 axes once"),  # 2 % 2 is 0
        (lambda x: x.transpose((1, 0)), ShapeError, "wants each of its 2 axes once"),
        (
            lambda x: scaled(x, inputs=x),
            DtypeError,
            r"'scaled' wants its inputs as a tuple .*, as \(x,\), got Tensor",
        ),
        (
            lambda x: scaled(x, inputs=(x.data,)),
            DtypeError,
            r"its inputs as a tuple of tensors, .* \['ndarray'\]",
        ),
        (
            lambda x: scaled(x, x).sum().backward(),
            GraphError,
            "returned a Tensor, not an array: compute with",
        ),
        (lambda x: scaled(x, 2.0).sum().backward(), GraphError, "returned a float, not an array: compute with"),
        (
            lambda x: scaled(x, (x.data,) * 2).sum().backward(),
            GraphError,
            "2 gradients for 1 inputs: return one",
        ),
        (
            lambda x: scaled(x, x.data[0]).sum().backward(),
            GraphError,
            r"\(2, 3\): a gradient has its input's shape",
        ),
    ],
)
def test_mistakes_are_explained(mistake: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        mistake(leaf(2, 3))


@pytest.mark.parametrize(
    "function",
    [np.sum, np.mean, np.max, np.argmax, np.sort, np.shape, np.asarray, np.array, np.linalg.norm,
     lambda x: np.concatenate([x, x]), lambda x: np.allclose(x, 0), lambda x: np.dot(np.ones(2), x)],
)  # fmt: skip
def test_numpy_functions_say_what_they_want(function: Any) -> None:
    """np.sum would call Tensor.sum with arguments of NumPy's, np.shape would answer, np.array would make objects."""
    with pytest.raises(DtypeError, match=r"a NumPy function got a Tensor: hand it the array, x\.numpy\(\)"):
        function(leaf(2, 3))


# ---- As Python's numbers ----


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1, 1)])
def test_one_element_is_a_number(shape: tuple[int, ...]) -> None:
    x = Tensor(np.full(shape, 2.34567), requires_grad=True)
    assert (float(x), int(x), bool(x), bool(x * 0.0)) == (2.34567, 2, True, False)
    assert (f"{x:.3f}", f"{x:8.1e}", f"loss {x.sum():.1%}") == ("2.346", " 2.3e+00", "loss 234.6%")
    assert math.sqrt(x) == math.sqrt(2.34567)
    assert f"{x}" == str(x) == repr(x)


def test_several_elements_are_none() -> None:
    """An `if` on them, too, would mean either of two things."""
    for ask in (float, int, bool, "{:.3f}".format):
        with pytest.raises(ShapeError, match=r"needs a tensor with one element, got shape \(2, 3\)"):
            ask(leaf(2, 3))


def test_repr_is_short() -> None:
    """The numbers where they can be read, else what they are."""
    assert repr(Tensor([1.0, 2.0])) == "Tensor(array([1., 2.], dtype=float32))"
    large = Tensor(np.zeros((64, 3, 32, 32), "float32"), requires_grad=True)
    assert repr(large) == "Tensor(float32 (64, 3, 32, 32), requires_grad=True)"
    assert repr(large * 2.0) == "Tensor(float32 (64, 3, 32, 32), from multiply)"


# ---- Copies ----


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_a_copy_has_gradients_of_its_own(copied: Function) -> None:
    """A layer that has been used is linked to the graph; its copy must not send gradients to it."""
    layer = nn.Linear(2, 3)
    x = Tensor(np.ones((4, 2), np.float32))
    layer(x).sum().backward()
    other = copied(layer)
    np.testing.assert_array_equal(other.weight.grad, layer.weight.grad)
    layer.zero_grad(), other.zero_grad()
    other(x).sum().backward()
    assert layer.weight.grad is None
    np.testing.assert_array_equal(other.weight.grad, np.full((3, 2), 4.0))


def test_a_copy_of_a_users_own_kind_of_tensor() -> None:
    class Named(Tensor):
        pass

    x = Named([1.0])
    x.name = "mine"  # type: ignore[attr-defined]
    assert copy.copy(x).name == "mine"


# ---- Numbers without axes ----


def test_a_number_that_is_used_three_times(xp: Any) -> None:
    """NumPy makes scalars of 0-d sums, into which nothing can be added."""
    a = Tensor(xp.asarray(2.0), requires_grad=True)
    for times in (1, 2):
        (a * a * a).backward()
        assert isinstance(a.grad, type(a.data))
        assert float(a.grad) == times * 12.0


def test_the_mean_of_nothing() -> None:
    with pytest.raises(ShapeError, match=r"mean\(\) of no elements: the tensor has the shape \(0, 3\)"):
        Tensor(np.zeros((0, 3))).mean()


def test_gradients_of_no_pictures_meet() -> None:
    x = Tensor(np.zeros((0, 3, 4, 4)), requires_grad=True)
    (x + x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape

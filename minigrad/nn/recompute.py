"""Time for memory: run a module again in backward instead of keeping what its ops would keep."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minigrad.errors import ShapeError
from minigrad.graph import grad_enabled, no_grad
from minigrad.layout import Array
from minigrad.tensor import Tensor, record

if TYPE_CHECKING:
    from minigrad.nn.module import Module


def recomputed(module: Module, x: Tensor) -> Tensor:
    """module.forward(x), of which nothing but x is kept until backward, which runs forward once more.

    In training the same bits as without: the second run meets the modes, keys and random numbers of the first, and
    leaves running statistics as they are. (In evaluation the first run folds batch norm, the second does not: they
    agree within rounding.) Costs one more forward pass. `module.recompute = True` makes every call of a module one.

    x        what module.forward takes; its only argument
    saves    x
    raises   ShapeError if the module returns anything but one tensor

    source   Chen, Xu, Zhang, Guestrin: Training deep nets with sublinear memory cost, arXiv:1604.06174
    """
    first = [(layer, layer.attributes()) for _, layer in module.named_modules()]
    with no_grad():
        y = module.forward(x)
    if not isinstance(y, Tensor):
        raise ShapeError(f"recompute works for modules with one result, {type(module).__name__} returns several")
    data, needs_dx = x.data, x.needs_grad

    def backward(dy: Array) -> list[Array | None]:
        now = [(layer, layer.attributes()) for layer, _ in first]
        before = [(tensor, tensor.version, tensor.data.copy()) for _, tensor in module.named_buffers()]
        again = Tensor(data, requires_grad=needs_dx)
        try:
            for layer, attributes in first:
                vars(layer).update(attributes)
            with grad_enabled():
                module.forward(again).backward(dy)  # which leaves the parameters' gradients where they belong
        finally:
            for layer, attributes in now:
                vars(layer).update(attributes)
            for tensor, version, values in before:
                tensor.data[...] = values
                if tensor.version != version:
                    tensor.changed("putting it back after recomputation")
        return [again.grad, *(None for _ in parameters)]

    parameters = list(module.parameters())
    # Layers in evaluation read their buffers too: running statistics.
    read = [tensor for layer, _ in first if not layer.training for _, tensor in layer.members(Tensor)]
    return record("recompute", y.data, (x, *parameters), backward, kept=(x, *parameters, *read))

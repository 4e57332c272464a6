"""How the ops are differentiated: in reverse, forward, and under the transforms of torch.func.

``torch.library.register_autograd`` knows reverse mode alone: it drops forward tangents without a
word, and torch.func refuses it in words of its own. So each op has an ``autograd.Function`` with
all rules, applied by two kernels: that of the key Autograd, and that of functorch's front, which
sees a call before the transforms do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from knnext import reference
from knnext.ops._checks import CHECKS

_FRONT = "FuncTorchDynamicLayerFrontMode"
# Python-side definitions live as long as this object.
_KEEP = torch.library.Library("knnext", "FRAGMENT")
_below_autograd = torch._C._AutoDispatchBelowAutograd
_transforms_active = torch._C._are_functorch_transforms_active
_any_requires_grad = torch._C._any_requires_grad
_VmapResult = tuple[Any, Any]


def call(op: Any, *args: Any, **kwargs: Any) -> Any:
    """The op, past the kernels of this module where no derivative can be asked for: they are
    Python, and would take longer than a short op itself.
    """
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return op(*args, **kwargs)
    if derivatives_asked(*args, **kwargs):
        return op(*args, **kwargs)
    with _below_autograd():
        return op(*args, **kwargs)


def derivatives_asked(*args: Any, **kwargs: Any) -> bool:
    """Whether somebody may differentiate what is computed from these arguments now."""
    return (
        forward_ad._current_level >= 0
        or _transforms_active()
        or (torch.is_grad_enabled() and _any_requires_grad(*args, **kwargs))
    )


def register_derivatives(
    name: str,
    *,
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    jvp: Callable[..., Any],
    vmap: Callable[..., _VmapResult] | None = None,
) -> None:
    """The rules of the op ``knnext::name``, with the signatures of ``autograd.Function``; all
    arguments come in the schema's order. ``vmap`` is one such as :func:`as_rows`, the default.
    """
    op = _overload(name)
    function = _function(name, setup_context, backward, jvp, vmap or as_rows)

    def differentiate(*args: Any, **kwargs: Any) -> Any:
        if forward_ad._current_level >= 0 or (
            torch.is_grad_enabled() and _any_requires_grad(*args, **kwargs)
        ):
            return function.apply(*_in_order(op, args, kwargs))
        with _below_autograd():
            return op(*args, **kwargs)

    _KEEP.impl(name, differentiate, "Autograd")
    _register_front(name, function)


def register_no_derivative(name: str, vmap: Callable[..., _VmapResult] | None = None) -> None:
    """For an op that chooses: its outputs never require grad, and asking for one does not warn.

    Where zeros would stand for a derivative, as in forward mode and in torch.func, it says that
    there is none.
    """
    op = _overload(name)

    def refuse(*_: Any) -> NoReturn:
        raise RuntimeError(
            f"knnext::{name}: no derivative goes through this op; give it detached tensors, and "
            "take distances to differentiate from knnext.rescore of the indices"
        )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)

    def differentiate(*args: Any, **kwargs: Any) -> Any:
        if forward_ad._current_level >= 0 and any(map(_has_tangent, (*args, *kwargs.values()))):
            refuse()
        with _below_autograd():
            return op(*args, **kwargs)

    _KEEP.impl(name, differentiate, "Autograd")
    _register_front(name, _function(name, setup_context, refuse, refuse, vmap or as_rows))


def register_gradient(name: str, plain: Callable[..., tuple[Tensor, ...]]) -> None:
    """The op ``knnext::name`` is itself a gradient: plain PyTorch has its derivatives."""
    op = _overload(name)

    def differentiate(*args: Any) -> Any:
        if derivatives_asked(*args):
            return plain(*args)
        with _below_autograd():
            return op(*args)

    _KEEP.impl(name, differentiate, "Autograd")
    _KEEP.impl(name, plain, _FRONT)


def saved_primals(ctx: Any) -> tuple[Tensor, ...]:
    """What was saved, without the tangents that a ``jvp`` is there to carry on."""
    return tuple(forward_ad.unpack_dual(t, level=0).primal for t in ctx.saved_tensors)


def _register_front(name: str, function: type[torch.autograd.Function]) -> None:
    op, check = _overload(name), CHECKS[name.split(".")[0]]

    def front(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)  # the shapes seen here are those of one sample
        if _functionalizing():
            return getattr(reference, name.split(".")[0])(*args, **kwargs)
        return function.apply(*_in_order(op, args, kwargs))

    _KEEP.impl(name, front, _FRONT)


def _functionalizing() -> bool:
    """torch.func.functionalize, which knows no ``autograd.Function``, is among the transforms."""
    from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

    kind = torch._C._functorch.TransformType.Functionalize
    return any(i.key() == kind for i in retrieve_all_functorch_interpreters())


def _function(
    name: str,
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    jvp: Callable[..., Any],
    vmap: Callable[..., _VmapResult],
) -> type[torch.autograd.Function]:
    op = _overload(name)
    in_place = sum(not a.kwarg_only for a in op._schema.arguments)
    by_name = [a.name for a in op._schema.arguments[in_place:]]

    def run(*args: Any) -> Any:
        return op(*args[:in_place], **dict(zip(by_name, args[in_place:], strict=True)))

    def forward(*args: Any) -> Any:
        with _below_autograd():
            return run(*args)

    def tangent(ctx: Any, *changes: Any) -> Any:
        # Without this, torch takes no tangent of a tangent, and its jacfwd of jacfwd gives zeros.
        with forward_ad._set_fwd_grad_enabled(True):
            return jvp(ctx, *changes)

    def over_samples(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> _VmapResult:
        return vmap(run, info.batch_size, in_dims, *args)

    rules = {
        "forward": forward,
        "setup_context": setup_context,
        "backward": backward,
        "jvp": tangent,
        "vmap": over_samples,
    }
    rules = {rule: staticmethod(run) for rule, run in rules.items()}
    return type(name.replace(".", "_"), (torch.autograd.Function,), rules)


def _overload(name: str) -> Any:
    base, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.knnext, base), overload or "default")


def _in_order(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """All arguments by place: the dispatcher leaves out those that equal their defaults."""
    rest = op._schema.arguments[len(args) :]
    return [*args, *(kwargs.get(a.name, a.default_value) for a in rest)]


def _has_tangent(value: Any) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


# Rules of vmap: the samples of a row-wise op are more rows.


def as_rows(
    run: Callable[..., Any],
    batch: int,
    in_dims: tuple[int | None, ...],
    *args: Any,
    shared: tuple[int, ...] = (),
) -> _VmapResult:
    """Every sample's rows in one call. The first argument tells their number; a tensor is (rows,
    ...) or a parameter (), but those at the places ``shared``, which all samples have in common.
    """
    rows = args[0].shape[0 if in_dims[0] is None or in_dims[0] > 0 else 1]

    def flat(place: int) -> Any:
        value, dim = args[place], in_dims[place]
        if not isinstance(value, Tensor) or place in shared or (dim is None and not value.dim()):
            return value
        value = value[None] if dim is None else value.movedim(dim, 0)
        if value.dim() == 1:  # one parameter a sample
            value = value[:, None]
        return value.expand(batch, rows, *value.shape[2:]).reshape(batch * rows, *value.shape[2:])

    out = run(*map(flat, range(len(args))))
    if isinstance(out, Tensor):
        return out.reshape(batch, rows, *out.shape[1:]), 0
    return tuple(o.reshape(batch, rows, *o.shape[1:]) for o in out), (0,) * len(out)


def one_by_one(
    run: Callable[..., Any], batch: int, in_dims: tuple[int | None, ...], *args: Any
) -> _VmapResult:
    """Sample after sample: where each has keys of its own, there is no common search."""

    def sample(take: Callable[[Tensor, int], Tensor]) -> Any:
        pairs = zip(args, in_dims, strict=True)
        return run(*(a if dim is None else take(a, dim) for a, dim in pairs))

    if batch == 0:  # one that names no row tells the shapes
        out = sample(_no_rows)
        if isinstance(out, Tensor):
            return out.new_empty((0, *out.shape)), 0
        return tuple(o.new_empty((0, *o.shape)) for o in out), (0,) * len(out)
    results = [sample(partial(_nth, i)) for i in range(batch)]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])


def _nth(i: int, batch: Tensor, dim: int) -> Tensor:
    return batch.select(dim, i)


def _no_rows(batch: Tensor, dim: int) -> Tensor:
    shape = batch.movedim(dim, 0).shape[1:]
    return batch.new_full(shape, 0.0 if batch.is_floating_point() else -1)

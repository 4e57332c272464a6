"""Lending a model: for the calls made in one context, its output passes through another's hands.

Hooks stand on the model and on its key module while anybody lends it, and a call asks them in
whose name it was made: what lends is kept in a context variable, and what a call captures with the
call. So a thread (or a task) that lends changes nothing for the others, which may call the same
model beside it, raw or lent by somebody else. No lock is held during a call.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from knnext.lm.compiled import uncompiled
from knnext.lm.key_layer import KeyModule
from knnext.lm.running import first_tensor


@dataclass
class Call:
    """One forward pass of a lent model: its arguments by name, and the keys it made."""

    arguments: dict[str, Any]
    states: Tensor | None = None


#: Takes a call and the model's output with logits by name, and gives the output to go out instead.
Finish = Callable[[Call, Any], Any]


@dataclass(eq=False)
class _Loan:
    model: nn.Module
    key: KeyModule
    finish: Finish | None
    #: ``.call``, one a thread: a copied context may be at work in several.
    running: threading.local = field(default_factory=threading.local)


_LOANS: ContextVar[tuple[_Loan, ...]] = ContextVar("knnext_loans", default=())

#: Arguments that the model does not get: a loss of its own logits would be of no use.
_HELD_BACK = ("labels", "return_dict")


@contextmanager
def lending(model: nn.Module, key: KeyModule, finish: Finish | None) -> Iterator[None]:
    """Inside the block, in this context, calls of ``model`` end in ``finish``.

    The innermost block of a model counts. With ``finish=None`` the model is its own again, inside
    whatever block that may stand in.
    """
    loan = _Loan(model, key, finish)
    with uncompiled(model, key.module), _hooked(model, key):
        _LOANS.set((*_LOANS.get(), loan))
        try:
            yield
        finally:
            # By name and not by token: blocks may end in another order than they began.
            _LOANS.set(tuple(other for other in _LOANS.get() if other is not loan))


def _loan_of(model: nn.Module) -> _Loan | None:
    for loan in reversed(_LOANS.get()):
        if loan.model is model:
            return loan if loan.finish is not None else None
    return None


# The hooks. Torch calls one without the keyword arguments where it was taken off in mid-call, by
# a thread that this call has nothing to do with; hence the loose signatures.


def _before_model(model: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
    if getattr(model, "_is_replica", False):
        raise RuntimeError("a KNNLM cannot run under DataParallel: use one process for each GPU")
    loan = _loan_of(model)
    if loan is None or not rest:
        return None
    arguments = _by_name(model, args, rest[0])
    loan.running.call = Call(arguments)
    passed = {name: value for name, value in arguments.items() if name not in _HELD_BACK}
    if not _wants_dict(model, arguments):
        passed["return_dict"] = True  # after it, the logits can be replaced by name
    return (), passed


def _after_model(model: nn.Module, _: Any, *rest: Any) -> Any:
    loan = _loan_of(model)
    call = None if loan is None else loan.running.__dict__.pop("call", None)
    if loan is None or loan.finish is None or call is None:
        return None
    output = rest[-1]
    if not isinstance(getattr(output, "logits", None), Tensor):
        raise TypeError(
            f"{type(model).__name__} gave {type(output).__name__} without logits by name, also "
            "with return_dict=True: it must have an output layer, as AutoModelForCausalLM loads it"
        )
    output = loan.finish(call, output)
    return output if _wants_dict(model, call.arguments) else output.to_tuple()


def _before_key(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
    _keep(module, "input", (args, rest[0] if rest else {}))


def _after_key(module: nn.Module, _: Any, output: Any) -> None:
    _keep(module, "output", output)


def _keep(module: nn.Module, side: str, value: Any) -> None:
    for loan in _LOANS.get():
        call = getattr(loan.running, "call", None)
        if call is not None and loan.key.module is module and loan.key.side == side:
            states = first_tensor(value)
            if states is None:
                raise RuntimeError(f"{loan.key} has no tensor on its {side} side")
            call.states = states.detach()


def _by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(args) > len(names):
        raise TypeError(
            f"{type(model).__name__} takes {len(names)} arguments by position, got {len(args)}"
        )
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _wants_dict(model: nn.Module, arguments: dict[str, Any]) -> bool:
    wanted = arguments.get("return_dict")
    if wanted is None:
        wanted = getattr(getattr(model, "config", None), "return_dict", True)
    return bool(wanted)


# Who needs hooks, and the handles that take them off


@dataclass
class _Hooks:
    handles: list[Any]
    users: int = 0


#: Held while hooks are put on or taken off, and never while a model runs.
_LOCK = threading.Lock()
_HOOKS: dict[str, WeakKeyDictionary[nn.Module, _Hooks]] = {
    role: WeakKeyDictionary() for role in ("model", "input", "output")
}


@contextmanager
def _hooked(model: nn.Module, key: KeyModule) -> Iterator[None]:
    places = (("model", model), (key.side, key.module))
    with _LOCK:
        for role, module in places:
            if module not in _HOOKS[role]:
                _HOOKS[role][module] = _Hooks(_put_on(role, module))
            _HOOKS[role][module].users += 1
    try:
        yield
    finally:
        with _LOCK:
            for role, module in places:
                hooks = _HOOKS[role][module]
                hooks.users -= 1
                if hooks.users == 0:
                    del _HOOKS[role][module]
                    for handle in hooks.handles:
                        handle.remove()


def _put_on(role: str, module: nn.Module) -> list[Any]:
    _take_off_copied(module)
    if role == "input":
        return [module.register_forward_pre_hook(_before_key, with_kwargs=True)]
    if role == "output":
        return [module.register_forward_hook(_after_key)]
    return [
        module.register_forward_pre_hook(_before_model, with_kwargs=True),
        module.register_forward_hook(_after_model, with_kwargs=True),
    ]


def _take_off_copied(module: nn.Module) -> None:
    """Hooks that a copy of a lent model, deep or pickled, has with it: they would act twice."""
    for hooks, options in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    ):
        for number in [n for n, hook in hooks.items() if hook in _OURS]:
            del hooks[number]
            options.pop(number, None)


_OURS = (_before_model, _after_model, _before_key, _after_key)

"""GPUs made of this machine's memory, and the rules by which NCCL moves what lies on them.

No test here has two GPUs. A `Pretended` tensor says that it lies on one, refuses to be mixed with
tensors on the CPU, and computes on the CPU; `nccl` puts in the place of torch's functions some that
take no other tensors, know no tags, and work through the bundles of a rank one after the other, as
on a stream. Not pretended: kernels, streams of several devices, the watchdog's clock.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from queue import SimpleQueue
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

GPU = torch.device("cuda:0")
#: What moves between a GPU and a CPU.
_MOVES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)


class Pretended(Tensor):
    """A tensor on `GPU` whose numbers lie in `held`, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Pretended:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=GPU
        )
        made.held = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            return Pretended(args[0].held[args[1]])
        # Here torch would ask the driver for the device, before it looks at the tensor's kind.
        if func is Tensor.__setitem__:
            _held(args[0])[args[1]] = _held(args[2])
            return None
        if func is Tensor.copy_ and isinstance(args[0], Pretended):
            args[0].held.copy_(_held(args[1]))
            return args[0]
        if func is Tensor.contiguous:
            return Pretended(args[0].held.contiguous())
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __repr__(self) -> str:
        return f"Pretended({self.held!r})"


def _held(one: Any) -> Any:
    return one.held if isinstance(one, Pretended) else one


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors: list[Tensor] = []
    tree_map(lambda one: tensors.append(one) if isinstance(one, Tensor) else None, (args, kwargs))
    there = any(isinstance(one, Pretended) for one in tensors)
    asked = kwargs.get("device")
    if there and func not in _MOVES:
        apart = [one for one in tensors if not isinstance(one, Pretended) and one.ndim]
        assert not apart, f"{func} of tensors on a GPU and on the CPU: {apart}"
    result = torch.device(asked).type == "cuda" if asked is not None else there
    if func is _MOVES[0]:
        result = isinstance(args[0], Pretended)
    if asked is not None:
        kwargs = {**kwargs, "device": "cpu"}
    args_in, kwargs_in = tree_map(_held, (args, kwargs))
    found = func(*args_in, **kwargs_in)
    if tensors and found is getattr(args[0], "held", args[0]):  # in place
        return args[0]
    wrap = (lambda one: Pretended(one) if isinstance(one, Tensor) else one) if result else None
    return found if wrap is None else tree_map(wrap, found)


class OnGpu(TorchDispatchMode):
    """Within, in this thread, what is made on a GPU is pretended."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Op(NamedTuple):
    op: Any
    tensor: Tensor
    peer: int
    group: Any
    tag: int = 0


class _Work:
    """Of one bundle. NCCL's own `wait` holds nobody up, unless it is told for how long."""

    def __init__(self) -> None:
        self.done, self.error = threading.Event(), None

    def wait(self, timeout: timedelta | None = None) -> None:
        assert timeout is not None, "without a time only the stream waits, and the process goes on"
        if not self.done.wait(timeout.total_seconds()):
            raise RuntimeError("Watchdog caught collective operation timeout: it timed out")
        if self.error is not None:
            raise RuntimeError(self.error)


class _Stream:
    """Runs what is asked for in turn: a bundle begins when the one before it has ended."""

    def __init__(self, group: Any) -> None:
        self.group, self.asked = group, SimpleQueue()
        threading.Thread(target=self._serve, daemon=True).start()

    def ask(self, ops: list[_Op]) -> _Work:
        work = _Work()
        self.asked.put((ops, work))
        return work

    def _serve(self) -> None:
        while True:
            ops, work = self.asked.get()
            try:
                begun = [self._begin(one) for one in ops]
                for one in begun:
                    one.wait()
            except RuntimeError as error:
                work.error = str(error)
            work.done.set()

    def _begin(self, one: _Op) -> Any:
        move = self.group.send if one.op is dist.isend else self.group.recv
        return move([one.tensor.held], one.peer, 99)  # type: ignore[attr-defined]


@contextmanager
def nccl(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Within, groups of threads move by these rules what lies on GPUs; counts of bundles."""
    streams: dict[int, _Stream] = {}
    counts = {"bundles": 0, "connected": 0}

    def batch(ops: list[_Op]) -> list[_Work]:
        assert ops, "NCCL knows no bundle of nothing"
        for one in ops:
            assert isinstance(one.tensor, Pretended), "NCCL moves what lies on GPUs only"
            assert one.tensor.is_contiguous() and one.tensor.numel()
            assert one.op in (dist.isend, dist.irecv) and one.group is ops[0].group
            assert one.peer != one.group.rank(), "a rank sends nothing to itself"
        pairs = [(one.op, one.peer) for one in ops]
        assert len(set(pairs)) == len(pairs), "two messages of one way could be taken for another"
        group = ops[0].group
        assert id(group) in streams, "the first exchange of a group wants all of its ranks"
        counts["bundles"] += 1
        return [streams[id(group)].ask(ops)]

    def all_reduce(tensor: Tensor, *, group: Any, async_op: bool) -> _Work:
        assert isinstance(tensor, Pretended) and async_op
        mine = torch.ones(1, dtype=torch.int64, device="cpu")
        group.allgather([[torch.empty_like(mine) for _ in range(group.size())]], [mine]).wait()
        streams[id(group)] = _Stream(group)
        counts["connected"] += 1
        work = _Work()
        work.done.set()
        return work

    monkeypatch.setattr(dist, "batch_isend_irecv", batch)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "P2POp", _Op)
    monkeypatch.setattr(dist, "get_global_rank", lambda _group, peer: peer)
    monkeypatch.setattr(torch.cuda, "device", lambda _device: nullcontext())
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)  # whom a factory asks for a GPU
    yield counts

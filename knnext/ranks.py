"""Processes that work on one thing together, by torch.distributed: their numbers, their exchanges.

A `Ranks` is what one process sees of a group, or of itself alone. Tensors travel by gloo from and
to the CPU, by NCCL between GPUs. Every wait ends: an answer that does not come within `timeout`
seconds, or whose sender has gone, is a `RankLostError`, in one sentence.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from knnext.errors import RankFailedError, RankLostError
from knnext.launch import DEFAULT_TIMEOUT, launched, local_rank

__all__ = [
    "DEFAULT_TIMEOUT",
    "RankFailedError",
    "RankLostError",
    "Ranks",
    "joined",
    "launched",
    "local_rank",
]

Made = TypeVar("Made")

_DONE, _FAILED, _BUSY = range(3)  # what a rank says of its part of a common work
#: Of the time between two signs of life, what a rank that gets on has spent in the processor:
#: less than reading a disk takes, or looking twice a second at what others have done.
_AWAKE = 1e-4


@contextmanager
def joined(device: str = "cpu", timeout: float = DEFAULT_TIMEOUT) -> Iterator[Ranks]:
    """Within, the processes that torchrun started are one group; a process alone is one rank.

    Args:
        device: where tensors that are exchanged lie: "cuda" or "cuda:1" brings NCCL beside gloo.
        timeout: seconds, for the ranks to find each other, and of every exchange.

    A group that is there already is used and left. After an error nobody is waited for.
    """
    if launched()[1] == 1 or dist.is_initialized():
        yield Ranks(dist.group.WORLD if dist.is_initialized() else None, timeout=timeout)
        return
    backend, where = "cpu:gloo", torch.device(device)
    if where.type == "cuda":
        # NCCL takes the current device for this rank's.
        torch.cuda.set_device(local_rank() if where.index is None else where.index)
        backend = "cpu:gloo,cuda:nccl"
        # Else a thread of NCCL ends the process as soon as another is lost, before it can say so.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    lost = True
    try:
        with _sentence(timeout, "finding each other"):
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
            found = Ranks(dist.group.WORLD, timeout=timeout)
            found.gather([0])  # gloo connects pairs of ranks when first asked to
        yield found
        lost = False
    finally:
        if dist.is_initialized():
            _leave(lost and where.type == "cuda")


class Ranks:
    """One process's view of a group of processes: its number, and exchanges with the others.

    Args:
        group: of torch.distributed; None: the process alone, whatever groups there are.
        timeout: seconds that any one exchange may take.

    Attributes:
        rank, size: this process's number, and how many there are.
        sent, received: bytes of tensors that `exchange` has moved to and from others.
    """

    def __init__(self, group: Any = None, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout must be above 0 seconds, got {timeout!r}")
        self.group: Any = group
        self.timeout: float = float(timeout)
        self.rank: int = 0 if group is None else group.rank()
        self.size: int = 1 if group is None else group.size()
        self.sent: int = 0
        self.received: int = 0
        self._cpu_group = _with_gloo(group, self.timeout)

    @property
    def name(self) -> str:
        return f"rank {self.rank} of {self.size}"

    def gather(self, numbers: Sequence[int]) -> list[list[int]]:
        """Equally many int64 numbers of every rank, in the order of the ranks."""
        mine = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        if self.size == 1:
            return [mine.tolist()]
        from torch._C._distributed_c10d import AllgatherOptions  # which has no public name

        found = [torch.empty_like(mine) for _ in range(self.size)]
        # By the group's own limit it would go on after this rank has given up, and hold up its end.
        options = AllgatherOptions()
        options.timeout = timedelta(seconds=self.timeout)
        with self.waiting("comparing notes"):
            self._wait(self._cpu_group.allgather([found], [mine], options))
        return [one.tolist() for one in found]

    def all_or_none(self, what: str, make: Callable[[], Made]) -> Made:
        """What `make` gives, once it has ended on every rank; an error of one is one of all.

        It may take any time, as long as it gets on: a rank that is at it says so in time, and one
        that has used no processor since is no longer waited for. `make` exchanges nothing.
        """
        if self.size == 1:
            return make()
        with _Beating(self):
            try:
                made = make()
            except Exception as error:
                failure: Exception | None = error
            else:
                failure = None
        state = _DONE if failure is None else _FAILED
        states = self.gather([state])
        while [_BUSY] in states:
            states = self.gather([state])
        if failure is not None:
            raise failure
        failed = [rank for rank, (flag,) in enumerate(states) if flag]
        if failed:
            raise RankFailedError(f"rank {failed[0]} of {self.size} failed in {what}; it says why")
        return made

    def gather_tensor(self, mine: Tensor) -> list[Tensor]:
        """A CPU tensor of every rank; their first sizes may differ, and nothing else."""
        counts = [count for (count,) in self.gather([len(mine)])]
        found = [mine.new_empty(count, *mine.shape[1:]) for count in counts]
        found[self.rank] = mine
        self.exchange(
            [(peer, mine) for peer in self.others],
            [(peer, found[peer]) for peer in self.others],
        ).wait()
        return found

    def gather_text(self, text: str) -> list[str]:
        """A text of every rank."""
        data = torch.frombuffer(bytearray(text.encode() + b"\0"), dtype=torch.uint8)
        return [bytes(one.tolist())[:-1].decode() for one in self.gather_tensor(data)]

    @property
    def others(self) -> list[int]:
        """The other ranks, from the next one on, so that not all ask the same one at first."""
        return [(self.rank + step) % self.size for step in range(1, self.size)]

    def exchange(
        self,
        sends: Sequence[tuple[int, Tensor]],
        receives: Sequence[tuple[int, Tensor]],
        tag: int = 0,
    ) -> Exchange:
        """Begin to send contiguous tensors to ranks and to fill others from them; `wait` ends it.

        A receiver knows the shape of what comes, and where that is empty nothing does. What goes
        from one rank to another under one tag comes in the order in which it was sent.
        """
        sends = [(peer, tensor) for peer, tensor in sends if tensor.numel()]
        receives = [(peer, tensor) for peer, tensor in receives if tensor.numel()]
        self.sent += sum(tensor.nbytes for _, tensor in sends)
        self.received += sum(tensor.nbytes for _, tensor in receives)
        with self.waiting("beginning an exchange"):
            return Exchange(self, self._begin(sends, receives, tag), [*sends, *receives])

    def _begin(
        self, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]], tag: int
    ) -> list[Any]:
        moved = [*sends, *receives]
        if moved and moved[0][1].is_cuda:
            # Only as one bundle are sends and receives of NCCL free of each other's order. It knows
            # no tags, and goes by the order of the bundles, which is the same on all ranks.
            ops = [(dist.irecv, one) for one in receives] + [(dist.isend, one) for one in sends]
            with torch.cuda.device(moved[0][1].device):  # a bundle is of the current device
                return dist.batch_isend_irecv(
                    [
                        dist.P2POp(op, tensor, dist.get_global_rank(self.group, peer), self.group)
                        for op, (peer, tensor) in ops
                    ]
                )
        group = self._cpu_group
        return [group.recv([tensor], peer, tag) for peer, tensor in receives] + [
            group.send([tensor], peer, tag) for peer, tensor in sends
        ]

    def _wait(self, work: Any) -> None:
        work.wait(timedelta(seconds=self.timeout))

    def waiting(self, what: str) -> Any:
        """Within, the many ways in which torch says that a rank is lost are one sentence."""
        return _sentence(self.timeout, what)

    def connect(self, device: torch.device) -> None:
        """NCCL wants all ranks in its first exchange, also those that have nothing to send."""
        with self.waiting("connecting GPUs"):
            self._wait(
                dist.all_reduce(
                    torch.zeros(1, dtype=torch.float32, device=device),
                    group=self.group,
                    async_op=True,
                )
            )

    def has_nccl(self) -> bool:
        """Whether the group can exchange what lies on GPUs."""
        return self.group is not None and "cuda:nccl" in _backends(self.group)


class _Beating:
    """Within, a thread says in time that this rank is at work, where it has worked since."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._ended = ranks, threading.Event()
        self._lost: RankLostError | None = None
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._ended.set()
        if kind is None:  # an interrupt waits for nobody
            self._thread.join()
            if self._lost is not None:
                raise self._lost

    def _beat(self) -> None:
        wait, before = self._ranks.timeout / 4, _processor_seconds()
        while not self._ended.wait(wait):
            now = _processor_seconds()
            if now - before >= _AWAKE * wait:
                try:
                    self._ranks.gather([_BUSY])
                except RankLostError as error:
                    self._lost = error
                    return
            before = now


def _processor_seconds() -> float:
    """That all threads of this process have spent."""
    return time.process_time()


class Exchange:
    """An exchange under way. Its tensors are held, and must not be touched, until `wait` ends."""

    def __init__(self, ranks: Ranks, works: list[Any], held: Any) -> None:
        self._ranks, self._works, self._held = ranks, works, held

    def wait(self) -> None:
        """Until everything has come and gone."""
        with self._ranks.waiting("an exchange"):
            for work in self._works:
                self._ranks._wait(work)
        self._works, self._held = [], None


def _leave(at_once: bool) -> None:
    """The end of the group; `at_once`: of one with NCCL in which something is still under way."""
    abort = getattr(dist.distributed_c10d, "_abort_process_group", None)
    if at_once and abort is not None:
        abort()  # to destroy it would wait for what never comes
    else:
        dist.destroy_process_group()


@contextmanager
def _sentence(timeout: float, what: str) -> Iterator[None]:
    try:
        yield
    except (RankLostError, RankFailedError):
        raise
    except RuntimeError as error:  # also DistError and its kin, of which there is no full list
        text = re.sub(r"^\[[^]]*] *", "", " ".join(str(error).split())).partition(". ")[0]
        late = "time" in text.lower() and "out" in text.lower()
        cause = f"one did not answer within {timeout:g} s" if late else "one has gone"
        raise RankLostError(
            f"lost the other ranks in {what}: {cause}; what is on disk is whole, run the same "
            f"command again (torch says: {text[:120]})"
        ) from error


def _backends(group: Any) -> str:
    if isinstance(group, dist.ProcessGroup):
        return str(dist.get_backend_config(group))
    return f"cpu:{group.name()}"  # a bare backend, which no registry knows


def _with_gloo(group: Any, timeout: float) -> Any:
    """The group, where it moves what lies on CPUs; else one of the same ranks that does."""
    if group is None or "cpu:gloo" in _backends(group):
        return group
    return dist.new_group(
        dist.get_process_group_ranks(group),
        timeout=timedelta(seconds=timeout),
        backend="gloo",
        use_local_synchronization=True,
    )

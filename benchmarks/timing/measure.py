"""Times one implementation and writes beside it what its time means.

On a GPU by `benchmarks.timing.gpu`; on a CPU by the host's clock over a fixed number of rounds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.data.cases import Implementation
from benchmarks.timing import limits
from benchmarks.timing.gpu import GpuSampler
from benchmarks.timing.turns import Turns

Run = Callable[[], Any]
PACKAGES = (
    *("torch", "knnext", "faiss-gpu", "faiss-cpu", "cuvs-cu12", "cuvs-cu13"),
    *("scalable-vs", "usearch", "scann"),
)


@dataclass(frozen=True)
class Work:
    """The least that a call must do: bytes moved to or from memory, once each, and operations.

    `memory` says which measured bandwidth bounds the bytes: "read" for ops that read far more than
    they write, "copy" for the others.
    """

    bytes: float
    flop: float = 0.0
    memory: str = "copy"
    dtype: torch.dtype = torch.float32

    def least_seconds(self, device: str) -> float:
        facts = limits.as_facts(device, self.dtype)
        arithmetic = 1e-12 * self.flop / facts["limit_tflops"] if self.flop else 0.0
        return max(arithmetic, 1e-9 * self.bytes / facts[f"limit_{self.memory}_gbps"])

    def rates(self, seconds: float, device: str) -> dict[str, float]:
        facts = limits.as_facts(device, self.dtype)
        gbps = 1e-9 * self.bytes / seconds
        return {
            "bytes": self.bytes,
            "flop": self.flop,
            "gbps": gbps,
            "tflops": 1e-12 * self.flop / seconds,
            "share_of_limit": self.least_seconds(device) / seconds,
            "share_of_read": gbps / facts["limit_read_gbps"],
            "share_of_copy": gbps / facts["limit_copy_gbps"],
        }


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Of the packages that are installed, and of CUDA."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    found.setdefault("torch", torch.__version__)
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def kernels() -> str:
    """Which CUDA kernels of knnext this process runs, as far as its environment says."""
    return "sm90" if os.environ.get("KNNEXT_SM90") == "1" else "portable"


class Memory:
    """Device memory that a call takes beyond its inputs, results counted.

    torch's allocator tells the peak. What allocates past torch is seen from outside only: by how
    much the free memory fell from before its index was built to after its first call.
    """

    def __init__(self, device: str, own_memory: bool) -> None:
        self.device, self.own = device, own_memory
        if device == "cuda":
            torch.cuda.empty_cache()  # FAISS and cuVS cannot use what torch keeps
            self.before = self._taken()

    def _taken(self) -> int:
        torch.cuda.synchronize()
        if not self.own:
            return torch.cuda.memory_allocated()
        free, total = torch.cuda.mem_get_info()
        return total - free - torch.cuda.memory_reserved()

    def watch(self, run: Run) -> tuple[Any, dict[str, Any]]:
        """(what the call returns, facts to note)."""
        if self.device != "cuda":
            return run(), {}
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        result = run()
        peak = torch.cuda.max_memory_allocated() - held
        if self.own:
            peak += max(0, self._taken() - self.before)
        return result, {"peak_memory": peak, "peak_memory_by": "device" if self.own else "torch"}


class Measure:
    """The fixture: `measure(runs, implementation=..., work=..., group=..., **facts)`."""

    def __init__(self, benchmark: Any, device: str) -> None:
        self.benchmark, self.device = benchmark, device

    @property
    def enabled(self) -> bool:
        """False with --benchmark-disable."""
        return not self.benchmark.disabled

    def __call__(
        self,
        runs: Sequence[Run],
        *,
        implementation: Implementation,
        work: Work,
        group: str,
        rounds: int = 7,
        beside: Run | None = None,
        **facts: Any,
    ) -> float | None:
        """Median seconds of a call; None where nothing is timed.

        `beside` is knnext's own call at this shape: on a CPU the two take turns, and the row keeps
        how many times knnext's time it took.
        """
        self.benchmark.group = f"{group} {self.device}"
        if not self.enabled:
            self.benchmark.pedantic(runs[0])
            return None
        if self.device == "cuda":
            sampler = GpuSampler(runs, implementation.capturable).prepare()
            self.benchmark.pedantic(sampler.round, rounds=sampler.rounds)
            facts |= {"timing": sampler.timing, "rotations": len(runs), "calls": sampler.calls}
        else:
            facts |= self._on_host(runs[0], rounds, beside)
        if implementation.approximate:
            facts["approximate"] = True
        seconds = float(self.benchmark.stats.stats.median)
        self.benchmark.extra_info.update(
            facts,
            device=self.device,
            device_name=device_name(self.device),
            kernels=kernels() if self.device == "cuda" else "cpu",
            versions=versions(),
            **work.rates(seconds, self.device),
            **limits.as_facts(self.device, work.dtype),
        )
        return seconds

    def _on_host(self, run: Run, rounds: int, beside: Run | None) -> dict[str, Any]:
        facts = {"timing": "host", "threads": torch.get_num_threads()}
        if beside is None:
            self.benchmark.pedantic(run, rounds=rounds, warmup_rounds=1)
            return facts
        turns = Turns(beside)
        self.benchmark.pedantic(run, setup=turns, rounds=turns.rounds(run, rounds))
        return facts | {"times_knnext": turns.ratio(self.benchmark.stats.stats.data)}

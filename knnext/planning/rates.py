"""How fast a machine is, and who says so: measured here and kept, or stated by a datasheet.

Rates that `knnext doctor --rates` measured lie in the user's cache, one file a machine: a home that
many machines share mixes nothing up. Each says when and on what it was measured.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from knnext.datastore.meta import installed_version
from knnext.output import write_json

MAGIC, FORMAT_VERSION = "knnext-rates", 1
STALE_DAYS = 30
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
DTYPES = ("float16", "bfloat16", "float32")

#: Every rate that a plan may want: its unit and what it is. One of a rank is of one GPU, or of all
#: cores of a node where there is none.
NAMES: dict[str, tuple[str, str]] = {
    "forward": ("FLOP/s", "forward pass of a model, a rank"),
    **{
        f"search_flops.{t}": ("FLOP/s", f"search of {t} keys, many queries, a rank") for t in DTYPES
    },
    **{f"search_bytes.{t}": ("B/s", f"search of {t} keys, one query, a rank") for t in DTYPES},
    "codes_flops": ("FLOP/s", "search by codes, many queries, a rank"),
    "codes_bytes": ("B/s", "search by codes, one query, a rank"),
    "encode": ("numbers/s", "encoding of keys, a node"),
    "memory_read": ("B/s", "reading memory, a node"),
    "host_to_device": ("B/s", "copies from memory to a GPU"),
    "checksum": ("B/s", "checksums of what is written, a process"),
    "disk_write": ("B/s", "writing a disk to its end"),
    "disk_read": ("B/s", "reading a disk"),
    "network": ("B/s", "between nodes, one way, a rank"),
    "link": ("B/s", "between ranks of a node, one way, a rank"),
    "latency": ("s", "a message between ranks"),
    "faiss_train": ("FLOP/s", "k-means of FAISS, a node"),
    "faiss_add": ("FLOP/s", "adding rows to a FAISS index, a node"),
    "faiss_scan": ("B/s", "codes that a FAISS search goes through, a node"),
}


@dataclass(frozen=True)
class Machine:
    """What rates are of. Bytes of memory: of a node, and of one GPU (0 where there is none)."""

    name: str
    cores: int
    memory: int
    gpu: str = ""
    gpus: int = 0
    gpu_memory: int = 0
    vector_path: str = ""

    @property
    def key(self) -> str:
        """A file name: another machine, or this one with other parts, has another."""
        found = "\n".join(f"{name}={value}" for name, value in sorted(asdict(self).items()))
        return hashlib.blake2b(found.encode(), digest_size=6).hexdigest()

    def describe(self) -> str:
        """For people, in a line."""
        cards = f", {self.gpus} x {self.gpu}" if self.gpus else ""
        return f"{self.name}, {self.cores} cores, {self.memory / 2**30:,.0f} GiB{cards}"


@dataclass(frozen=True)
class Rate:
    """``source`` says where the value is from; ``measured``: by a clock, not by a datasheet."""

    value: float
    source: str
    measured: bool


@dataclass(frozen=True)
class Rates:
    """The rates of a machine by name; `created` is when they were measured, or ""."""

    machine: Machine
    rates: Mapping[str, Rate]
    created: str = ""
    knnext_version: str = ""

    def __getitem__(self, name: str) -> float:
        return self.rates[name].value

    def over(self, stated: Rates) -> Rates:
        """These, with what they lack from ``stated``."""
        return replace(self, rates={**stated.rates, **self.rates})

    def aged(self, now: datetime | None = None) -> str:
        """Why they may no longer hold, or ""."""
        if not self.created:
            return ""
        then = datetime.fromisoformat(self.created)
        days = ((now or datetime.now(timezone.utc)) - then).days
        if days > STALE_DAYS:
            return f"they were measured {days} days ago"
        if self.knnext_version != installed_version():
            return f"they are of knnext {self.knnext_version}, this is {installed_version()}"
        return ""

    def to_json(self) -> dict[str, Any]:
        return {
            "magic": MAGIC,
            "format_version": FORMAT_VERSION,
            "created": self.created,
            "knnext_version": self.knnext_version,
            "machine": asdict(self.machine),
            "rates": {name: asdict(rate) for name, rate in self.rates.items()},
        }


def this_machine() -> Machine:
    """As its operating system and torch describe it."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    card = torch.cuda.get_device_properties(0) if gpus else None
    return Machine(
        _processor(),
        torch.get_num_threads(),
        _memory(),
        "" if card is None else str(card.name),
        gpus,
        0 if card is None else int(card.total_memory),
        _vector_path(),
    )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n"):
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _memory() -> int:
    """Bytes of the machine, or of the container that this process may not leave."""
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return 0
    try:
        limit = _CGROUP_LIMIT.read_text(encoding="ascii").strip()
    except OSError:  # no such limit here
        return found
    return min(found, int(limit)) if limit.isdigit() else found


def _vector_path() -> str:
    try:
        from knnext._host import cpu_isa

        return str(cpu_isa())
    except (ImportError, RuntimeError):
        return ""


# On disk


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/knnext/rates``, or the same in ``~/.cache``."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    # The specification has relative paths passed over.
    base = Path(given) if given and Path(given).is_absolute() else Path("~/.cache").expanduser()
    return base / "knnext" / "rates"


def kept_path(machine: Machine) -> Path:
    return cache_folder() / f"{machine.key}.json"


def keep(rates: Rates) -> Path:
    """Write what was measured for later plans on this machine."""
    path = kept_path(rates.machine)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, rates.to_json())
    return path


def read_rates(path: str | Path) -> Rates:
    """FileNotFoundError, or ValueError that names the file where it holds no rates."""
    path = Path(path)
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        if body["magic"] != MAGIC or body["format_version"] != FORMAT_VERSION:
            raise ValueError(f"it is {body['magic']!r} of version {body['format_version']!r}")
        found = {name: Rate(**rate) for name, rate in body["rates"].items()}
        unknown = sorted(set(found) - set(NAMES))
        if unknown:
            raise ValueError(f"there is no rate {unknown[0]!r}")
        for name, rate in found.items():
            if not (isinstance(rate.value, int | float) and 0 < rate.value < math.inf):
                raise ValueError(f"{name} is {rate.value!r}, want a number above 0")
        rates = Rates(Machine(**body["machine"]), found, body["created"], body["knnext_version"])
        rates.aged()  # a date that is none would fail later
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is not what `knnext doctor --rates` writes: {reason}") from None
    return rates

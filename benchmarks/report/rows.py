"""Rows of benchmark JSON, whichever of two forms it has.

pytest-benchmark's own, from --benchmark-json; and the short one of --store, which keeps medians and
facts and leaves out the samples and what tells machines apart.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_SIZES = "QNDkVm"
_DTYPES = ("float16", "bfloat16", "float32")
#: What identifies a shape, in the order in which it is written.
AXES = ("Q", "N", "D", "m", "k", "V", "dtype", "keys")


@dataclass(frozen=True)
class Row:
    """One implementation at one shape. `facts` holds what was measured beside the time."""

    op: str
    implementation: str
    device: str
    seconds: float
    facts: dict[str, Any] = field(hash=False)

    @property
    def shape(self) -> tuple[tuple[str, Any], ...]:
        return tuple((axis, self.facts[axis]) for axis in AXES if axis in self.facts)

    @property
    def group(self) -> tuple[str, str, tuple[tuple[str, Any], ...]]:
        """Rows that may be compared."""
        return self.device, self.op, self.shape

    @property
    def approximate(self) -> bool:
        """Trades recall for time: the search's bytes and work are not its."""
        return bool(self.facts.get("approximate", "ivf" in self.implementation))

    def __getitem__(self, name: str) -> Any:
        return self.facts.get(name)


@dataclass(frozen=True)
class Source:
    """Where rows come from: day, versions, machine."""

    name: str
    date: str
    machine: dict[str, Any]


def read(path: Path) -> tuple[Source, list[Row]]:
    """ValueError where the file is no benchmark JSON."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = content["benchmarks"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no benchmark JSON: {error!r}") from None
    if "machine_info" in content:
        machine = _machine(content["machine_info"])
        rows = [_full_row(entry) for entry in entries]
        return Source(path.name, content["datetime"][:10], machine), rows
    rows = [_short_row(entry) for entry in entries]
    return Source(path.name, content["date"], content["machine"]), rows


def _machine(info: dict[str, Any]) -> dict[str, Any]:
    cpu = info.get("cpu", {})
    kept = {"cpu": cpu.get("brand_raw", info.get("machine", "")), "threads": info.get("threads")}
    kept |= {name: info[name] for name in ("gpu", "gpu_memory", "kernels") if name in info}
    return kept | info.get("versions", {})


def _full_row(entry: dict[str, Any]) -> Row:
    params = entry["params"]
    facts = dict(entry["extra_info"])
    return Row(
        facts.pop("op", entry["group"].split()[0]),
        _named(params["implementation"], facts),
        params["device"],
        entry["stats"]["median"],
        facts,
    )


def _named(implementation: str, facts: dict[str, Any]) -> str:
    """Rows of the Hopper kernels stand beside those of the portable ones."""
    ours = implementation.startswith("knnext")
    return f"{implementation} (sm90)" if ours and facts.get("kernels") == "sm90" else implementation


def _short_row(entry: dict[str, Any]) -> Row:
    op, *_, device = entry["group"].split()
    facts = dict(entry["extra_info"])
    shape = _parsed(facts.get("shape", ""))
    if "gflops" in facts:  # before rates were kept in TFLOP/s
        facts["tflops"] = 1e-3 * facts.pop("gflops")
        facts["limit_tflops"] = 1e-3 * facts.pop("limit_gflops")
        facts["limit_read_gbps"] = facts.pop("limit_gbps")
    return Row(op, entry["implementation"], device, entry["median_s"], shape | facts)


def _parsed(text: str) -> dict[str, Any]:
    """`Q1-N65536-D1024-k1024-float16` in parts."""
    facts: dict[str, Any] = {}
    for part in text.split("-"):
        match = re.fullmatch(rf"([{_SIZES}])(\d+)", part)
        if match:
            facts[match[1]] = int(match[2])
        elif part in _DTYPES:
            facts["dtype"] = part
        elif part:
            facts["keys"] = part
    if "N" in facts and "D" in facts and "k" in facts:
        facts.setdefault("keys", "gaussian")
    return facts


def with_gemm_shares(rows: Iterable[Row]) -> list[Row]:
    """Rows of before the share was measured get it from the bare product's row."""
    rows = list(rows)
    product = {r.group: r.seconds for r in rows if r.implementation == "bare_product"}
    for row in rows:
        if "share_of_gemm" not in row.facts and row.group in product:
            row.facts["share_of_gemm"] = product[row.group] / row.seconds
    return rows


def short_form(path: Path, command: str) -> dict[str, Any]:
    """What is kept in the repository of a pytest-benchmark file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    source, _ = read(path)
    return {
        "date": source.date,
        "command": command,
        "machine": source.machine,
        "benchmarks": [_short_entry(entry) for entry in content["benchmarks"]],
    }


def _short_entry(entry: dict[str, Any]) -> dict[str, Any]:
    stats = entry["stats"]
    times = {f"{name}_s": _rounded(stats[name]) for name in ("median", "min", "max")}
    facts = {name: _rounded(value) for name, value in entry["extra_info"].items()}
    facts.pop("versions", None)  # the machine's entry has them
    return {
        "group": entry["group"],
        "implementation": _named(entry["params"]["implementation"], facts),
        **times,
        "rounds": stats["rounds"],
        "extra_info": facts,
    }


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value

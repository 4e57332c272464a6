"""What an experiment found, as plain JSON: claim, figures, agreement, settings, machine."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from knnext.output import write_json

FORMAT_VERSION = 1
Agreement = Literal["agrees", "agrees in part", "disagrees", "undecided"]


@dataclass(frozen=True)
class PaperFigure:
    """A number or statement of the paper, and how far it can be trusted.

    `source`: `"code"` (read in the published repository), `"digest"` (second-hand) or
    `"recalled"` (unverified; reports mark it).
    """

    text: str
    source: Literal["code", "digest", "recalled"]


@dataclass(frozen=True)
class Description:
    """What an experiment asks.

    Attributes:
        name: as in the catalog.
        title: a few words.
        question: one sentence.
        claim: what the paper says, in our words.
        varies: the settings of the family that move.
        paper: its figures.
        section: of the notes on the paper, for people.
    """

    name: str
    title: str
    question: str
    claim: str
    varies: str
    paper: tuple[PaperFigure, ...] = ()


@dataclass
class Findings:
    """What `run` of an experiment returns.

    Attributes:
        rows: the table, one dict a row, the same names in each; plain values.
        agreement: with the paper's claim.
        words: one or two sentences: what was found, with its figures and interval.
        headline: the one figure for the report's table, such as `"-5.2 % [-6.1, -4.3]"`.
        series: what the plot needs, plain values.
        details: anything else worth keeping.
    """

    rows: list[dict[str, Any]]
    agreement: Agreement
    words: str
    headline: str
    series: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


def make_result(
    description: Description, findings: Findings, preset: dict[str, Any], seconds: dict[str, float]
) -> dict[str, Any]:
    """The content of an experiment's JSON file."""
    return {
        "format_version": FORMAT_VERSION,
        **asdict(description),
        **asdict(findings),
        "preset": preset,
        "seconds": seconds,
        "versions": versions(),
        "machine": machine(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def save_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result; what is not finite becomes null."""
    write_json(path, plain(result))


def load_result(path: Path) -> dict[str, Any]:
    """Read what `save_result` wrote. ValueError for anything else."""
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = result["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not hold an experiment's result: {error!r}") from None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version}, this knnext reads {FORMAT_VERSION}")
    return result


def plain(value: Any) -> Any:
    """The value as JSON holds it: lists, dicts, None for what is not finite."""
    if isinstance(value, dict):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(entry) for entry in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in (
        "knnext",
        "torch",
        "transformers",
        "tokenizers",
        "faiss-cpu",
        "faiss-gpu",
        "numpy",
    ):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """What the experiment ran on."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def percent(log_gain: float) -> str:
    """A gain in log perplexity as a change of perplexity: 0.1 becomes `-9.5 %`."""
    return f"{100 * math.expm1(-log_gain) + 0.0:+.1f} %"


def percent_interval(gain: float, low: float, high: float) -> str:
    """`percent` of a gain with its interval: `-9.5 % [-11.3, -7.7]`."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return percent(gain)
    return f"{percent(gain)} [{_change(high):+.1f}, {_change(low):+.1f}]"


def _change(log_gain: float) -> float:
    return 100 * math.expm1(-log_gain) + 0.0  # -0.0 + 0.0 is 0.0: no gain is no loss

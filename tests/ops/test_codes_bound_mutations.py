"""Each margin of what codes say is needed: without it a bound is a little too high, and is seen.

A mutation is a change of one text in the sources; what it breaks is counted in a scene.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.ops.code_bounds import (
    CODES,
    CSRC,
    NEEDS,
    back,
    coded,
    compiled,
    errors_too_small,
    linked,
    mean,
    planted_rows,
    run,
    said,
)

pytestmark = NEEDS


def planted_violations(library: ctypes.CDLL, metric: str) -> int:
    count = 0
    for path in ("plain", "avx2"):
        queries, keys = planted_rows(library, path, metric)
        got = said(library, path, queries, keys, torch.zeros(1024), metric, True)
        count += got.violations()
    return count


def large_norms(library: ctypes.CDLL) -> int:
    """Pairs at the bound, of the largest norms that their codes can have."""
    dim = 1024
    way = torch.randint(0, 2, (8, dim)).double() * 2 - 1
    key, query = 126 * way - 0.49 * way, 124 * way
    step = 127 / run(library.code_query_limit, 0, dim)
    query = (query / step).round() * step + 0.49 * step * way
    key[:, 0] = query[:, 0] = 127
    got = said(library, "plain", back(query), back(key), torch.zeros(dim), "l2", True)
    return got.violations()


def far(library: ctypes.CDLL, metric: str) -> int:
    """Far from the origin; products with the center, whose own margin is wide, are small."""
    keys = 100 + torch.randn(400, 64)
    queries = keys[:40] * (torch.tensor([1.0, -1.0]).repeat(32) if metric == "ip" else 1)
    return said(library, "plain", queries, keys, mean(keys), metric).violations()


def of_rows(library: ctypes.CDLL, flush: bool) -> int:
    # At 2^-121 the first factor of a transform takes every element of 4096 below 2^-126.
    rows = 2.0**-121 * torch.randn(100, 4096) if flush else coded(100, 1024)
    return errors_too_small(library, rows, torch.zeros(rows.shape[1]), flush)


#: Where a bound that is too high is seen; each counts what it sees.
SCENES: dict[str, Callable[[ctypes.CDLL], int]] = {
    "at the bound": lambda library: planted_violations(library, "l2"),
    "at the bound, ip": lambda library: planted_violations(library, "ip"),
    "large norms": large_norms,
    "far": lambda library: far(library, "l2"),
    "far, ip": lambda library: far(library, "ip"),
    "rotation": lambda library: of_rows(library, False),
    "subnormals": lambda library: of_rows(library, True),
}


#: (file, what stands there, what is put in its place, where that is seen)
MUTATIONS: list[tuple[str, str, str, str]] = [
    ("encoder", "error * (1 + 0x1p-20)", "error * 0.99", "at the bound"),
    ("bound", "kErrorMargin = 1 + 0x1p-10", "kErrorMargin = 1 - 0x1p-8", "at the bound"),
    ("bound", "kErrorMargin = 1 + 0x1p-10", "kErrorMargin = 0.99", "at the bound, ip"),
    ("bound", "query.error = up(stats.error", "query.error = up(0 * stats.error", "at the bound"),
    ("bound", "stats[i].error * static_cast<float>(kErrorMargin)", "0.0f", "at the bound"),
    ("bound", "stats[i].error * static_cast<float>(kErrorMargin)", "0.0f", "at the bound, ip"),
    ("bound", "up(query.error + query.own_reach", "up(query.own_reach", "at the bound, ip"),
    ("bound", "up(stats.norm * kErrorMargin)", "0.99f * stats.norm", "at the bound, ip"),
    ("bound", "kNormMargin = 1 - 0x1p-18", "kNormMargin = 1 + 0x1p-18", "large norms"),
    ("bound", "up(squares * rounding_ + floor_)", "up(floor_)", "far"),
    ("bound", "(reach + center_norm_)", "reach", "far"),
    ("bound", "expanded + direct + 64 * kUnit", "0", "far, ip"),
    ("bound", "(root + query.error) * kRootMargin", "root * kRootMargin", "at the bound"),
    ("bound", "-up(2 * u)", "-up(1.98 * u)", "at the bound"),
    ("rotation", "return 2 * (log2_of(width_) + 4) * 0x1p-24", "return 0", "rotation"),
    ("rotation", "return 8 * (std::sqrt(width) + 1)", "return (32 + 0 * width)", "subnormals"),
    ("loops_plain", "kHigh = 1 + 0x1p-20f", "kHigh = 1 - 0x1p-8f", "at the bound"),
    ("loops_plain", "kLow = 1 - 0x1p-20f", "kLow = 1 + 0x1p-8f", "at the bound"),
]  # fmt: skip


def mutated(objects: dict[str, str], folder: Path, file: str, old: str, new: str) -> ctypes.CDLL:
    """The library with one file's text changed; loops.h is a text of loops_plain.cpp."""
    text = (CSRC / CODES / f"{file}.cpp").read_text()
    loops = (CSRC / CODES / "loops.h").read_text()
    text = text.replace('#include "cpu/codes/loops.h"', loops.replace("#pragma once", ""))
    assert text.count(old) == 1, f"{file} no longer says {old}"
    source = folder / "mutated.cpp"
    source.write_text(text.replace(old, new))
    level = "-O1" if file == "loops_plain" else "-O0"
    made = compiled(source, folder / "mutated.o", ["-Wno-unused"], level)
    return linked({**objects, CODES + file: made}, folder / "mutated.so")


def test_all_is_well_before_a_mutation(library: ctypes.CDLL) -> None:
    assert not any(scene(library) for scene in SCENES.values())


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: re.sub(r"\W+", "_", f"{m[0]} {m[2]}"))
def test_a_bound_a_little_too_high_is_seen(
    objects: dict[str, str], tmp_path: Path, mutation: tuple[str, str, str, str]
) -> None:
    file, old, new, where = mutation
    assert SCENES[where](mutated(objects, tmp_path, file, old, new)) > 0

"""Where memory ends: one plain sentence with op, bytes, device and shape, and the op goes on after.

On the CPU it is a RuntimeError, as of torch's own allocator; on CUDA torch.OutOfMemoryError.
"""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

from knnext import _host
from tests.ops.mixing_cases import ROOT

PRELUDE = """
import resource, torch, knnext
torch.set_num_threads(2)
d, t = torch.rand(2, 8), torch.randint(0, 9, (2, 8))
eye = torch.eye(9, 5)
rows = 1 << 22
thin, ids = torch.zeros(1, 1).expand(rows, 1), torch.zeros(1, 1).long().expand(rows, 1)
half = torch.ones(rows, dtype=torch.float16)  # 8 MiB; as a parameter it becomes float64
columns = torch.rand(1 << 12, 1 << 11).t()  # 32 MiB, no row of it contiguous

def small():
    return [*knnext.knn_search(eye, eye, 3), knnext.knn_softmax(d, t, 1.0, 9),
            *knnext.merge_topk(d, t, 3), knnext.rescore(eye[:2], eye, t)]

before = small()
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (24 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

def attempt(call):
    try:
        call()
        print("it went well")
    except Exception as error:
        print(type(error).__name__, error)
"""
AFTER = "print(all(torch.equal(a, b) for a, b in zip(small(), before)))\n"


def wanted(op: str, amount: str, what: str) -> str:
    return rf"RuntimeError knnext::{op}: out of memory on cpu: {amount} wanted for {what}"


def tensor(op: str, amount: str, sizes: str, dtype: str = "float32") -> str:
    return wanted(op, amount, rf"an? {dtype} tensor of shape \({sizes}\)")


TIB_4, TIB_8 = r"4398046511104 bytes \(4 TiB\)", r"8796093022208 bytes \(8 TiB\)"
MANY = str(2**40)
COPY = "a contiguous copy of an? .*"
CASES = {
    "knnext.knn_softmax(d[:1], t[:1], 1.0, 2**40)": tensor("knn_softmax", TIB_4, f"1, {MANY}"),
    "knnext.knn_softmax(d, t, torch.ones(2), 2**40)": tensor("knn_softmax", TIB_8, f"2, {MANY}"),
    "torch.ops.knnext.knn_softmax(d[:1].double(), t[:1], 1.0, 2**40)": tensor(
        "knn_softmax", TIB_8, f"1, {MANY}", "float64"
    ),
    "knnext.knn_softmax(d, t, 1.0, 2**62)": tensor("knn_softmax", "32 EiB", f"2, {2**62}"),
    "knnext.knn_search(eye[:1], eye, 2**40)": tensor("knn_search", TIB_4, f"1, {MANY}"),
    "torch.ops.knnext.knn_search(eye[:2], eye, 2**40, 'ip')": tensor(
        "knn_search", TIB_8, f"2, {MANY}"
    ),
    "knnext.knn_search(eye, eye, 2**63 - 1)": tensor("knn_search", "288 EiB", f"9, {2**63 - 1}"),
    "knnext.merge_topk(d[:1], t[:1], 2**40)": tensor("merge_topk", TIB_4, f"1, {MANY}"),
    "knnext.encode_keys(thin[:1].expand(2**40, 1), torch.zeros(1))": tensor(
        "encode_keys", r"1099511627776 bytes \(1 TiB\)", f"{MANY}, 1", "int8"
    ),
    "knnext.key_sqnorms(thin[:1].expand(2**40, 1))": tensor("key_sqnorms", TIB_4, f"{MANY},"),
    "knnext.knn_interpolate(thin[:1].expand(2, 2**40), d, t, 1.0, 0.5)": wanted(
        "knn_interpolate", TIB_8, ".*"
    ),
    "knnext.rescore(eye, eye, t[:1, :1].expand(9, 2**40))": wanted(
        "rescore", r"\d+ bytes \(72 TiB\)", COPY
    ),
    "knnext.knn_softmax(columns, ids[:2048].expand(2048, 4096), 1.0, 2)": wanted(
        "knn_softmax", r"33554432 bytes \(32 MiB\)", COPY
    ),
    "knnext.knn_target_log_prob(thin, ids, ids[:, 0], half)": (
        "RuntimeError knnext::knn_target_log_prob: out of memory on cpu for the op's own work"
    ),
}


def test_what_cannot_be_had_is_said_in_a_sentence() -> None:
    calls = "".join(f"attempt(lambda: {call})\n" for call in CASES)
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + calls + AFTER], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    *said, after = done.stdout.splitlines()
    assert after == "True", "the ops work on"
    for call, line in zip(CASES, said, strict=True):
        assert re.fullmatch(CASES[call], line), f"{call}\n{line}\n{CASES[call]}"


def test_on_cuda_it_is_an_error_of_its_own() -> None:
    """The ops' way to raise it, without the device."""
    with pytest.raises(torch.OutOfMemoryError, match=r"^knnext::knn_search: out of memory$"):
        _host.raise_out_of_memory("knnext::knn_search: out of memory")

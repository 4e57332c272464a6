"""Runs every mixing and search op but the search once; test_races.py watches it.

The thread sanitizer takes fibers for threads and barriers (not shuffles or votes) for what orders
them: two accesses to one place, one of them a write, without a barrier between them are reported.
"""

from __future__ import annotations

import sys

import torch

from tests.emulator import ops
from tests.emulator.build import call, load


def forget_a_barrier() -> None:
    call(load().emulate_sum, 1, torch.ones(1, 128), torch.empty(1), 1, 128, True)


def run_all() -> None:
    distances = torch.rand(1, 300) * 9
    tokens = torch.randint(-1, 20, (1, 300))
    ops.knn_softmax(distances, tokens, 2.0, 1003)
    ops.knn_interpolate(torch.randn(1, 1003).half(), distances, tokens, 2.0, 0.3)
    ops.knn_interpolate(torch.randn(1, 9003).half(), distances, tokens, 2.0, 0.3)  # split
    targets = tokens[:, 0].contiguous()
    log_p = ops.knn_target_log_prob(distances, tokens, targets, 2.0)
    grad, logits = torch.randn(1, 1003), torch.randn(1, 1003).half()
    mixed = ops.knn_interpolate(logits, distances, tokens, 2.0, 0.3)
    ops.knn_softmax_gradients(grad, distances, tokens, 2.0)
    ops.knn_target_log_prob_gradients(grad[:, 0], distances, tokens, targets, log_p, 2.0)
    ops.knn_interpolate_gradients(grad, logits, distances, tokens, mixed, 2.0, 0.3)
    for m, k in ((300, 300), (4100, 64)):
        ops.merge_topk(torch.randint(0, 9, (1, m)).float(), torch.randperm(m)[None], k)
    ops.merge_topk(torch.ones(1, 4100), torch.arange(1025).repeat(4)[None], 64)
    keys = torch.randn(20, 65).half()
    ops.key_sqnorms(keys)
    indices = torch.randint(-1, 20, (2, 9))
    ops.rescore(keys[:2], keys, indices)
    order = indices.reshape(-1).sort(stable=True).indices
    ops.rescore_gradients(torch.randn(2, 9), keys[:2], keys, indices, order)


if __name__ == "__main__":
    forget_a_barrier() if "--forget" in sys.argv else run_all()

"""A call gives back every byte: no kind of argument or result leaks, nor a call that fails.

1e5 calls of an op whose string argument leaked 58 bytes grew by 5.8 MB. What does not leak grows by
624 bytes at most, whatever the number of calls: a thousand calls tell the two apart.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import knnext  # noqa: F401  (registers the ops)
from tests.ops.memory import allocated_bytes

CALLS = 5000
q, x = torch.rand(1, 2), torch.rand(3, 2)
ids = torch.zeros(1, 1, dtype=torch.int64)
one, row = torch.ones(1, 1), torch.ones(1)
grad = torch.ones(1, 2)
ops = torch.ops.knnext
near = (q[:, :1], ids)  # a result to go on from
many = torch.rand(8, 2)
coded = (*ops.encode_keys.default(many, q[0]), q[0])

#: By kind: strings, optional tensors given and not, numbers, tensors for numbers, several results.
KINDS: dict[str, Callable[[], object]] = {
    "string": lambda: ops.rescore.default(q, x, ids, "ip"),
    "string_by_default": lambda: ops.rescore.default(q, x, ids),
    "optional_tensors": lambda: ops.knn_search.default(
        q, x, 1, "l2", key_sqnorms=x[:, 0].contiguous(), init_distances=near[0],
        init_indices=near[1],
    ),
    "no_optional_tensors": lambda: ops.knn_search.default(q, x, 1, "l2", refine=True),
    "encode_keys": lambda: ops.encode_keys.default(many, q[0]),
    "search_by_codes": lambda: ops.knn_search_codes.default(
        q, many, *coded, 1, "ip", init_distances=near[0], init_indices=near[1]
    ),
    "several_results": lambda: ops.merge_topk.default(q[:, :1], ids, 1),
    "numbers": lambda: ops.knn_softmax.default(one, ids, 1.5, 2),
    "tensors_for_numbers": lambda: ops.knn_softmax.tensor(one, ids, row, 2),
    "string_and_optional_tensor": lambda: ops._rescore_gradients.default(
        one, q, x, ids, None, "l2", True
    ),
}  # fmt: skip


def grown(call: Callable[[], object], calls: int) -> int:
    for _ in range(500):
        call()
    before = allocated_bytes()
    for _ in range(calls):
        call()
    return allocated_bytes() - before


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_leaks_nothing(kind: str) -> None:
    assert grown(KINDS[kind], CALLS) < CALLS, "less than a byte a call"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.rescore.default(q, x, ids, "cosine"), "metric must be"),
        (lambda: ops.merge_topk.default(one, ids, 0), "k must be"),
        (lambda: ops.knn_softmax.tensor(one, ids, -row, 2), "temperature must be"),
        (lambda: ops.rescore.default(q, x, ids + 9, "l2"), "indices"),
    ],
)
def test_a_failed_call_leaks_nothing(call: Callable[[], object], message: str) -> None:
    def fails() -> None:
        with pytest.raises(RuntimeError, match=message):
            call()

    calls = CALLS // 5
    assert grown(fails, calls) < 8 * calls, "less than a pointer a call"

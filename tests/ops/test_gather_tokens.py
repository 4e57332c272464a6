"""gather_tokens: -1 stays -1, the last row is not read for it."""

from __future__ import annotations

import pytest
import torch

import knnext


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_padding_stays_padding(dtype: torch.dtype) -> None:
    values = torch.tensor([10, 11, 262143], dtype=dtype)
    indices = torch.tensor([[0, -1, 2], [-1, -1, 1]])
    got = knnext.gather_tokens(values, indices)
    assert got.dtype == dtype and got.tolist() == [[10, -1, 262143], [-1, -1, 11]]


def test_empty_sizes() -> None:
    none = torch.zeros(0, dtype=torch.int32)
    assert knnext.gather_tokens(none, torch.full((2, 3), -1)).tolist() == [[-1] * 3] * 2
    assert knnext.gather_tokens(none + 1, torch.zeros(0, 3).long()).shape == (0, 3)


def test_follows_a_search_that_found_too_few() -> None:
    keys, values = torch.randn(3, 4), torch.tensor([7, 8, 9])
    _, indices = knnext.knn_search(keys[:2], keys, 5)
    tokens = knnext.gather_tokens(values, indices)
    assert tokens[:, 0].tolist() == [7, 8] and (tokens[:, 3:] == -1).all()


@pytest.mark.parametrize(
    ("values", "indices", "match"),
    [
        (torch.zeros(3).short(), torch.zeros(1, 1).long(), "values must be an int32 or int64"),
        (torch.zeros(3, 1).long(), torch.zeros(1, 1).long(), r"of shape \(3, 1\)"),
        (torch.zeros(3).long(), torch.zeros(1, 1).int(), "indices must be int64"),
    ],
)
def test_bad_arguments(values, indices, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        knnext.gather_tokens(values, indices)


@pytest.mark.parametrize("index", [3, -2])
def test_an_index_out_of_range_is_refused(index: int) -> None:
    with pytest.raises((IndexError, RuntimeError)):
        knnext.gather_tokens(torch.zeros(3).long(), torch.tensor([[0, index]]))


def test_compiles_as_one_graph() -> None:
    compiled = torch.compile(knnext.gather_tokens, fullgraph=True, backend="aot_eager")
    values, indices = torch.arange(5), torch.tensor([[0, -1], [4, 2]])
    assert torch.equal(compiled(values, indices), knnext.gather_tokens(values, indices))

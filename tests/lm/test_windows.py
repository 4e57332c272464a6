"""The grid of windows: every position once, none across documents, no token read too often."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knnext.lm.windows import Windows, build_stride, check_documents, half_stride


def given_positions(windows: Windows) -> list[int]:
    pairs = zip(windows.gives.tolist(), windows.ends.tolist(), strict=True)
    return [position for first, last in pairs for position in range(first, last)]


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), max_size=7),
    block=st.integers(1, 20),
    stride=st.integers(1, 20),
    batch_size=st.integers(1, 4),
    apart=st.booleans(),
    full_last=st.booleans(),
    one_length=st.booleans(),
)
def test_each_position_once(
    lengths: list[int],
    block: int,
    stride: int,
    batch_size: int,
    apart: bool,
    full_last: bool,
    one_length: bool,
) -> None:
    stride, offsets = min(stride, block), np.cumsum([0, *lengths])
    length = int(offsets[-1])
    documents = offsets if apart else None
    windows = Windows.over(length, block, stride, documents, full_last=full_last)
    assert given_positions(windows) == list(range(max(0, length - 1)))
    read = windows.ends - windows.begins
    assert (windows.begins <= windows.gives).all() and (read <= block).all()
    assert windows.num_read == read.sum()
    of = np.searchsorted(offsets if apart else [0], np.arange(length), side="right")
    for begin, end, head in zip(windows.begins, windows.ends, windows.heads, strict=True):
        assert of[begin] == of[end - 1]
        assert head == (begin == 0 or of[begin - 1] != of[begin])
    behind = 0
    for shelf in windows.shelves(batch_size):
        assert shelf[0] == behind < shelf[1]
        behind = shelf[1]
        batches = list(windows.batches(shelf, batch_size, one_length=one_length))
        assert sorted(np.concatenate(batches).tolist()) == list(range(*shelf))
        for batch in batches:
            assert len(batch) * read[batch].max() <= max(batch_size * block, block)
            assert not one_length or len(set(read[batch].tolist())) == 1
    assert behind == len(windows)


def test_a_window_by_hand() -> None:
    windows = Windows.over(12, 4, 3, np.array([0, 5, 5, 12]))
    assert windows.begins.tolist() == [0, 3, 5, 8]
    assert windows.ends.tolist() == [4, 5, 9, 11]
    assert windows.gives.tolist() == [0, 4, 5, 9]
    assert windows.heads.tolist() == [True, False, True, False]
    assert windows.reads == pytest.approx((4 + 2 + 4 + 3) / 11)
    full = Windows.over(12, 4, 3, np.array([0, 5, 5, 12]), full_last=True)
    assert full.begins.tolist() == [0, 1, 5, 7] and full.gives.tolist() == windows.gives.tolist()
    # 6 tokens and the mark of the next document: its state has a window of its own
    full = Windows.over(9, 4, 4, np.array([0, 7, 9]), full_last=True)
    assert full.begins.tolist() == [0, 2, 3, 7] and full.ends.tolist() == [4, 6, 7, 8]
    assert full.gives.tolist() == [0, 4, 6, 7]
    assert full.heads.tolist() == [True, False, False, True]


@pytest.mark.parametrize("block", [1, 2, 3, 5, 7, 64, 1000, 1023, 1024, 4096])
def test_a_build_reads_no_token_more_than_a_third_again(block: int) -> None:
    for length in (2, block, block + 1, block + 2, 2 * block, 30 * block + 1):
        assert Windows.over(length, block, build_stride(block)).reads <= 1.34
    if block % 2 == 0:
        assert Windows.over(30 * block + 1, block, half_stride(block)).reads <= 2
    documents = np.cumsum([0, 3, block // 2, block, block + 1, 5 * block])
    windows = Windows.over(int(documents[-1]), block, build_stride(block), documents)
    assert windows.reads <= 1.34


def test_little_is_filled_up_where_lengths_differ() -> None:
    """As many cells are computed as tokens are read, and an eighth more at most."""
    lengths = np.random.default_rng(0).lognormal(5.5, 1.0, size=3000).astype(int) + 1
    windows = Windows.over(int(lengths.sum()), 512, 384, np.cumsum([0, *lengths]))
    read = windows.ends - windows.begins
    cells = sum(
        len(batch) * read[batch].max()
        for shelf in windows.shelves(8)
        for batch in windows.batches(shelf, 8)
    )
    assert cells < 1.125 * windows.num_read


@pytest.mark.parametrize(
    "places", [[0, 4], [1, 5], [0, 3, 2, 5], [0.0, 5.0], [], [[0, 5]], [0, 5, 6]]
)
def test_places_that_are_none(places: list[object]) -> None:
    with pytest.raises(ValueError, match=r"separate_documents must be the places .*, 5; got"):
        check_documents(places, 5)

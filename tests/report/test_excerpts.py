"""Which text the page shows first: no copy, no half words, a token that tells something."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from knnext.evaluation.scores import StreamScores
from knnext.evaluation.spans import Span, excerpt_head, excerpt_tail
from knnext.report.copies import copied_runs
from knnext.report.excerpts import choose_excerpts, telling_token


def planted(documents: list[tuple[int, list[tuple[int, int]]]], k: int = 3) -> StreamScores:
    """Documents of so many tokens, in each the runs (start, stop) that are copies.

    A copied token's last neighbor continues the copy; all other neighbors are of other tokens.
    """
    generator = torch.Generator().manual_seed(0)
    n = sum(size for size, _ in documents)
    targets = torch.randint(10, 1000, (n,), generator=generator)
    rows = torch.randint(0, 10**6, (n, k), generator=generator) * 2
    tokens = torch.full((n, k), 5, dtype=torch.int32)
    ids, start = [], 0
    for number, (size, runs) in enumerate(documents):
        ids += [number] * size
        for first, last in runs:
            place = torch.arange(start + first, start + last)
            rows[place, k - 1] = 10**7 + place
            tokens[place, k - 1] = targets[place].int()
        start += size
    return StreamScores(
        torch.full((n,), -3.0), targets, torch.tensor(ids), torch.zeros(n, dtype=torch.bool),
        torch.arange(k).float().expand(n, k).contiguous(), tokens, rows,
        [f"d{i}" for i in range(len(documents))],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("size", "copies", "expected"),
    [
        (40, [(5, 25)], {(5, 25): 20}),
        (40, [(5, 20)], {}),  # 15 tokens are how people write
        (40, [(0, 16)], {(0, 16): 16}),
        (60, [(0, 17), (30, 60)], {(0, 17): 17, (30, 60): 30}),
        (20, [(0, 20)], {(0, 20): 20}),
        (1, [(0, 1)], {}),
    ],
)
def test_copies_are_found_and_their_length(
    size: int, copies: list[tuple[int, int]], expected: dict[tuple[int, int], int]
) -> None:
    wanted = [0] * size
    for (first, last), length in expected.items():
        wanted[first:last] = [length] * (last - first)
    assert copied_runs(planted([(size, copies)])).tolist() == wanted


def test_a_copy_must_go_on_row_by_row() -> None:
    scores = planted([(40, [(0, 40)])])
    assert scores.indices is not None
    scores.indices[20:, -1] += 1  # from here on another place of the datastore
    assert copied_runs(scores).tolist() == [20] * 40
    scores.indices[10:, -1] += 1
    assert copied_runs(scores).tolist() == [0] * 20 + [20] * 20


def test_the_first_excerpt_is_no_copy() -> None:
    """A document that is a licence, one that begins with one, and one of its own."""
    scores = planted([(100, [(0, 100)]), (100, [(0, 40)]), (100, [])])
    chosen = choose_excerpts(scores, 3, 50)
    assert [excerpt.document for excerpt in chosen] == [1, 2, 0]
    assert [excerpt.copied for excerpt in chosen] == [0, 0, 1]
    assert int(chosen[0].positions[0]) >= 140  # past its licence
    assert int(chosen[1].positions[0]) == 225  # where nothing is a copy, the middle


def test_a_licence_with_other_names_in_it_is_no_first_excerpt() -> None:
    """No run of it is a copy's 16 tokens, and it is in phrases of the datastore all the same."""
    licence = [(start, start + 11) for start in range(0, 100, 12)]
    scores = planted([(100, licence), (100, [(0, 7), (20, 27)])])
    assert not copied_runs(scores).any()
    chosen = choose_excerpts(scores, 2, 100)
    assert [excerpt.document for excerpt in chosen] == [1, 0]
    assert chosen[0].copied == 0 and chosen[1].copied > 0.8


def test_the_page_opens_at_a_whole_word() -> None:
    texts = [" so", "ftware", " datast", "ore", " neighbors", "."] * 4
    gains = torch.tensor([1.0, 9.0, 8.0, 7.0, 2.0, 5.0] * 4)
    assert texts[telling_token(texts, gains, torch.zeros(24))] == " neighbors"
    parts = ["ftware", "ore"] * 3  # where no word is whole, a part will do
    assert telling_token(parts, torch.arange(6.0), torch.zeros(6)) == 4


def test_the_same_text_is_shown_once() -> None:
    scores = planted([(30, []), (30, []), (30, [])])
    scores.targets[30:60] = scores.targets[:30]
    assert [excerpt.document for excerpt in choose_excerpts(scores, 3, 30)] == [0, 2]


@pytest.mark.parametrize("sizes", [[], [5], [5, 3]])
def test_few_and_short_documents(sizes: list[int]) -> None:
    scores = planted([(size, []) for size in sizes])
    chosen = choose_excerpts(scores, 12, 256)
    assert [len(excerpt.positions) for excerpt in chosen] == sizes[:1]


def test_the_page_opens_at_a_word_that_is_no_copy() -> None:
    texts = [" the", " licence", "(", " neighbor", " of", " datastore", "\n"] * 3
    gains = torch.tensor([0.1, 9.0, 8.0, 1.0, 0.5, 2.0, 5.0] * 3)
    runs = torch.tensor([0, 20, 20, 0, 0, 0, 0] * 3)
    assert texts[telling_token(texts, gains, runs)] in (" neighbor", " datastore")
    assert telling_token(["(", ")"], torch.tensor([0.0, 1.0]), torch.tensor([0, 0])) == 0
    assert telling_token([" word"], torch.tensor([-1.0]), torch.tensor([30])) == 0
    infinite = torch.tensor([math.nan, -math.inf, 1.0])
    assert telling_token([" one", " two", " three"], infinite, torch.zeros(3)) in (0, 1, 2)


@pytest.mark.parametrize(
    ("text", "cut", "head", "tail"),
    [
        ("te this software", True, "… this software", "te this …"),
        ("te this software", False, "te this software", "te this software"),
        (" whole words ", True, "… whole words ", " whole words …"),
        ("amSpecKwargs(self)\n", True, "…(self)\n", "amSpecKwargs(self)\n…"),
        ("word", True, "…word", "word…"),  # what is nothing else stays
        ("", True, "…", "…"),
        ("naïve 漢字 ends", True, "… 漢字 ends", "naïve 漢字 …"),
        ("\n    def f(", True, "…\n    def f(", "\n    def f(…"),
    ],
)
def test_cut_text_shows_it_and_begins_at_a_word(text: str, cut: bool, head: str, tail: str) -> None:
    assert (excerpt_head(text, cut), excerpt_tail(text, cut)) == (head, tail)
    assert Span(0, text, "x", text, "", cut, cut).excerpt == (head, tail)


def test_spans_know_where_they_were_cut(tmp_path: Any) -> None:
    from knnext.datastore import Datastore
    from knnext.evaluation.spans import neighbor_spans

    class Words:
        def decode(self, ids: list[int], **options: Any) -> str:
            return " ".join(map(str, ids))

    with Datastore.create(tmp_path / "s", 2) as writer:
        for name in ("a", "b"):
            writer.append(torch.zeros(9, 2), torch.arange(9), [(name, 9)])
    store = Datastore.open(tmp_path / "s")
    spans = neighbor_spans(store, Words(), torch.arange(18), before=3, after=2)
    for i, span in enumerate(spans):
        place = i % 9
        assert span.cut_before == (place > 3), i
        assert span.cut_after == (place < 6), i

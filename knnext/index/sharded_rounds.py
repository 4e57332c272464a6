"""One search of all ranks: rounds of queries to every shard and of answers back.

Every rank knows from what all asked for how many rounds there are and what comes in each, so
nothing is sent but tensors of known shapes. A shard whose search fails goes on answering, with NaN
for distances, which no search gives: all ranks come to the end together, and each raises there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from knnext.index.queries import QueryGroup
from knnext.index.row_set import ALL_ROWS, Range, RowSet
from knnext.index.sharded_sets import labels_of, pack, unpack
from knnext.ops import merge_topk
from knnext.ranks import Exchange, RankFailedError, Ranks

if TYPE_CHECKING:
    from knnext.index.exact import ExactIndex
    from knnext.index.faiss import FaissIndex

SEARCHING, FINISHED, FAILED = 0, 1, 2  # states of a rank
_QUERIES, _SETS, _DISTANCES, _INDICES = 1, 2, 3, 4  # tags
NEIGHBOR_BYTES = 12  # a float32 distance and an int64 index


class Request(NamedTuple):
    """What a rank asks for in a search, as it tells the others: four numbers.

    `groups` are those of its queries that may find different rows; 0: all may find all.
    """

    state: int
    queries: int = 0
    k: int = 0
    groups: int = 0

    @classmethod
    def of(cls, groups: Sequence[QueryGroup], queries: int, k: int) -> Request:
        """A search of so many queries."""
        everything = all(group.kept.everything for group in groups)
        return cls(SEARCHING, queries, k, 0 if everything else len(groups))


@dataclass
class _Asked:
    """The queries of all ranks in one round, side by side, and the group of its rank of each."""

    queries: Tensor
    labels: Tensor
    coming: list[Exchange]


class Rounds:
    """The rounds of one search, of which this rank knows what all ranks ask for.

    Args:
        local: the index of this rank's rows, None where it has none.
        bounds: the rows at which the shards begin, and the end of the last.
        device: where what is exchanged lies.
        num_bytes: of memory for the exchange.
        most_queries: of all ranks in a round, if there is a limit beside that of memory.
    """

    def __init__(
        self,
        ranks: Ranks,
        requests: list[Request],
        *,
        local: ExactIndex | FaissIndex | None,
        bounds: list[int],
        device: torch.device,
        num_bytes: int,
        most_queries: int | None,
    ) -> None:
        self.ranks, self.requests, self.local, self.device = ranks, requests, local, device
        self.bounds = bounds
        self.rows = [stop - start for start, stop in pairwise(bounds)]
        self.first_row = bounds[ranks.rank]
        self.mine = requests[ranks.rank]
        self.k = max(one.k for one in requests)
        self.num_bytes, self.most_queries = num_bytes, most_queries
        self._error: Exception | None = None
        self._failed: set[int] = set()

    def run(self, queries: Tensor, groups: Sequence[QueryGroup]) -> tuple[Tensor, Tensor]:
        """The k nearest of (Q, dim) queries in the keys' dtype, on their device, in groups."""
        step = self._step(queries.shape[1] * queries.element_size())
        num_rounds = -(-max(one.queries for one in self.requests) // step)
        sets, labels = self._sets(groups), labels_of(groups, len(queries))
        shape = (len(queries), self.mine.k)
        distances = queries.new_full(shape, float("inf"), dtype=torch.float32)
        indices = queries.new_full(shape, -1, dtype=torch.int64)
        asked = self._ask(0, step, queries, labels) if num_rounds else None
        before: _Answers | None = None
        for number in range(num_rounds):
            assert asked is not None
            for exchange in asked.coming:
                exchange.wait()
            after = None
            if number + 1 < num_rounds:
                after = self._ask(number + 1, step, queries, labels)
            answers = self._answer(number, step, asked, sets)
            if before is not None:
                self._take(before, distances, indices)
            asked, before = after, answers
        if before is not None:
            self._take(before, distances, indices)
        self._raise()
        return distances, indices

    # How much at a time

    def columns(self, shard: int, k: int) -> int:
        """Neighbors that a shard can answer with."""
        return min(k, self.rows[shard])

    def _step(self, query_bytes: int) -> int:
        """Queries a rank in a round: two rounds are under way, and one is merged."""
        asking = max(1, sum(one.queries > 0 for one in self.requests))
        gathered = asking * (query_bytes + NEIGHBOR_BYTES * self.k)
        answered = NEIGHBOR_BYTES * sum(self.columns(s, self.k) for s in range(self.ranks.size))
        step = self.num_bytes // (2 * gathered + 3 * answered)
        if self.most_queries is not None:
            step = min(step, self.most_queries // asking)
        return max(1, step)

    def _part(self, rank: int, number: int, step: int) -> Range:
        count = self.requests[rank].queries
        return min(number * step, count), min((number + 1) * step, count)

    def _counts(self, number: int, step: int) -> list[int]:
        parts = (self._part(rank, number, step) for rank in range(self.ranks.size))
        return [stop - start for start, stop in parts]

    # To the shards

    def _shards(self) -> list[int]:
        """The other ranks that hold rows."""
        return [peer for peer in self.ranks.others if self.rows[peer]]

    def _askers(self) -> list[int]:
        """The other ranks, where this one has rows to search."""
        return self.ranks.others if self.rows[self.ranks.rank] else []

    def _sets(self, groups: Sequence[QueryGroup]) -> dict[int, list[RowSet]]:
        """By rank what its groups may find of this shard, of ranks that leave rows out."""
        mine = {
            shard: pack(groups, *self.bounds[shard : shard + 2])
            for shard in range(self.ranks.size if self.mine.groups else 0)
            if self.rows[shard]
        }
        here = mine.pop(self.ranks.rank, None)
        asking = [peer for peer in self._askers() if self.requests[peer].groups]
        sizes = {peer: torch.empty(1, dtype=torch.int64, device="cpu") for peer in asking}
        told = [
            (shard, torch.tensor([len(words)], dtype=torch.int64, device="cpu"))
            for shard, words in mine.items()
        ]
        self.ranks.exchange(told, list(sizes.items()), _SETS).wait()
        coming = {
            peer: torch.empty(int(size), dtype=torch.int64, device="cpu")
            for peer, size in sizes.items()
        }
        self.ranks.exchange(list(mine.items()), list(coming.items()), _SETS).wait()
        if here is not None:
            coming[self.ranks.rank] = here
        rows = self.rows[self.ranks.rank]
        return {peer: unpack(words, rows) for peer, words in coming.items()}

    def _ask(self, number: int, step: int, queries: Tensor, labels: Tensor) -> _Asked:
        """Send this rank's queries of a round to all shards, and make room for the others'."""
        counts = self._counts(number, step)
        total = sum(counts) if self.rows[self.ranks.rank] else counts[self.ranks.rank]
        room = torch.empty(total, queries.shape[1], dtype=queries.dtype, device=self.device)
        groups = torch.zeros(total, dtype=torch.int64, device="cpu")
        here = counts if self.rows[self.ranks.rank] else [total]
        at = self.ranks.rank if self.rows[self.ranks.rank] else 0
        parts, lists = list(room.split(here)), list(groups.split(here))
        part = slice(*self._part(self.ranks.rank, number, step))
        parts[at].copy_(queries[part])
        coming = [
            self.ranks.exchange(
                [(peer, parts[at]) for peer in self._shards()],
                [(peer, parts[peer]) for peer in self._askers()],
                _QUERIES,
            )
        ]
        lists[at].copy_(labels[part])
        told = [p for p in self._askers() if self.requests[p].groups > 1]
        tell = self._shards() if self.mine.groups > 1 else []
        if told or tell:
            coming.append(
                self.ranks.exchange(
                    [(peer, lists[at]) for peer in tell],
                    [(peer, lists[peer]) for peer in told],
                    _SETS,
                )
            )
        return _Asked(room, groups, coming)

    # And back

    def _answer(
        self, number: int, step: int, asked: _Asked, sets: dict[int, list[RowSet]]
    ) -> _Answers:
        """Search this shard, send each rank what it asked for, make room for others' answers."""
        counts = self._counts(number, step)
        rank = self.ranks.rank
        start, stop = self._part(rank, number, step)
        found = {
            shard: (
                torch.empty(counts[rank], width, dtype=torch.float32, device=self.device),
                torch.empty(counts[rank], width, dtype=torch.int64, device=self.device),
            )
            for shard in self._shards()
            for width in [self.columns(shard, self.mine.k)]
        }
        sends: dict[int, tuple[Tensor, Tensor]] = {}
        if self.rows[rank] and sum(counts):
            both = self._search(asked, counts, sets)
            cut = [tensor.split(counts) for tensor in both]
            for peer in range(self.ranks.size):
                width = self.columns(rank, self.requests[peer].k)
                distances, indices = (parts[peer][:, :width].contiguous() for parts in cut)
                sends[peer] = distances, indices
            found[rank] = sends.pop(rank)
        coming = [
            self.ranks.exchange(
                [(peer, pair[which]) for peer, pair in sends.items()],
                [(shard, pair[which]) for shard, pair in found.items() if shard != rank],
                tag,
            )
            for which, tag in ((0, _DISTANCES), (1, _INDICES))
        ]
        return _Answers(start, stop, found, coming)

    def _search(
        self, asked: _Asked, counts: list[int], sets: dict[int, list[RowSet]]
    ) -> tuple[Tensor, Tensor]:
        """(n, k) of all ranks' queries of a round in this shard, by rows of the whole."""
        assert self.local is not None
        try:
            if self._error is not None:
                raise self._error
            groups = _groups(asked.labels, counts, sets)
            device = getattr(self.local, "device", torch.device("cpu"))
            wide = self.columns(self.ranks.rank, self.k)
            distances, indices = self.local.search_groups(asked.queries.to(device), wide, groups)
            indices = torch.where(indices >= 0, indices + self.first_row, indices)
            return distances.to(self.device), indices.to(self.device)
        except Exception as error:  # the others wait for an answer, whatever it is
            self._error = error
            shape = (len(asked.queries), self.columns(self.ranks.rank, self.k))
            nan = torch.full(shape, float("nan"), dtype=torch.float32, device=self.device)
            return nan, torch.full(shape, -1, dtype=torch.int64, device=self.device)

    def _take(self, answers: _Answers, distances: Tensor, indices: Tensor) -> None:
        """Merge what all shards found for this rank's queries of a round."""
        for exchange in answers.coming:
            exchange.wait()
        if answers.start == answers.stop or not answers.found:
            return
        for shard, (found, _) in answers.found.items():
            if bool(found[:, 0].isnan().any()):
                self._failed.add(shard)
        pairs = [pair for _, pair in sorted(answers.found.items())]
        part = slice(answers.start, answers.stop)
        distances[part], indices[part] = merge_topk(
            torch.cat([found for found, _ in pairs], dim=1),
            torch.cat([rows for _, rows in pairs], dim=1),
            self.mine.k,
        )

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
        if self._failed:
            raise RankFailedError(
                f"rank {min(self._failed)} of {self.ranks.size} failed in searching its rows; "
                "it says why"
            )


def _groups(labels: Tensor, counts: list[int], sets: dict[int, list[RowSet]]) -> list[QueryGroup]:
    """The queries of all ranks by what they may find of this shard."""
    everything: list[Tensor] = []
    groups: list[QueryGroup] = []
    begin = 0
    for rank, count in enumerate(counts):
        here = torch.arange(begin, begin + count, device="cpu")
        if rank not in sets:
            everything.append(here)
        for number, kept in enumerate(sets.get(rank, [])):
            which = here[labels[begin : begin + count] == number]
            if len(which):
                groups.append(QueryGroup(which, kept))
        begin += count
    if not groups:
        return [QueryGroup(None, ALL_ROWS)]
    if any(len(one) for one in everything):
        groups.append(QueryGroup(torch.cat(everything), ALL_ROWS))
    return groups


@dataclass
class _Answers:
    """What the shards find for this rank's queries `[start, stop)`, by shard, as it comes."""

    start: int
    stop: int
    found: dict[int, tuple[Tensor, Tensor]]
    coming: list[Exchange]

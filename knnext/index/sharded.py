"""Exact search of a datastore whose rows are divided among processes.

Each rank of a torch.distributed group holds a run of rows and has queries of its own. Queries
travel to all ranks, the k nearest rows of each run come back, and the rank that asked merges them:
in order of (distance, index), which is the order of every search here, so that the answer is that
of one process to the last bit, wherever the rows are cut. Keys never travel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from knnext.index.base import TokenTable
from knnext.index.exact import ExactIndex
from knnext.index.filter import Filter
from knnext.index.queries import check_count, check_k, prepare_queries
from knnext.index.sharded_rounds import FAILED, FINISHED, Request, Rounds
from knnext.index.wanted import wanted_rows
from knnext.ranks import DEFAULT_TIMEOUT, RankFailedError, Ranks, local_rank
from knnext.say import binary_size

if TYPE_CHECKING:
    from knnext.datastore import Datastore
    from knnext.index.faiss import FaissIndex


@dataclass(frozen=True)
class ShardRecall:
    """What FAISS on every shard finds of the true neighbors, over the queries of all ranks.

    Attributes:
        num_queries: queries that were searched both ways.
        k: neighbors compared.
        recall: share of the true k nearest rows that were found.
    """

    num_queries: int
    k: int
    recall: float


class ShardedIndex(TokenTable):
    """The neighbors of each rank's own queries among the rows that all ranks hold together.

    Every method that searches is collective: all ranks of the group call it, each with queries of
    its own, also none (within `together`, as often as each likes). The answers are those of
    `ExactIndex` over the whole datastore, in every bit. Without a group, or alone in one, it
    is that.

    Traffic: a rank sends its queries to each other rank, Q x dim keys' bytes, and gets from each
    shard Q x min(k, rows of the shard) x 12 bytes. Memory beyond the shard's own search, whatever
    Q: at most `exchange_bytes`, and one query's share where that is more. Queries travel in rounds
    of so many as fit in it; while one is searched, the next one's queries and the last one's
    answers are on their way.

    Args:
        datastore: the whole, which every rank opens; a rank reads keys of its own rows only.
        group: of torch.distributed; None: the one that torchrun's processes have joined, if any.
            gloo carries what lies on CPUs, NCCL what lies on GPUs (with keys on GPUs of all ranks,
            and a group that has it); a group of NCCL alone gets one of gloo beside it.
        bounds: (ranks + 1) ascending rows, from 0 to num_entries; rank r holds those from
            bounds[r] to bounds[r + 1]. By default equally many each.
        weights: instead, how many rows each rank holds in proportion; for ranks of unequal speed.
        faiss: approximate search (`recall` tells how much). True: every shard has a FAISS index of
            its own, built where it is not there yet, each rank its own. Or the folder of the
            finished index of the whole datastore, of which each rank holds its rows: the answers
            are then those of that index, also with `rescore`.
        exchange_bytes: see above. Shards that do not stay in memory are read once a round.
        timeout: seconds that a rank waits for another before it gives up with `RankLostError`.
        options: of `ExactIndex` (metric, device, chunk_bytes, resident_bytes, query_batch,
            refine, codes), or, with `faiss`, of `FaissIndex.build`; `path` is then a folder with
            one folder a shard. With an index that is there: of `FaissIndex.open`. Codes are used
            where all ranks have them.

    Attributes:
        ranks: the group, as this process sees it; its `sent` and `received` count bytes.
        shard: the view of this rank's rows.
        local: the index of them, None where there are none.

    Raises:
        ValueError: bounds or weights that are none, or ranks that were given different ones.
        RankFailedError, RankLostError: another rank could not open its shard, or has gone.
    """

    def __init__(
        self,
        datastore: Datastore,
        group: Any = None,
        *,
        bounds: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        faiss: bool | str | Path = False,
        exchange_bytes: int = 512 << 20,
        timeout: float = DEFAULT_TIMEOUT,
        **options: Any,
    ) -> None:
        self.datastore = datastore
        self.ranks = group if isinstance(group, Ranks) else Ranks(_world(group), timeout=timeout)
        self.exchange_bytes = check_count("exchange_bytes", exchange_bytes)
        self.approximate = bool(faiss)
        self._whole_index = None if isinstance(faiss, bool) else Path(faiss)
        self._rescore: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
        self._serving = False
        self._generation = getattr(datastore, "generation", 0)

        def begin() -> tuple[list[int], ExactIndex | FaissIndex | None]:
            cuts = _bounds(datastore.num_entries, self.ranks.size, bounds, weights)
            shard = datastore.rows(*cuts[self.ranks.rank : self.ranks.rank + 2])
            return cuts, self._open(shard, dict(options))

        self.bounds, self.local = self.ranks.all_or_none("opening a shard", begin)
        first, last = self.bounds[self.ranks.rank : self.ranks.rank + 2]
        self.first_row, self.shard = first, datastore.rows(first, last)
        self.metric = str(options.get("metric") or datastore.metric)
        self._settle_codes(options)
        self._agree(options)

    # Searching

    def search(
        self,
        queries: Tensor,
        k: int,
        exclude_documents: Tensor | Sequence[int] | None = None,
        *,
        filter: Filter | Sequence[Filter | None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The k nearest rows of this rank's queries, as `ExactIndex.search` has them.

        Collective. Ranks may give different k, filters and excluded documents. To each shard a
        filter travels once: 16 bytes for each run of rows, a bit a row of a mask. Where one rank's
        arguments are bad it raises, and so do the others, which are then ready for the next search.

        Returns:
            `(distances, indices)`: (Q, k) float32 and (Q, k) int64, on the queries' device.
        """
        if self.ranks.size == 1:
            return self._alone(queries, k, exclude_documents, filter)
        try:
            self.follow_datastore()
            k = check_k(k)
            rounded = prepare_queries(queries, self.datastore.dim, self.datastore.dtype)
            wanted = wanted_rows(
                self.datastore, len(rounded), filter, exclude_documents, self.filter
            )
        except Exception:
            self._meet(Request(FAILED))
            raise
        request = Request.of(wanted.groups, len(rounded), wanted.more(k))
        rounds = self._rounds(self._meet(request))
        distances, indices = rounds.run(rounded, wanted.groups)
        if self._rescore is not None:
            found = self._rescore(rounded.cpu(), indices.cpu())
            distances, indices = (one.to(rounded.device) for one in found)
        return wanted.finish(distances, indices, k)

    @contextmanager
    def together(self) -> Iterator[ShardedIndex]:
        """Within, each rank searches as often as it likes; at the end it answers the others.

        For loops of unequal lengths on different ranks, as of `KNNLM.generate`. All ranks enter,
        and each leaves when all have come to the end. After an error nobody is waited for.
        """
        if self._serving or self.ranks.size == 1:
            yield self
            return
        self._serving = True
        try:
            yield self
            self._serve()
        finally:
            self._serving = False

    def _serve(self) -> None:
        nothing = torch.empty(0, self.datastore.dim, dtype=self.datastore.dtype, device="cpu")
        while True:
            requests = self._meet(Request(FINISHED, k=1))
            if all(one.state == FINISHED for one in requests):
                return
            self._rounds(requests).run(nothing, [])

    def recall(self, queries: Tensor, k: int) -> ShardRecall:
        """How many of the true k nearest of all ranks' queries this index finds. Collective.

        The keys of every shard are searched for it exactly. 1.0 of an exact index.
        """
        found = self.search(queries, k)[1]
        exact = ShardedIndex(self.datastore, self.ranks, bounds=self.bounds).restricted(self.filter)
        true = exact.search(queries, k)[1].to(found.device)
        hits = sum(
            int(torch.isin(want[want >= 0], got).sum())
            for want, got in zip(true, found, strict=True)
        )
        sums = self.ranks.gather([len(queries), hits, int((true >= 0).sum())])
        count, hits, wanted = (sum(column) for column in zip(*sums, strict=True))
        return ShardRecall(count, k, hits / wanted if wanted else 1.0)

    def tokens(self, indices: Tensor) -> Tensor:
        """(Q, k) int32 values of the rows named by (Q, k) indices; -1 stays -1.

        Read from the files, of which each rank needs all, 4 bytes a row; they are not joined in
        memory. Not collective.
        """
        if self.ranks.size == 1:
            return super().tokens(indices)
        rows = indices.to("cpu", torch.int64)
        if self.datastore.num_entries == 0:
            return torch.full_like(rows, -1, dtype=torch.int32).to(indices.device)
        values = self.datastore.values[rows.clamp_min(0)]
        return values.masked_fill_(rows < 0, -1).to(indices.device)

    def describe(self) -> str:
        """One line: how rows are divided, and what this rank's shard is searched through."""
        rows = [b - a for a, b in pairwise(self.bounds)]
        most = f"{self.datastore.num_entries:,} rows on {self.ranks.size} ranks, "
        most += f"at most {max(rows):,} on one; exchanges in {binary_size(self.exchange_bytes)}"
        if isinstance(self.local, ExactIndex):
            return f"{most}; {self.ranks.name}: {self.local.describe()}"
        if self._whole_index is not None:
            return f"{most}; FAISS, approximate: what the index finds that {self._whole_index} is"
        return f"{most}; {'FAISS on each, approximate' if self.approximate else 'no rows here'}"

    # Inside

    def _forget(self) -> None:
        raise ValueError(
            f"rows of {self.datastore.path} were deleted, and its other ranks cannot know: make a "
            "new ShardedIndex"
        )

    def _alone(self, queries: Tensor, k: int, excluded: Any, filter: Any) -> tuple[Tensor, Tensor]:
        local = self.local if self.local is not None else ExactIndex(self.datastore)
        return local.restricted(self.filter).search(queries, k, excluded, filter=filter)

    def _meet(self, request: Request) -> list[Request]:
        """What all ranks ask for in the next search; RankFailedError where one cannot."""
        requests = [Request(*numbers) for numbers in self.ranks.gather(request)]
        failed = [r for r, one in enumerate(requests) if one.state == FAILED]
        if failed and request.state != FAILED:
            raise RankFailedError(
                f"rank {failed[0]} of {self.ranks.size} refused its part of a search; it says why"
            )
        return requests

    def _rounds(self, requests: list[Request]) -> Rounds:
        return Rounds(
            self.ranks,
            requests,
            local=self.local,
            bounds=self.bounds,
            device=self._exchange_device,
            num_bytes=self.exchange_bytes,
            most_queries=self._most_queries,
        )

    def _open(self, shard: Datastore, options: dict[str, Any]) -> ExactIndex | FaissIndex | None:
        if not self.approximate:
            # One rank of a machine reads all codes to compare checksums, not every one of them.
            verify = options.pop("verify", local_rank() == 0)
            index = ExactIndex(shard, verify=verify, **options)
            return index if len(shard) else None  # made all the same: it checks the options
        if self._whole_index is not None:
            return self._open_slice(shard, self._whole_index, options)
        from knnext.index.faiss import FaissIndex, default_path

        folder = options.pop("path", None)
        if not len(shard):
            return None
        name = f"{shard.row_offset}-{shard.row_offset + len(shard)}"
        whole = default_path(self.datastore)
        place = Path(folder) / name if folder else whole.with_name(f"{whole.name}-{name}")
        return FaissIndex.build(shard, place, **options)

    def _open_slice(
        self, shard: Datastore, whole: Path, options: dict[str, Any]
    ) -> FaissIndex | None:
        """This rank's rows of an index; what FAISS finds is rescored when all have answered."""
        from knnext.index.faiss_slice import open_slice, rescorer

        again = bool(options.pop("rescore", False))
        if again and self.ranks.size > 1:
            self._rescore = rescorer(whole, self.datastore)
        rows = (shard.row_offset, shard.row_offset + len(shard))
        options = {"verify": local_rank() == 0, "rescore": again and self.ranks.size == 1} | options
        index = open_slice(whole, self.datastore, rows, **options)
        return index if len(shard) else None

    def _settle_codes(self, options: dict[str, Any]) -> None:
        """All by codes or none: those that one machine found damaged are no better on another."""
        exact = self.local if isinstance(self.local, ExactIndex) else None
        without = exact is not None and exact.codes is None
        lacking = any(flag for (flag,) in self.ranks.gather([without]))
        if lacking and exact is not None and exact.codes is not None:
            self.local = ExactIndex(self.shard, **{**options, "codes": False})

    def _agree(self, options: dict[str, Any]) -> None:
        """Refuse ranks that search different things, and settle how they exchange."""
        exact = self.local if isinstance(self.local, ExactIndex) else None
        named: dict[str, Any] = {
            "datastore": self.datastore.fingerprint,
            "metric": self.metric,
            "bounds": self.bounds,
            "faiss": str(self._whole_index or self.approximate),
            "rescore": self._rescore is not None,
            "exchange_bytes": self.exchange_bytes,
            **{name: options[name] for name in ("refine", "query_batch") if name in options},
        }
        for rank, text in enumerate(self.ranks.gather_text(repr(named))):
            if text != repr(named):
                raise ValueError(
                    f"the ranks of a ShardedIndex must be given the same: rank {self.ranks.rank} "
                    f"has {named!r}, rank {rank} has {text}"
                )
        on_gpu = torch.device(options.get("device") or "cpu").type == "cuda"
        streamed = exact is not None and not exact.resident
        settled = self.ranks.gather([on_gpu and self.ranks.has_nccl(), streamed])
        by_nccl = all(nccl for nccl, _ in settled)
        self._exchange_device = torch.device(options["device"] if by_nccl else "cpu")
        if by_nccl and self.ranks.size > 1:
            self.ranks.connect(self._exchange_device)
        # What is resident costs nothing to go through again, and small rounds overlap.
        batch = int(options.get("query_batch") or 4096)
        self._most_queries = None if any(one for _, one in settled) else batch

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("a ShardedIndex belongs to its process group: make one in each process")


def _world(group: Any) -> Any:
    if group is None and torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.group.WORLD
    return group


def _bounds(
    rows: int, size: int, bounds: Sequence[int] | None, weights: Sequence[float] | None
) -> list[int]:
    """Where the rows of each rank begin, and the end of the last ones."""
    if bounds is not None and weights is not None:
        raise ValueError("give bounds or weights, not both")
    if bounds is not None:
        cuts = [int(bound) for bound in bounds]
        ascending = all(a <= b for a, b in pairwise(cuts))
        if len(cuts) != size + 1 or cuts[0] != 0 or cuts[-1] != rows or not ascending:
            raise ValueError(
                f"bounds must be {size + 1} ascending rows from 0 to {rows}, got {cuts}"
            )
        return cuts
    shares = [1.0] * size if weights is None else [float(weight) for weight in weights]
    sums = [0.0, *accumulate(shares)]
    if len(shares) != size or min(shares) < 0 or not 0 < sums[-1] < float("inf"):
        raise ValueError(f"weights must be {size} numbers of at least 0, not all 0, got {shares}")
    if weights is None:
        return [r * rows // size for r in range(size + 1)]
    return [min(rows, round(rows * (part / sums[-1]))) for part in sums[:-1]] + [rows]

"""What travels between ranks in an exact search, and how long that takes.

Queries travel to all shards, keys never. A rank's Q queries go to each other rank, Q x dim keys'
bytes each; from each shard come Q x k answers of 12 bytes (a distance and a row), which the rank
that asked merges.
"""

from __future__ import annotations

from dataclasses import dataclass

ANSWER_BYTES = 12


@dataclass(frozen=True)
class Traffic:
    """Of one batch.

    Attributes:
        ranks: that hold a shard each and ask equally many queries.
        ranks_a_node: of these, in one machine.
        queries: of all ranks together.
        k: answers to a query from a shard.
        query_bytes: of one query.
    """

    ranks: int
    ranks_a_node: int
    queries: int
    k: int
    query_bytes: int

    @property
    def to_one(self) -> float:
        """Bytes of queries that a rank sends to another."""
        return self.queries / self.ranks * self.query_bytes

    @property
    def from_one(self) -> float:
        """Bytes of answers that come back from it: Q x k x 12."""
        return self.queries / self.ranks * self.k * ANSWER_BYTES

    @property
    def a_rank(self) -> float:
        """Bytes that a rank sends, and as many that it gets: queries out, answers to others out."""
        return (self.ranks - 1) * (self.to_one + self.from_one)

    def seconds(self, bytes_to_one: float, network: float, link: float, latency: float) -> float:
        """Of a message of so many bytes from every rank to every other.

        Ranks of other nodes are reached over the network, those of the own over the link; the two
        are busy at once, and messages of one rank follow each other on each.
        """
        near = min(self.ranks, self.ranks_a_node) - 1
        far = self.ranks - 1 - near
        slower = max(far * bytes_to_one / network, near * bytes_to_one / link)
        return slower + (latency if self.ranks > 1 else 0.0)

    @property
    def merge_bytes(self) -> float:
        """Read and written where a rank merges the answers to its queries."""
        return 2 * self.ranks * self.from_one if self.ranks > 1 else 0.0

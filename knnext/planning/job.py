"""What is to be planned: a store, the machines it is built and searched on, and how."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from knnext.datastore.meta import KEY_DTYPES
from knnext.datastore.room import row_bytes
from knnext.index.codes_meta import STATS_BYTES, codes_bytes
from knnext.index.faiss_build import default_factory, default_segment_rows, training_rows
from knnext.index.faiss_size import FaissSize, check_factory
from knnext.planning.model_shape import ModelShape
from knnext.planning.traffic import Traffic

MOST_NEIGHBORS_ON_CUDA = 16_384
DEFAULT_QUERIES = 4_096
EXCHANGE_BYTES = 512 << 20  # `ShardedIndex` holds so much of queries and answers
MODEL_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Job:
    """One store and its machines.

    Attributes:
        tokens: rows of the datastore.
        shape: of the model that makes them.
        gpus: GPUs of each node; 0: the nodes search on their CPUs, one rank each.
        nodes: machines.
        k: neighbors a query.
        dtype: of the keys.
        model_dtype: of the model's weights.
        codes: whether keys are encoded too.
        index: a FAISS factory string, "default", or None for no such index.
        nprobe: lists that a FAISS search visits.
        queries: of all ranks, searched at once.
        block, stride: of the windows in which the model reads the text.
        batch: windows at once.
        disks: that take writes and are read at once; 1: one file system for all nodes.
    """

    tokens: int
    shape: ModelShape
    gpus: int = 0
    nodes: int = 1
    k: int = 1024
    dtype: str = "float16"
    model_dtype: str = "bfloat16"
    codes: bool = False
    index: str | None = None
    nprobe: int = 32
    queries: int = DEFAULT_QUERIES
    block: int = 1024
    stride: int = 768
    batch: int = 8
    disks: int = 1

    def __post_init__(self) -> None:
        for name in ("tokens", "nodes", "k", "queries", "block", "stride", "batch", "disks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.gpus < 0:
            raise ValueError(f"gpus must be 0 or more, got {self.gpus}")
        if self.stride > self.block:
            raise ValueError(f"stride must be at most block={self.block}, got {self.stride}")
        if self.dtype not in KEY_DTYPES or self.model_dtype not in MODEL_BYTES:
            raise ValueError(
                f"dtype and model_dtype must be of {', '.join(KEY_DTYPES)}, got {self.dtype!r} and "
                f"{self.model_dtype!r}"
            )
        if self.gpus and self.k > MOST_NEIGHBORS_ON_CUDA:
            raise ValueError(
                f"k must be at most {MOST_NEIGHBORS_ON_CUDA:,} on GPUs, got {self.k:,}; "
                "plan without GPUs (--gpus 0)"
            )
        _ = self.faiss  # a factory that is not known is refused here

    # Who does it

    @property
    def ranks(self) -> int:
        return self.nodes * max(1, self.gpus)

    @property
    def ranks_a_node(self) -> int:
        return max(1, self.gpus)

    @property
    def shard_rows(self) -> int:
        """Of the largest shard."""
        return -(-self.tokens // self.ranks)

    # Bytes

    @property
    def torch_dtype(self) -> torch.dtype:
        return KEY_DTYPES[self.dtype]

    @property
    def key_bytes(self) -> int:
        """Of one key."""
        return self.shape.dim * self.torch_dtype.itemsize

    @property
    def code_bytes(self) -> int:
        """Of the codes of one key."""
        return self.shape.dim + STATS_BYTES

    @property
    def weight_bytes(self) -> float:
        return self.shape.params * MODEL_BYTES[self.model_dtype]

    @property
    def factory(self) -> str | None:
        """The FAISS factory string, if there is an index."""
        if self.index != "default":
            return self.index
        return default_factory(self.tokens, self.shape.dim)

    @property
    def faiss(self) -> FaissSize | None:
        return None if self.factory is None else check_factory(self.factory, self.shape.dim)

    @property
    def training_rows(self) -> int:
        """Of a FAISS index."""
        return training_rows(self.tokens, 0 if self.faiss is None else self.faiss.lists)

    def disk(self) -> dict[str, int]:
        """Bytes on disk of each part; ``index building`` goes again when the index is finished."""
        found = {"datastore": self.tokens * row_bytes(self.shape.dim, self.torch_dtype)}
        if self.codes:
            found["codes"] = codes_bytes(self.tokens, self.shape.dim)
        if self.faiss is not None:
            found["index"] = self.faiss.index_bytes(self.tokens)
            built = self.faiss.build_bytes(self.tokens, self.segments)
            found["index building"] = built - found["index"]
        return found

    @property
    def segments(self) -> int:
        """In which one process builds a FAISS index; a graph has one."""
        graph = self.faiss is not None and self.faiss.graph
        return 1 if graph else -(-self.tokens // default_segment_rows(self.tokens))

    # Searching

    @property
    def traffic(self) -> Traffic:
        """Of one batch of queries, over the ranks."""
        return Traffic(
            ranks=self.ranks,
            ranks_a_node=self.ranks_a_node,
            queries=self.batch_queries,
            k=min(self.k, self.shard_rows),
            query_bytes=self.key_bytes,
        )

    @property
    def batch_queries(self) -> int:
        """Of all ranks in one round; more are searched in several."""
        if self.ranks == 1:
            return self.queries
        columns = min(self.k, self.shard_rows)
        a_query = 2 * (self.key_bytes + 12 * self.k) + 3 * 12 * columns
        return min(self.queries, max(1, EXCHANGE_BYTES // (a_query * self.ranks)) * self.ranks)

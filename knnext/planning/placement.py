"""Where a rank's rows lie while they are searched: what stays resident, and what streams."""

from __future__ import annotations

from dataclasses import dataclass, replace

from knnext.planning.job import MODEL_BYTES, Job
from knnext.planning.rates import Machine

#: Of a memory, what may be planned with; the rest is the driver's, the allocator's, others'.
USABLE = 0.9
SQNORM_BYTES = 4  # of a row, kept for "l2"
CHUNK_BYTES = 256 << 20  # `ExactIndex` reads so much at once, and holds two of them on a GPU
_CANDIDATES = 10  # of a query's list on a GPU, in multiples of k

#: What a search reads, from where.
RESIDENT = "keys resident"
CODES_RESIDENT = "codes resident, likely keys read from disk"
CODES_STREAMED = "codes streamed from disk, likely keys read from disk"
FROM_MEMORY = "keys streamed from the nodes' memory"
FROM_DISK = "keys streamed from disk"


@dataclass(frozen=True)
class Placement:
    """Of one rank's shard.

    Attributes:
        tier: one of those above.
        budget: bytes of the rank's memory that rows may take.
        wanted: bytes that the shard's keys would take there.
        held: bytes that stay there.
        read: bytes that go by for each batch of queries.
        working: bytes of the rank's memory for all else: model, queries, answers, buffers.
    """

    tier: str
    budget: int
    wanted: int
    held: int
    read: int
    working: int

    @property
    def resident(self) -> bool:
        return self.tier in (RESIDENT, CODES_RESIDENT)


def rank_memory(job: Job, machine: Machine) -> int:
    """Bytes of one rank's memory: of its GPU, or of its node."""
    return machine.gpu_memory if job.gpus else machine.memory


def working_bytes(job: Job) -> int:
    """What a searching rank's memory holds beside rows: the model, queries, lists, answers."""
    batch = job.batch_queries
    queries = batch * job.key_bytes
    lists = batch * min(job.k, job.shard_rows) * 12
    on_gpu = 2 * CHUNK_BYTES + batch * _CANDIDATES * job.k * 8 if job.gpus else CHUNK_BYTES
    return round(job.weight_bytes) + queries + lists + on_gpu


def build_memory(job: Job) -> int:
    """Bytes of a building rank's memory: weights, and what a pass holds for each of its tokens.

    That is a state of every layer and one layer's work, as `choose_batch_size` reckons.
    """
    numbers = job.shape.attention * (job.shape.layers + 24)
    states = job.batch * job.block * numbers * max(2, MODEL_BYTES[job.model_dtype])
    return round(job.weight_bytes) + states + 2 * job.batch * job.block * job.key_bytes


def usual_batch(job: Job, machine: Machine) -> Job:
    """The job with as many windows at once as a build would choose, fewer where memory is short."""
    tokens = 32_768 if job.gpus else 8192
    job = replace(job, batch=max(1, tokens // job.block))
    while job.batch > 1 and build_memory(job) > USABLE * rank_memory(job, machine):
        job = replace(job, batch=job.batch // 2)
    return job


def place(job: Job, machine: Machine) -> Placement:
    """Keys stay where they fit; else codes, where they are of use; else keys stream by."""
    rows, working = job.shard_rows, working_bytes(job)
    budget = max(0, int(USABLE * rank_memory(job, machine)) - working)
    keys = rows * (job.key_bytes + SQNORM_BYTES)
    codes = rows * job.code_bytes
    if job.codes and not job.gpus:  # a search on a GPU leaves codes aside
        # Read are the codes; keys beside them are no more than the page cache's affair.
        tier = CODES_RESIDENT if codes <= budget else CODES_STREAMED
        tier = RESIDENT if codes + keys <= budget else tier
        held = codes + (keys if tier == RESIDENT else 0) if tier != CODES_STREAMED else 0
        return Placement(tier, budget, keys, held, codes, working)
    if keys <= budget:
        return Placement(RESIDENT, budget, keys, keys, keys, working)
    if job.gpus:
        node = int(USABLE * machine.memory)
        tier = FROM_MEMORY if job.ranks_a_node * rows * job.key_bytes <= node else FROM_DISK
    else:
        tier = FROM_DISK
    return Placement(tier, budget, keys, 0, keys, working)

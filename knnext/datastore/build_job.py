"""One build as a thing to do: all of it by one process, or part by part by several."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from knnext.corpus import TokenizedDocuments
from knnext.datastore import Datastore
from knnext.datastore.claims import check_locks, folder_state, in_turn, take_all
from knnext.datastore.meta import META_FILE, DatastoreMeta, Origin, new_meta
from knnext.datastore.meta_file import missing_parts
from knnext.datastore.parts import check_part, first_rows, open_plan, part_origin
from knnext.lm.hidden_states import batch_ends, hidden_states
from knnext.progress import Progress

_log = logging.getLogger(__name__)
#: Parts a process, where nobody says how many: a fast one then does the work of a slow one, and
#: the end comes at much the same time for all.
PARTS_PER_RANK = 8


@dataclass(frozen=True)
class BuildJob:
    """A model, a text, and everything that decides the bytes of their datastore.

    ``windows`` are arguments of ``hidden_states``; ``facts`` and ``origin`` go into the meta.
    """

    model: nn.Module
    tokenized: TokenizedDocuments
    windows: dict[str, Any]
    width: int
    key_dtype: torch.dtype
    facts: dict[str, Any]
    origin: Origin

    @property
    def num_rows(self) -> int:
        return max(0, len(self.tokenized) - 1)

    def meta(self) -> DatastoreMeta:
        """Of the whole, with no rows yet."""
        return new_meta(self.width, self.key_dtype, origin=self.origin, **self.facts)

    def batch_ends(self) -> np.ndarray:
        """(batches,) the row after the last of each forward pass: where the work may be cut."""
        grid = {name: self.windows[name] for name in ("block_size", "stride", "batch_size")}
        apart = self.windows["separate_documents"]
        documents = self.tokenized.document_offsets if apart else None
        return batch_ends(len(self.tokenized), **grid, separate_documents=documents)

    def write(
        self,
        path: str | Path,
        title: str,
        rows: tuple[int, int],
        origin: Origin,
        *,
        documents: tuple[int, int] | None = None,
        entries_per_shard: int | None = None,
        resume: bool = True,
    ) -> Datastore:
        """The datastore of ``rows`` [first, last) of the text, from the first that is missing.

        ``documents`` [first, last) are named, the first one becoming document 0; None: all.
        """
        first, last = rows
        low, high = (0, None) if documents is None else documents
        names, hashes = self.tokenized.names[low:high], self.tokenized.hashes
        store = Datastore.create(
            path,
            self.width,
            self.key_dtype,
            origin=origin,
            entries_per_shard=entries_per_shard,
            resume=resume,
            **self.facts,
        )
        begun = store.num_entries
        _log.info("%s: %s, %d of %d rows are there", path, title, begun, last - first)
        with store, Progress(last - first, title, "tokens", done=store.num_entries) as bar:
            store.set_document_names(names, None if hashes is None else hashes[low:high])
            batches = hidden_states(
                self.model,
                self.tokenized,
                key_layer=self.facts["key_layer"],
                dtype=self.key_dtype,
                start=first + store.num_entries,
                stop=last,
                **self.windows,
            )
            for batch in batches:
                of = self.tokenized.document_of(batch.positions.cpu().numpy() + 1) - low
                store.append(batch.keys, batch.targets, torch.from_numpy(of))
                bar.update(len(batch))
        _log.info("%s: %s ended with %d rows", path, title, store.num_entries)
        return store

    def write_part(self, directory: Path, plan: DatastoreMeta, number: int) -> Datastore:
        """Part ``number`` of those planned, in its folder within ``directory``."""
        assert plan.parts is not None
        first, last = first_rows(plan)[number - 1 : number + 1]
        documents = self._documents(first, last)
        part = plan.parts[number - 1]
        return self.write(
            directory / part.folder,
            f"build part {number} of {len(plan.parts)}",
            (first, last),
            part_origin(plan, number, documents[0]),
            documents=documents,
            entries_per_shard=plan.entries_per_shard,
        )

    def _documents(self, first: int, last: int) -> tuple[int, int]:
        """Those that rows [first, last) name: their own, and behind them any without rows."""
        if first == last:
            return 0, 0
        count = self.num_rows
        of = self.tokenized.document_of(np.asarray([first, last - 1, min(last, count - 1)]) + 1)
        begin = 0 if first == 0 else int(of[0])
        end = self.tokenized.num_documents if last == count else max(int(of[1]) + 1, int(of[2]))
        return begin, end


def build_in_parts(
    job: BuildJob,
    directory: Path,
    part: tuple[int, int] | None,
    parts: int | None,
    rank: tuple[int, int],
) -> Datastore:
    """See ``build_datastore``."""
    ends = job.batch_ends()
    if part is not None:
        check_part(*part)
        if parts not in (None, part[1]):
            raise ValueError(f"part: got {part[0]}/{part[1]}, and parts={parts}; want one number")
    asked = parts if part is None else part[1]
    count = max(1, min(PARTS_PER_RANK * rank[1], len(ends))) if asked is None else asked
    if count < 1:
        raise ValueError(f"parts: got {count}, want at least 1")
    plan = open_plan(directory, job.meta(), ends, count, exactly=asked is not None)
    if not (directory / META_FILE).exists():
        if part is not None:
            built = job.write_part(directory, plan, part[0])
            if missing_parts(directory, plan):
                return built
        else:
            _share(job, directory, plan, rank)
    return Datastore.open(directory) if plan.parts is None else Datastore.join(directory)


def _share(job: BuildJob, directory: Path, plan: DatastoreMeta, rank: tuple[int, int]) -> None:
    folders = [directory / part.folder for part in plan.parts or ()]
    check_locks(directory)
    numbers: Sequence[int] = in_turn(len(folders), *rank)
    take_all(
        numbers,
        done=lambda number: (folders[number - 1] / META_FILE).is_file(),
        work=lambda number: job.write_part(directory, plan, number),
        state=lambda number: folder_state(folders[number - 1]),
    )

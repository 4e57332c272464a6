"""The shape of an index, and what every index shares: tokens for the rows it finds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from knnext.index.filter import Filter
from knnext.ops import gather_tokens

if TYPE_CHECKING:
    from typing_extensions import Self

    from knnext.datastore import Datastore


@runtime_checkable
class Index(Protocol):
    """What a search needs: a datastore, a metric, and neighbors for queries."""

    datastore: Datastore
    metric: str

    def search(
        self,
        queries: Tensor,
        k: int,
        exclude_documents: Tensor | Sequence[int] | None = None,
        *,
        filter: Filter | Sequence[Filter | None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(Q, k) float32 distances and (Q, k) int64 indices, nearest first."""
        ...

    def tokens(self, indices: Tensor) -> Tensor:
        """(Q, k) int32 vocabulary ids of the rows named; -1 stays -1."""
        ...


class TokenTable:
    """Looks up the tokens of found rows; a base of the indexes."""

    datastore: Datastore
    _values: Tensor | None = None
    #: How often rows had been deleted when it last looked.
    _generation = 0
    #: What every search of this index leaves out, whatever else it is asked.
    filter: Filter | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the values, which the datastore holds."""
        return {**self.__dict__, "_values": None}

    def __len__(self) -> int:
        """Rows that are searched."""
        return len(self.datastore)

    @property
    def ntotal(self) -> int:
        """`len(index)`, by the name that FAISS has for it."""
        return len(self)

    def restricted(self, filter: Filter | None) -> Self:
        """The same index, every search of which finds what the filter leaves alone: for a `KNNLM`,
        an evaluation, or whoever else searches. None takes the filter off.

        ValueError or TypeError at once, where the filter is none for the datastore.
        """
        if filter is not None:
            if not isinstance(filter, Filter):
                raise TypeError(f"filter must be a Filter, got {type(filter).__name__}")
            if filter.per_query:
                raise ValueError(
                    f"a filter of all searches is of all queries, and takes no "
                    f"{filter.per_query[0]} of each"
                )
            filter.shared(self.datastore)
        if filter is self.filter:
            return self
        other = object.__new__(type(self))  # and not a copy, which would open files again
        other.__dict__.update(self.__dict__, filter=filter)
        return other

    def follow_datastore(self) -> None:
        """Forget what was read of rows that have been deleted since; DatastoreError of a view."""
        now = getattr(self.datastore, "generation", 0)
        if now != self._generation:
            self._forget()
            self._generation = now

    def _forget(self) -> None:
        self._values = None

    def tokens(self, indices: Tensor) -> Tensor:
        """(Q, k) int32 values of the rows named by (Q, k) indices; -1 stays -1."""
        self.follow_datastore()
        # Rows may have been added, also to the index that this one is `restricted` from.
        if self._values is None or len(self._values) != self.datastore.num_entries:
            # One shard gives a view of its file; several are joined once, 4 bytes a row.
            self._values = self.datastore.values[0 : self.datastore.num_entries]
        if self._values.device != indices.device:
            self._values = self._values.to(indices.device)
        return gather_tokens(self._values, indices)

"""A text that grows by one token a step, with the key-layer state behind each."""

from __future__ import annotations

from torch import Tensor

from knnext.serve.reader import Reader, Rows


class Writer:
    """Token ids and, where the model keeps one, its cache of them.

    Args:
        reader: of the model.
        ids: the text so far; append to it between steps.
    """

    def __init__(self, reader: Reader, ids: list[int]) -> None:
        self._reader, self.ids = reader, list(ids)
        self._rows: Rows | None = None

    @property
    def ends(self) -> frozenset[int]:
        """Tokens after which the model writes no more."""
        return self._reader.ends

    def step(self) -> tuple[Tensor, Tensor]:
        """(D,) state and (V,) logits after the last token."""
        if self._rows is None:
            self._rows, states, logits = self._reader.begin([self.ids])
        else:
            states, logits = self._reader.step(self._rows, [self.ids])
        return states[0][-1], logits[0][-1]

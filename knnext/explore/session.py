"""What the page asks for, answered by a model and an index: plain values, ready for JSON."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from knnext.errors import KnnextError
from knnext.explore.figures import figures
from knnext.explore.writer import Writer
from knnext.report.copies import copied_runs
from knnext.report.excerpts import telling_token
from knnext.serve.reader import Reader
from knnext.serve.sampling import next_token

if TYPE_CHECKING:
    from knnext.datastore import Datastore
    from knnext.index.base import Index

#: Distances kept for a text, k a token: what a browser is sent is six bytes for each.
_MOST_PLACES = 2 << 20
_QUERIES_AT_ONCE = 128
_ROWS_AT_ONCE = 1 << 22  # of values
_MOST_SPANS = 64
MOST_NEW_TOKENS = 200
#: A browser is told of a position's tokens in 16 bits: its k, its target and the likeliest.
_MOST_K = 65_000
_END_READ = "Of the text its end was read: the whole is longer than the model reads."


class TooLong(KnnextError, RuntimeError):
    """The work was given up: it took longer than it may, or nobody waits for it any more."""


@dataclass
class Limit:
    """When work is to end. ``cancelled`` may be set by another thread."""

    seconds: float
    cancelled: bool = False

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """The time counts from now on."""
        self._end = time.monotonic() + self.seconds

    def check(self) -> None:
        """TooLong where the time has passed."""
        if self.cancelled or time.monotonic() > self._end:
            raise TooLong(f"this took longer than {self.seconds:g} seconds, and was given up")


class Session:
    """A model, its datastore, and how they are mixed.

    Args:
        model, tokenizer: as loaded.
        store, index: what is searched.
        k, temperature, lmbda: of the mixture that the page begins with; k is the most it can show.
        max_tokens: of a text that is read; fewer where k is so large that a browser would be sent
            more than some megabytes.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        store: Datastore,
        index: Index,
        *,
        k: int,
        temperature: float,
        lmbda: float,
        max_tokens: int = 1024,
    ) -> None:
        self.model, self.tokenizer, self.store, self.index = model, tokenizer, store, index
        self.k = min(k, store.num_entries)
        if self.k > _MOST_K:
            raise ValueError(
                f"k must be at most {_MOST_K:,} for this page, got {self.k:,}: see --k"
            )
        self.temperature, self.lmbda = temperature, lmbda
        self.key_layer = store.key_layer or "att"
        self.reader = Reader(model, self.key_layer, alone=True)
        self.max_tokens = max(1, min(max_tokens, _MOST_PLACES // self.k))

    def read(self, text: str, limit: Limit) -> dict[str, Any]:
        """Every token of the text with its neighbors, in the windows that `knnext eval` reads.

        ValueError where the text has no tokens. Past `max_tokens` it is cut, and a note says so.
        """
        from knnext.corpus import Document, tokenize
        from knnext.evaluation.prompt import pieces
        from knnext.lm.hidden_states import hidden_states

        name = "your text"
        whole = tokenize([Document(name, text)], self.tokenizer)
        ids = whole.tokens[: self.max_tokens + 1]
        if len(ids) < 2:
            raise ValueError("the text has no tokens: type or paste some")
        bos = (self.store.meta.origin or {}).get("bos")
        found = []
        for batch in hidden_states(
            self.model,
            ids,
            key_layer=self.key_layer,
            dtype=self.store.dtype,
            batch_size=1,
            with_logits=True,
            bos=None if bos is None else int(bos),
        ):
            assert batch.lm_logits is not None  # asked for above
            parts = zip(
                *(t.split(_QUERIES_AT_ONCE) for t in (batch.keys, batch.lm_logits, batch.targets)),
                strict=True,
            )
            for keys, logits, targets in parts:
                limit.check()
                found.append(figures(self.index, keys, logits, targets, self.k))
        joined = found[0].join(found[1:])
        texts = pieces(self.tokenizer, ids.tolist(), 1)
        scores = joined.scores
        runs = copied_runs(scores)
        gains = scores.log_p(self.temperature, self.lmbda) - scores.log_p_lm.double()
        left = len(whole.tokens) - len(ids)
        note = f"The text has {left:,} tokens more, which are not read." if left else ""
        return {
            **joined.plain(self.tokenizer, texts, runs),
            "name": name,
            "cut": [False, left > 0],
            "start": telling_token(texts, gains, runs),
            "note": note,
        }

    def write(
        self,
        text: str,
        *,
        tokens: int,
        temperature: float,
        lmbda: float,
        k: int,
        draw: bool = False,
        seed: int = 0,
    ) -> Writing:
        """A continuation by the mixture and one by the base LM, to be taken step by step."""
        return Writing(self, text, tokens, temperature, lmbda, min(k, self.k), draw, seed)

    def nearest(self, text: str, count: int, limit: Limit) -> dict[str, Any]:
        """The neighbors of the state after the text, as text."""
        from knnext.evaluation.prompt import read_prompt
        from knnext.lm.hidden_states import default_block_size

        prompt = read_prompt(text, self.tokenizer, self.store, default_block_size(self.model))
        limit.check()
        state, _ = Writer(self.reader, prompt.ids).step()
        limit.check()
        count = max(1, min(count, _MOST_SPANS, self.store.num_entries))
        query = state[None].to(self.store.dtype)
        # Shares are of the k neighbors that the mixture looks at.
        distances, rows = (found.cpu() for found in self.index.search(query, max(count, self.k)))
        shares = torch.softmax(-distances[0].double() / self.temperature, 0)
        kept = (rows[0] >= 0).nonzero()[:count, 0]
        tokens = self.index.tokens(rows[:, kept])[0].tolist()
        return {
            "neighbors": [
                {**span, "distance": distance, "share": share, "id": token}
                for span, distance, share, token in zip(
                    self.spans(rows[0][kept].tolist()),
                    distances[0][kept].tolist(),
                    shares[kept].tolist(),
                    tokens,
                    strict=True,
                )
            ],
            "note": "" if len(prompt.ids) == prompt.given else _END_READ,
        }

    def occurrences(self, text: str, count: int, limit: Limit) -> dict[str, Any]:
        """Where the datastore holds the text to the letter, token by token.

        The text is taken as it is and with a space before it, which most tokenizers write
        otherwise inside a sentence.
        """
        found: list[int] = []
        total = 0
        for ids in self._spellings(text):
            for row in self._rows_of(ids, limit):
                total += 1
                if len(found) < min(count, _MOST_SPANS):
                    found.append(row)
        spans = self.spans(sorted(found), before=16, after=16)
        return {"occurrences": spans, "total": total, "note": ""}

    def _spellings(self, text: str) -> list[list[int]]:
        spellings: list[list[int]] = []
        words = text.strip()
        for form in (text.strip("\n"), words, f" {words}") if words else (text,):
            options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
            ids = list(self.tokenizer(form, **options)["input_ids"])
            # What begins as another does stands where that one stands, and is counted there.
            if ids and not any(ids[: len(known)] == known for known in spellings):
                spellings = [known for known in spellings if known[: len(ids)] != ids]
                spellings.append(ids)
        if not spellings:
            raise ValueError("the text has no tokens: type or paste some")
        return spellings

    def _rows_of(self, ids: list[int], limit: Limit) -> Iterator[int]:
        """Rows at which the tokens begin, in order; the datastore's values are read in parts."""
        values, size = self.store.values, self.store.num_entries
        wanted = torch.tensor(ids, dtype=torch.int64, device="cpu")
        for start in range(0, size, _ROWS_AT_ONCE):
            limit.check()
            # The last rows of a part may begin what ends in the next.
            part = values[start : min(size, start + _ROWS_AT_ONCE + len(ids) - 1)]
            places = torch.nonzero(part[:_ROWS_AT_ONCE] == wanted[0])[:, 0]
            for offset in range(1, len(ids)):
                places = places[places + offset < len(part)]
                places = places[part[places + offset] == wanted[offset]]
            yield from (start + place for place in places.tolist())

    def spans(self, rows: list[int], before: int = 16, after: int = 8) -> list[dict[str, Any]]:
        """Rows as text. ValueError for a row that is not there, or for more than 64."""
        from knnext.evaluation.spans import neighbor_spans

        size = self.store.num_entries
        if len(rows) > _MOST_SPANS:
            raise ValueError(f"rows must be at most {_MOST_SPANS}, got {len(rows)}")
        for row in rows:
            if not 0 <= row < size:
                raise ValueError(f"rows must lie in [0, {size}), got {row}")
        wanted = torch.tensor(rows, dtype=torch.int64, device="cpu")
        found = neighbor_spans(self.store, self.tokenizer, wanted, before=before, after=after)
        return [
            {
                "row": span.row,
                "before": span.excerpt[0],
                "token": span.token,
                "after": span.excerpt[1],
                "document": span.document,
            }
            for span in found
        ]


class Writing:
    """Two continuations of one text, by the mixture and by the base LM alone."""

    def __init__(
        self,
        session: Session,
        text: str,
        tokens: int,
        temperature: float,
        lmbda: float,
        k: int,
        draw: bool,
        seed: int,
    ) -> None:
        from knnext.evaluation.prompt import read_prompt
        from knnext.lm.running import context_length

        self.session, self.k = session, k
        self.mixture = (temperature, lmbda)
        context = context_length(session.model)
        asked = tokens
        tokens = min(tokens, MOST_NEW_TOKENS, *([] if context is None else [context // 2]))
        most = session.max_tokens if context is None else min(context - tokens, session.max_tokens)
        prompt = read_prompt(text, session.tokenizer, session.store, most)
        self.left = {"mixture": tokens, "base": tokens}
        self.prompt = len(prompt.ids)
        notes = [_END_READ] if prompt.given > len(prompt.ids) else []
        if tokens < asked:
            notes.append(f"The model reads {context:,} tokens: at most {tokens:,} are written.")
        self.note = " ".join(notes)
        self.writers = {side: Writer(session.reader, prompt.ids) for side in self.left}
        self.generators = {
            side: torch.Generator(device="cpu").manual_seed(seed) if draw else None
            for side in self.left
        }

    @property
    def done(self) -> bool:
        """Whether both texts are as long as was asked for, or have come to their end."""
        return not any(self.left.values())

    def step(self, limit: Limit) -> list[dict[str, Any]]:
        """The next token of each text, with all that was found for it."""
        found = []
        for side, left in self.left.items():
            if left:
                limit.check()
                found.append(self._step(side))
        return found

    def _step(self, side: str) -> dict[str, Any]:
        from knnext.evaluation.prompt import pieces

        session, writer = self.session, self.writers[side]
        state, logits = writer.step()
        temperature, lmbda = self.mixture
        query = state[None].to(session.store.dtype)
        found = figures(session.index, query, logits[None], None, session.k)
        weight = lmbda if side == "mixture" else 0.0
        log_p = found.log_mixture(logits[None], temperature, weight, self.k)
        token = next_token(log_p[0], self.generators[side])
        found = found.with_targets(
            torch.tensor([token], dtype=torch.int64, device="cpu"), logits[None]
        )
        writer.ids.append(token)
        ends = token in writer.ends
        self.left[side] = 0 if ends else self.left[side] - 1
        # A character that a token only begins is shown as far as it goes.
        text = pieces(session.tokenizer, writer.ids, len(writer.ids) - 1)
        none = torch.zeros(1, dtype=torch.int64, device="cpu")
        return {"side": side, "ends": ends, **found.plain(session.tokenizer, text, none)}

"""One thread that reads, searches and mixes for all requests at once, a token a step.

In each step the texts that have come are read, the texts that are being written grow by a token,
and all of them are searched for together. A text leaves when it is over, and the next one comes in.
What is chosen for a text depends on nothing but its own request: its mixture, its generator, its
prompt. Only the rounding of a forward pass can depend on who stands beside it in a batch.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from knnext.lm.running import context_length, num_known_tokens
from knnext.serve.asked import Asked, Limits
from knnext.serve.errors import Refused, bad, busy, late, unready
from knnext.serve.mixer import Found, Mixer, Mixture
from knnext.serve.reader import Reader, Rows
from knnext.serve.sampling import next_token
from knnext.serve.speller import Names
from knnext.serve.writing import Piece, Text

_log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from knnext.lm.knnlm import KNNLM

#: Tokens of prompts that are read in one pass, padding included.
_PROMPT_TOKENS = {"cpu": 8192, "cuda": 32_768}
#: Bytes of logits where those of whole prompts are wanted.
_LOGITS_BYTES = 256 << 20
#: Bytes of a mixture, float32, while the tokens of a prompt are scored.
_MIXED_BYTES = 64 << 20
#: Rows of one search, which bounds its (rows, k) distances.
_SEARCHED = 2048


@dataclass(eq=False)
class Job:
    """The texts of one request.

    Attributes:
        tell: is called with each `Piece`, and with an exception where the request fails; from the
            engine's thread.
        cancelled: set by whoever has gone; its texts are then dropped before the next step.
    """

    tell: Callable[[Piece | Exception], None]
    seconds: float
    texts: list[Text] = field(default_factory=list)
    cancelled: bool = False
    failed: bool = False

    def __post_init__(self) -> None:
        self.begun = time.monotonic()

    @property
    def over(self) -> bool:
        return self.cancelled or self.failed

    def fail(self, error: Exception) -> None:
        """Once: the request gets this error for an answer."""
        if not self.over:
            self.failed = True
            self.tell(error)


@dataclass(eq=False)
class _Group:
    """Texts that stand in one cache, in the order of its rows."""

    rows: Rows
    texts: list[tuple[Job, Text]]

    def drop(self, keeps: Callable[[Job, Text], bool]) -> None:
        kept = [i for i, (job, text) in enumerate(self.texts) if keeps(job, text)]
        self.rows.keep(kept)
        self.texts = [self.texts[i] for i in kept]


@dataclass(frozen=True, eq=False)
class _Read:
    """What one text gave in a step: (n, D) states and (n, V) logits; the last is of what comes."""

    job: Job
    text: Text
    states: Tensor
    logits: Tensor
    fresh: bool


class Engine:
    """Writes texts for requests.

    Args:
        mixed: the model, its index, and how they are mixed.
        tokenizer: of the model.
        max_batch: texts that are read and written at once.
        queue: texts that may wait.
        seconds: that a request may take, waiting included.
        max_tokens: new ones that a request may ask for.

    Attributes:
        steps, tokens_read, tokens_written, texts_ended: counted since the start.
    """

    def __init__(
        self,
        mixed: KNNLM,
        tokenizer: Any,
        *,
        max_batch: int = 16,
        queue: int = 256,
        seconds: float = 600.0,
        max_tokens: int = 4096,
    ) -> None:
        self.tokenizer, self.seconds = tokenizer, seconds
        self.max_batch, self.queue = max_batch, queue
        self.reader = Reader(mixed.model, mixed.key_layer or "att")
        self.mixer = Mixer(mixed.index)
        model = self.reader.model
        own = Mixture(mixed.k, float(mixed.temperature), float(mixed.lmbda))
        vocab_size = num_known_tokens(model)
        context = context_length(model)
        longest = max((len(token) for token in tokenizer.get_vocab()), default=1)
        characters = None if context is None else context * longest
        self.limits = Limits(context, characters, vocab_size, max_tokens, queue, own)
        self._names = Names(tokenizer)
        eos = getattr(tokenizer, "eos_token_id", None)
        self._ends = self.reader.ends or frozenset([] if eos is None else [eos])
        device = self.reader.device.type
        self._budget = _PROMPT_TOKENS.get(device, _PROMPT_TOKENS["cpu"])
        self._whole_budget = min(self._budget, max(1, _LOGITS_BYTES // (4 * vocab_size)))
        self.steps = self.tokens_read = self.tokens_written = self.texts_ended = 0
        self._seconds_a_text = 1.0
        self._waiting: deque[tuple[Job, Text]] = deque()
        self._groups: list[_Group] = []
        self._change = threading.Condition()
        self._closing = self._cancelled = False
        self._busy = False
        threading.Thread(target=self._work, name="knnext-serve", daemon=True).start()

    # Asked from other threads

    def submit(self, asked: Asked, tell: Callable[[Piece | Exception], None]) -> Job:
        """Begin a request; pieces of its texts and what goes wrong go to ``tell``.

        Refused: 429 where too many wait, 503 where the engine is closing.
        """
        job = Job(tell, self.seconds)
        for place, prompt in enumerate(asked.prompts):
            for copy in range(asked.n):
                number = place * asked.n + copy
                text = Text(
                    asked, prompt, number, copy, self.tokenizer, self._names, self._ends, tell
                )
                job.texts.append(text)
        with self._change:
            if self._closing:
                raise unready("the server is shutting down")
            self._forget()
            if len(job.texts) > self.queue:
                raise bad(f"a request may ask for at most {self.queue} texts", "n")
            if self._waiting and len(self._waiting) + len(job.texts) > self.queue:
                raise busy(f"{len(self._waiting)} texts are waiting already", self._come_again())
            self._waiting.extend((job, text) for text in job.texts)
            self._change.notify_all()
        return job

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_live(self) -> int:
        return sum(len(group.texts) for group in self._groups)

    def close(self) -> None:
        """Take nothing more; what has been taken goes on."""
        with self._change:
            self._closing = True
            self._change.notify_all()

    def cancel(self) -> None:
        """Close, and end all requests with an error before the next step."""
        self._cancelled = True
        self.close()

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing is being written."""
        with self._change:
            return not (self._waiting or self._groups or self._busy)

    def _come_again(self) -> int:
        """Seconds in which about as many texts end as are waiting, from 1 to 60."""
        turns = 1 + len(self._waiting) / self.max_batch
        return max(1, min(60, round(turns * self._seconds_a_text)))

    # The thread

    def _work(self) -> None:
        while True:
            with self._change:
                self._busy = False
                while not (self._waiting or self._groups):
                    if self._closing:
                        return
                    self._change.wait()
                self._busy = True
            try:
                self._step()
            except BaseException as error:  # of a step, also a panic; told to all who were in it
                self._give_up(error)

    def _give_up(self, error: BaseException) -> None:
        jobs = {job for group in self._groups for job, _ in group.texts}
        self._groups = []
        _fail(jobs, error)

    def _step(self) -> None:
        self.steps += 1
        for group in self._groups:
            group.drop(lambda job, text: self._goes_on(job))
        self._groups = [group for group in self._groups if group.texts]
        old = list(self._groups)
        reads = [read for batch in self._batches(self._admitted()) for read in self._begun(batch)]
        for group in old:
            states, logits = self.reader.step(group.rows, [text.ids for _, text in group.texts])
            parts = zip(group.texts, states, logits, strict=True)
            reads += [_Read(job, text, s, p, False) for (job, text), s, p in parts]
        if reads:
            self._continue(reads)
        for group in self._groups:
            group.drop(lambda job, text: not (text.finished or job.over))
        self._groups = [group for group in self._groups if group.texts]
        if self.reader.together:
            for group in self._groups[1:]:
                self._groups[0].rows.join(group.rows)
                self._groups[0].texts += group.texts
            del self._groups[1:]

    def _goes_on(self, job: Job) -> bool:
        if self._cancelled:
            job.fail(unready("the server is shutting down"))
        if time.monotonic() > job.begun + job.seconds:
            job.fail(late(job.seconds))
        return not job.over

    def _forget(self) -> None:
        """Take those out of the queue for whom nobody waits any more."""
        if any(job.over for job, _ in self._waiting):
            self._waiting = deque(pair for pair in self._waiting if not pair[0].over)

    def _admitted(self) -> list[tuple[Job, Text]]:
        """Those that may come in now, in the order in which they came."""
        with self._change:
            for job, _ in self._waiting:
                self._goes_on(job)
            self._forget()
            room = self.max_batch - self.num_live
            found: list[tuple[Job, Text]] = []
            tokens = 0
            while self._waiting and len(found) < room:
                text = self._waiting[0][1]
                budget = self._whole_budget if text.reads_whole else self._budget
                if found and tokens + len(text.ids) > budget:
                    break
                found.append(self._waiting.popleft())
                tokens += len(text.ids)
            return found

    def _batches(self, fresh: list[tuple[Job, Text]]) -> Iterator[list[tuple[Job, Text]]]:
        """Those that are read in one pass: of one kind, and not much padding."""
        if not self.reader.together:
            yield from ([pair] for pair in fresh)
            return
        for whole in (True, False):
            budget = self._whole_budget if whole else self._budget
            batch: list[tuple[Job, Text]] = []
            mine = [pair for pair in fresh if pair[1].reads_whole == whole]
            for pair in sorted(mine, key=lambda pair: len(pair[1].ids)):
                if batch and len(pair[1].ids) * (len(batch) + 1) > budget:
                    yield batch
                    batch = []
                batch.append(pair)
            if batch:
                yield batch

    def _begun(self, batch: list[tuple[Job, Text]]) -> list[_Read]:
        """Read prompts. What fails here, as for want of memory, fails these alone."""
        whole = batch[0][1].reads_whole
        try:
            rows, states, logits = self.reader.begin([t.ids for _, t in batch], whole=whole)
        except BaseException as error:
            _fail({job for job, _ in batch}, error)
            return []
        self._groups.append(_Group(rows, batch))
        self.tokens_read += sum(len(text.ids) for _, text in batch)
        parts = zip(batch, states, logits, strict=True)
        return [_Read(job, text, s, p, True) for (job, text), s, p in parts]

    def _continue(self, reads: list[_Read]) -> None:
        """Search for all, score the prompts that are to be, and choose the next tokens."""
        found = self._search(reads)
        at = 0
        for read in reads:
            scores: tuple[list[Any], ...] = ([], [], [])
            if read.fresh and read.text.reads_whole:
                scores = self._score(read, found[at : at + len(read.states) - 1])
            at += len(read.states)
            if read.fresh and not read.job.over:
                read.text.begin(*scores)
        lasts = [end - 1 for end in itertools.accumulate(len(read.states) for read in reads)]
        going = [i for i, read in enumerate(reads) if not (read.text.finished or read.job.over)]
        if going:
            self._choose([reads[i] for i in going], found[[lasts[i] for i in going]])
        for read in reads:
            if read.text.finished:
                self.texts_ended += 1
                took = time.monotonic() - read.job.begun
                self._seconds_a_text += 0.1 * (took - self._seconds_a_text)

    def _search(self, reads: Sequence[_Read]) -> Found:
        states = torch.cat([read.states for read in reads])
        mixtures = [read.text.asked.mixture for read in reads for _ in read.states]
        return self.mixer.search(states, mixtures, _SEARCHED)

    def _score(self, read: _Read, found: Found) -> tuple[list[Any], list[Any], list[Any]]:
        """Of a prompt's tokens after its first: log p, the neighbors' shares, the likeliest."""
        targets = torch.tensor(read.text.ids[1:], dtype=torch.int64, device=read.logits.device)
        rows = max(1, _MIXED_BYTES // (4 * read.logits.shape[1]))
        scores: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
        for start in range(0, len(targets), rows):
            part = slice(start, min(start + rows, len(targets)))
            log_p = found[part].log_p(read.logits[part])
            top = read.text.asked.top or 0
            parts = _told(log_p, found[part], targets[part], [top] * len(log_p))
            for kept, new in zip(scores, (list[Any](one) for one in parts), strict=True):
                kept += new
        return scores

    def _choose(self, reads: list[_Read], found: Found) -> None:
        log_p = found.log_p(torch.cat([read.logits[-1:] for read in reads]))
        tokens = []
        for line, read in zip(log_p, reads, strict=True):
            asked = read.text.asked
            try:
                token = next_token(line, read.text.generator, asked.temperature or 1.0, asked.top_p)
            except Exception as error:  # of what the model gave for this text alone
                _fail({read.job}, error)
                token = 0
            tokens.append(token)
        targets = torch.tensor(tokens, dtype=torch.int64, device=log_p.device)
        tops = [read.text.asked.top for read in reads]
        log_ps, shares, told = _told(log_p, found, targets, tops)
        self.tokens_written += len(tokens)
        parts = zip(reads, tokens, log_ps, shares, told, strict=True)
        for read, token, own, share, top in parts:
            if not read.job.over:
                read.text.add(token, own, share, top)


def _told(
    log_p: Tensor, found: Found, targets: Tensor, tops: Sequence[int | None]
) -> tuple[list[float], list[float], list[list[tuple[int, float]]]]:
    """Of each row: log p of its target, the neighbors' share, and the likeliest with the target."""
    if all(top is None for top in tops):
        nothing = [0.0] * len(tops)
        return nothing, nothing, [[] for _ in tops]
    mine = log_p.gather(1, targets[:, None])[:, 0]
    shares = found.shares(targets, mine).tolist()
    most = min(max(top or 0 for top in tops), log_p.shape[1])
    likeliest = log_p.topk(most, dim=1)
    lines = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    told = []
    for top, target, own, (tokens, values) in zip(
        tops, targets.tolist(), mine.tolist(), lines, strict=True
    ):
        pairs = list(zip(tokens[: top or 0], values, strict=False))
        told.append(pairs if target in tokens[: top or 0] else [*pairs, (target, own)])
    return mine.tolist(), shares, told


def _fail(jobs: set[Job], error: BaseException) -> None:
    _log.error("%s", type(error).__name__, exc_info=error)
    words = " ".join(str(error).split())
    for job in jobs:
        job.fail(Refused(500, f"{type(error).__name__}: {words:.300}"))

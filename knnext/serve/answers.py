"""Pieces of texts as OpenAI's JSON: whole answers, and the chunks of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any

from knnext.serve.asked import Asked
from knnext.serve.errors import Refused
from knnext.serve.speller import is_numbered
from knnext.serve.writing import Piece, Scored

#: What stands for log 0, which JSON cannot hold.
LOG_ZERO = -9999.0


class Answers:
    """To one request.

    Args:
        asked: what it asked for.
        model: by what name.
    """

    def __init__(self, asked: Asked, model: str) -> None:
        self.asked = asked
        kind = "chat.completion" if asked.chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if asked.chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }
        self._chunk = {**self._head, "object": f"{kind}.chunk"} if asked.chat else self._head

    def whole(self, pieces: Iterable[Piece]) -> dict[str, Any]:
        """The answer that is not streamed, of all pieces of all texts."""
        of: list[list[Piece]] = [[] for _ in range(self.asked.num_texts)]
        for piece in pieces:
            of[piece.number].append(piece)
        choices = []
        for number, parts in enumerate(of):
            text = "".join(part.text for part in parts)
            tokens = [token for part in parts for token in part.tokens]
            choice = {
                "index": number,
                "finish_reason": parts[-1].finish,
                "logprobs": self._log_probs(tokens),
            }
            if self.asked.chat:
                message = {"role": "assistant", "content": text, "refusal": None}
                choices.append({**choice, "message": message})
            else:
                choices.append({**choice, "text": text})
        usage = self._usage([parts[-1].num_new for parts in of])
        return {**self._head, "choices": choices, "usage": usage}

    def first(self) -> list[str]:
        """What a stream begins with."""
        if not self.asked.chat:
            return []
        start = {"role": "assistant", "content": "", "refusal": None}
        return [self._event(self._delta(n, start, None)) for n in range(self.asked.num_texts)]

    def next(self, piece: Piece) -> str:
        """A chunk of a stream."""
        tokens = self._log_probs(piece.tokens) if piece.tokens else None
        if self.asked.chat:
            delta = {"content": piece.text} if piece.text or tokens else {}
            return self._event(self._delta(piece.number, delta, tokens, piece.finish))
        choice = {"index": piece.number, "text": piece.text}
        return self._event({**choice, "logprobs": tokens, "finish_reason": piece.finish})

    def last(self, num_new: Sequence[int]) -> list[str]:
        """What a stream ends with, where all went well."""
        end = "data: [DONE]\n\n"
        if not self.asked.usage:
            return [end]
        return [event({**self._chunk, "choices": [], "usage": self._usage(num_new)}), end]

    def _delta(
        self, number: int, delta: dict[str, Any], tokens: Any, finish: str | None = None
    ) -> dict[str, Any]:
        return {"index": number, "delta": delta, "logprobs": tokens, "finish_reason": finish}

    def _event(self, choice: dict[str, Any]) -> str:
        usage = {"usage": None} if self.asked.usage else {}
        return event({**self._chunk, "choices": [choice], **usage})

    def _usage(self, num_new: Sequence[int]) -> dict[str, int]:
        given, new = sum(len(prompt.ids) for prompt in self.asked.prompts), sum(num_new)
        return {"prompt_tokens": given, "completion_tokens": new, "total_tokens": given + new}

    def _log_probs(self, tokens: Sequence[Scored]) -> dict[str, Any] | None:
        if self.asked.top is None:
            return None
        return _chat_log_probs(tokens, self.asked.top) if self.asked.chat else _log_probs(tokens)


def event(data: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(data, allow_nan=False)}\n\n"


def failed(error: Refused) -> str:
    """The last event of a stream in the midst of which something went wrong."""
    return event(error.plain)


def _log_probs(tokens: Sequence[Scored]) -> dict[str, Any]:
    """Of /v1/completions; ``token_ids`` and ``knn_shares`` are ours."""
    return {
        "tokens": [one.name for one in tokens],
        "token_logprobs": [_finite(one.log_p) for one in tokens],
        "top_logprobs": [_top(one) for one in tokens],
        "text_offset": [one.offset for one in tokens],
        "token_ids": [one.token for one in tokens],
        "knn_shares": [one.share for one in tokens],
    }


def _top(one: Scored) -> dict[str, float | None] | None:
    """By name; of two tokens with one name the likelier."""
    if one.log_p is None:
        return None
    found: dict[str, float | None] = {}
    for _, name, log_p in one.top:
        found.setdefault(name, _finite(log_p))
    return found


def _chat_log_probs(tokens: Sequence[Scored], top: int) -> dict[str, Any]:
    """Of /v1/chat/completions; ``token_id`` and ``knn_share`` are ours."""
    content = [
        {
            **_named(one.token, one.name, one.log_p),
            "knn_share": one.share,
            "top_logprobs": [_named(*likely) for likely in one.top[:top]],
        }
        for one in tokens
    ]
    return {"content": content, "refusal": None}


def _named(token: int, name: str, log_p: float | None) -> dict[str, Any]:
    text = None if is_numbered(name) else list(name.encode())
    return {"token": name, "logprob": _finite(log_p), "bytes": text, "token_id": token}


def _finite(log_p: float | None) -> float | None:
    return None if log_p is None else max(log_p, LOG_ZERO)

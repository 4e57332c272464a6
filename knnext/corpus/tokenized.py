"""Documents as one stream of tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from knnext.corpus.decode import check_text
from knnext.corpus.documents import HASH_BYTES, Document, name_hash

#: The tokenizer gets at least so much text at once, which keeps its threads busy.
_BATCH_CHARS = 1 << 20


#: What a word is, by which a text's perplexity per word is counted. "marks": what stands between
#: white space; the mark before the next document is one more, where it is scored, as ``</s>`` is in
#: the literature. "wikitext": the same words and the end of each line, which WikiText counts as
#: ``<eos>``. "harness": the pieces of ``re.split(r"\s+", text)``, of lm-evaluation-harness.
WORDS: dict[str, Callable[[str], int]] = {
    "marks": lambda text: len(text.split()),
    "wikitext": lambda text: len(text.split()) + text.count("\n"),
    "harness": lambda text: len(re.split(r"\s+", text)),
}


@dataclass
class TokenizedDocuments:
    """One stream of tokens, and where each document lies in it.

    ``tokens`` (T,) int32; document i is ``tokens[offsets[i]:offsets[i + 1]]`` and begins with the
    separator (bos or eos), so that each of its own tokens is a target. ``document_offsets``
    (n + 1,) int64. ``num_words`` (n,) int64 counts words, by the rule of ``WORDS`` that ``words``
    names, and ``num_bytes`` (n,) int64 UTF-8 bytes, both of exactly the text whose tokens are here;
    the separator counts as neither. ``hashes`` (n, 16) uint8 stand for the whole text of each
    document, also where only its head is here (``Document.content_hash``); None where nobody knows
    them.
    """

    tokens: np.ndarray
    document_offsets: np.ndarray
    names: list[str]
    num_words: np.ndarray
    num_bytes: np.ndarray
    hashes: np.ndarray | None = None
    words: str = "marks"

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self.names)

    def document_of(self, positions: np.ndarray) -> np.ndarray:
        """The document (int64) in which each stream position lies."""
        return np.searchsorted(self.document_offsets, positions, side="right") - 1


def separator_token(tokenizer: Any) -> int:
    """The id that stands before each document: bos, or eos where there is no bos."""
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(tokenizer, name, None)
        if token is not None:
            return int(token)
    raise ValueError(
        "tokenizer has neither bos_token nor eos_token; one is needed to stand before each document"
    )


def window_bos(tokenizer: Any) -> int | None:
    """The bos that the tokenizer sets before every text by itself, or None where it sets none.

    Models with such a tokenizer (Llama, Gemma) have been trained on sequences that all begin so,
    and read worse in windows that do not. GPT-2 and its like have not.
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None or not callable(tokenizer):
        return None
    ids = tokenizer("a")["input_ids"]
    return int(bos) if ids and ids[0] == bos else None


def tokenize(
    documents: Sequence[Document],
    tokenizer: Any,
    *,
    max_tokens: int | None = None,
    words: str = "marks",
) -> TokenizedDocuments:
    """One flat stream of all documents, in order, each led by the separator.

    ``tokenizer``: a fast tokenizer of transformers. Special tokens spelled out in the text are
    read as plain text, so that no separator but ours is in the stream. ``max_tokens`` keeps only
    the head of each document (words and bytes are then those of the head): the way to evaluate on
    many documents at a small cost. ``words``: what is counted as one, see ``WORDS``. CorpusError
    for a document with half a surrogate pair.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(f"tokenizer must be a fast one (with offsets), got {type(tokenizer)}")
    if words not in WORDS:
        raise ValueError(f"words must be one of {', '.join(WORDS)}; got {words!r}")
    separator = separator_token(tokenizer)
    parts, lengths, num_words, num_bytes = [], [], [], []
    for texts in _batches(documents):
        encoded = tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_offsets_mapping=max_tokens is not None,
            verbose=False,
        )
        for i, text in enumerate(texts):
            ids = encoded["input_ids"][i]
            if max_tokens is not None and len(ids) > max_tokens:
                text = text[: encoded["offset_mapping"][i][max_tokens - 1][1]]
                ids = ids[:max_tokens]
            parts.append(np.asarray([separator, *ids], dtype=np.int32))
            lengths.append(len(ids) + 1)
            num_words.append(WORDS[words](text))
            num_bytes.append(len(text.encode("utf-8", "surrogatepass")))
        del encoded  # a hundred bytes a token, which need not be there beside the next
    return TokenizedDocuments(
        tokens=np.concatenate(parts) if parts else np.empty(0, np.int32),
        document_offsets=np.cumsum([0, *lengths], dtype=np.int64),
        names=[d.name for d in documents],
        num_words=np.asarray(num_words, dtype=np.int64),
        num_bytes=np.asarray(num_bytes, dtype=np.int64),
        hashes=np.frombuffer(b"".join(d.content_hash for d in documents), np.uint8).reshape(
            -1, HASH_BYTES
        ),
        words=words,
    )


def _batches(documents: Sequence[Document]) -> Iterator[list[str]]:
    texts: list[str] = []
    size = 0
    for document in documents:
        texts.append(check_text(document.text, f"document {document.name!r}"))
        size += len(document.text)
        if size >= _BATCH_CHARS:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def take_documents(text: TokenizedDocuments, most: int, seed: int = 0) -> TokenizedDocuments:
    """Whole documents of at most `most` tokens together, chosen by hash, in their old order.

    A document that no longer fits is passed over. Where not even one fits, the first is cut.
    """
    lengths = np.diff(text.document_offsets)
    order = sorted(range(len(lengths)), key=lambda i: name_hash(text.names[i], seed + 2))
    kept, used = [], 0
    for i in order:
        if used + lengths[i] <= most:
            kept.append(i)
            used += int(lengths[i])
    cut = not kept
    kept = sorted(kept) or order[:1]
    parts = [text.tokens[text.document_offsets[i] :][: min(lengths[i], most)] for i in kept]
    share = most / lengths[kept[0]] if cut else 1.0
    return TokenizedDocuments(
        tokens=np.concatenate(parts),
        document_offsets=np.cumsum([0, *map(len, parts)], dtype=np.int64),
        names=[text.names[i] for i in kept],
        num_words=(text.num_words[kept] * share).astype(np.int64),
        num_bytes=(text.num_bytes[kept] * share).astype(np.int64),
        hashes=None if text.hashes is None else text.hashes[kept],
        words=text.words,
    )

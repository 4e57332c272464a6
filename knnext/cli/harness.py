"""The model "knnext" of lm-evaluation-harness: its own "hf" model, with neighbors mixed in.

Tokens, windows, batches and what is made of log-probabilities are the harness's own: where nothing
is mixed, every figure is that of ``--model hf``, bit for bit. With a datastore the model's logits
are a KNNLM's, and only the positions that a request asks for are searched.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knnext.cli.arguments import num_bytes
from knnext.cli.session import Settings, check_model, dtype_as_built, open_index
from knnext.datastore import Datastore
from knnext.errors import missing_package
from knnext.lm.agreement import checked_k, checked_numbers
from knnext.lm.identity import note_origin
from knnext.lm.knnlm import KNNLM

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise missing_package("lm-evaluation-harness is", "lm_eval", "harness") from error

#: (what the harness calls the request, tokens of the context, tokens of the continuation)
TokenRequest = tuple[Any, list[int], list[int]]


@register_model("knnext")
class KNNHarnessLM(HFLM):  # type: ignore[misc]
    """The harness's HF model, mixed with the neighbors of a datastore.

    Args:
        pretrained: as of the harness's "hf"; in Python also a model, or a KNNLM.
        datastore: its folder, or the open Datastore; None: the model alone.
        temperature, lmbda, k, index, nprobe, rescore: by default as `knnext tune` left them beside
            the datastore. The number 0 as lmbda searches nothing.
        index_path, query_batch, chunk_bytes, resident_bytes: as of `knnext eval`.
        dtype: by default the one that the datastore was built in; without one, the checkpoint's.
        options: all others of "hf".

    ValueError where the datastore was built from another model or tokenizer, where one of these is
    given without a datastore, or where temperature and lmbda are nowhere to be found.
    """

    _model: Any
    tokenizer: Any

    def __init__(
        self,
        pretrained: Any,
        datastore: Any = None,
        *,
        temperature: float | None = None,
        lmbda: float | None = None,
        k: int | None = None,
        index: str | None = None,
        index_path: str | None = None,
        nprobe: int | None = None,
        rescore: bool | None = None,
        query_batch: int | None = None,
        chunk_bytes: int | str | None = None,
        resident_bytes: int | str | None = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        given = {
            "temperature": temperature,
            "lmbda": lmbda,
            "k": k,
            "index": index,
            "index_path": None if index_path is None else str(_whole(index_path)),
            "nprobe": nprobe,
            "rescore": rescore,
            "query_batch": query_batch,
            "chunk_bytes": _size("chunk_bytes", chunk_bytes),
            "resident_bytes": _size("resident_bytes", resident_bytes),
        }
        _check(given, datastore, pretrained)
        store = None
        if datastore is not None:
            opened = isinstance(datastore, Datastore)
            store = datastore if opened else Datastore.open(_whole(datastore))
        if dtype is None:
            built = "auto" if store is None else dtype_as_built(store)
            dtype = "auto" if built == "checkpoint" else built
        super().__init__(pretrained, dtype=dtype, **options)
        self._asked: dict[bytes, int] = {}
        self._lengths: list[int] = []
        self._facts: dict[str, Any] = {}
        if store is not None:
            self._note_gguf(pretrained, options)
            check_model(store, self._model, self._tokenizer_as_built(pretrained, options))
            self._mix(store, given)

    def _note_gguf(self, pretrained: Any, options: dict[str, Any]) -> None:
        if options.get("gguf_file") is not None:
            from transformers.utils import cached_file

            from knnext.lm.gguf import gguf_type

            file = cached_file(pretrained, options["gguf_file"], revision=options.get("revision"))
            note_origin(self._model, {"quantization": gguf_type(Path(file))})

    def _tokenizer_as_built(self, pretrained: Any, options: dict[str, Any]) -> Any:
        """The tokenizer without ``add_bos_token``, by which no datastore is built.

        A bos before a text is the harness's affair, as are windows; tokens stay what they are.
        """
        if options.get("add_bos_token") is None:
            return self.tokenizer
        names = ("tokenizer", "revision", "trust_remote_code", "use_fast_tokenizer")
        given = {
            name: options[name] for name in (*names, "gguf_file", "subfolder") if name in options
        }
        used = self.tokenizer
        try:
            self._create_tokenizer(pretrained, **{"tokenizer": None, **given})
            return self.tokenizer
        finally:
            self.tokenizer = used

    def _mix(self, store: Datastore, given: dict[str, Any]) -> None:
        place = str(self.device) if self.device.type == "cuda" else "cpu"
        args = argparse.Namespace(datastore=store.path, device=place, **given)
        settings = Settings.of(args)
        if settings.lmbda == 0:  # given so: a fit is above it
            return
        temperature, lmbda = settings.mixture()
        index = open_index(args, store, settings)
        self._model = KNNLM(self._model, index, settings.k, temperature, lmbda).eval()
        self._facts = {
            "datastore": str(store.path),
            "datastore_fingerprint": store.fingerprint,
            "datastore_entries": store.num_entries,
            "k": settings.k,
            "temperature": temperature,
            "lmbda": lmbda,
            "index": settings.index,
            "nprobe": settings.nprobe,
            "rescore": settings.rescore,
        }

    def get_model_info(self) -> dict[str, Any]:
        """The harness's own, with the datastore and its mixture: it goes into the results file."""
        return {**super().get_model_info(), **self._facts}

    # Which positions a request asks for. The harness gives whole contexts to the model, and of
    # what comes back takes the continuation; of the rest nothing is searched, and nothing is left
    # that could be taken by mistake.

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], *args: Any, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        self._asked = asked_positions(requests, self.max_length)
        self._lengths = sorted({int.from_bytes(key[:4], "little") for key in self._asked})
        try:
            found: list[tuple[float, bool]] = super()._loglikelihood_tokens(
                requests, *args, **kwargs
            )
        finally:
            self._asked, self._lengths = {}, []
        return found

    def _model_call(
        self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        if not isinstance(self.model, KNNLM):
            plain: Tensor = super()._model_call(inps, attn_mask, labels)
            return plain
        searched = self._searched(inps)
        low = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, low, low is not None):
            logits: Tensor = self.model(inps, searched=searched).logits
        return logits.masked_fill_(~searched[..., None].to(logits.device), float("nan"))

    def _searched(self, ids: Tensor) -> Tensor:
        """(B, L) bool of rows that are filled up on the right: what any request asks of them."""
        rows = ids.cpu().numpy().astype(np.int32)
        searched = torch.zeros(ids.shape, dtype=torch.bool, device="cpu")
        for row, wanted in zip(rows, searched, strict=True):
            for length in self._lengths:
                # Where one text begins with another it is both of them, for all that one can tell.
                if length <= len(row) and (number := self._asked.get(_key(row[:length]), 0)):
                    wanted[length - number : length] = True
            if not wanted.any():
                wanted[:] = True  # no request of ours, such as the search for a batch size
        return searched


def asked_positions(requests: Iterable[TokenRequest], max_length: int) -> dict[bytes, int]:
    """For each text that the model will be given, its last positions that somebody asks for.

    The text is what the harness makes of a request: the last ``max_length`` tokens of context and
    continuation but for the very last, from whose end the continuation's are taken.
    """
    asked: dict[bytes, int] = {}
    for _, context, continuation in requests:
        ids = np.asarray((context + continuation)[-(max_length + 1) : -1], dtype=np.int32)
        key = _key(ids)
        asked[key] = max(asked.get(key, 0), min(len(continuation), len(ids)))
    return asked


def _key(ids: Any) -> bytes:
    digest = hashlib.blake2b(np.ascontiguousarray(ids).tobytes(), digest_size=16).digest()
    return len(ids).to_bytes(4, "little") + digest


def _whole(path: Any) -> Path:
    """One that a shell left as it was (a ~ behind a =), and that stays when the folder changes."""
    return Path(path).expanduser().absolute()


def _size(name: str, given: int | str | None) -> int | None:
    try:
        return None if given is None else num_bytes(str(given))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{name}: {error}") from None


def _check(given: dict[str, Any], datastore: Any, pretrained: Any) -> None:
    said = [name for name, value in given.items() if value is not None]
    if datastore is None and said and (said != ["lmbda"] or given["lmbda"] != 0):
        raise ValueError(f"{said[0]} is for a datastore, and none is given: datastore=FOLDER")
    if given["k"] is not None:
        checked_k(given["k"])
    temperature, lmbda = given["temperature"], given["lmbda"]
    checked_numbers(1.0 if temperature is None else temperature, 0.0 if lmbda is None else lmbda)
    if datastore is not None and isinstance(pretrained, KNNLM):
        raise ValueError("pretrained is a KNNLM, which has its datastore: leave datastore out")
    if given["index"] not in (None, "exact", "faiss"):
        raise ValueError(f"index must be exact or faiss, got {given['index']!r}")

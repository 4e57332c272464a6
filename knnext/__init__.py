"""knnext: nearest-neighbor search and mixing for language models, as PyTorch ops.

The ops are loaded on import; everything that reads models, corpora or indexes is loaded when it is
first named, so that ``import knnext`` costs little more than ``import torch``.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _version
from typing import Any

from knnext.ops import (
    KeyCodes,
    encode_keys,
    failed_queries,
    gather_tokens,
    key_sqnorms,
    knn_interpolate,
    knn_search,
    knn_softmax,
    knn_target_log_prob,
    merge_topk,
    rescore,
)

try:
    __version__ = _version("knnext")
except PackageNotFoundError:  # run from the tree, not installed
    __version__ = "0+tree"

_LAZY = {
    "Datastore": "knnext.datastore",
    "DatastoreError": "knnext.datastore",
    "ExactIndex": "knnext.index",
    "FaissIndex": "knnext.index",
    "KNNLM": "knnext.lm.knnlm",
    "build_datastore": "knnext.datastore.build",
    "load_corpus": "knnext.corpus",
    "evaluate": "knnext.evaluation",
    "search_stream": "knnext.evaluation",
    "tokenize": "knnext.corpus",
    "tune": "knnext.evaluation.tune",
}

__all__ = [
    "KeyCodes",
    "encode_keys",
    "failed_queries",
    "gather_tokens",
    "key_sqnorms",
    "knn_interpolate",
    "knn_search",
    "knn_softmax",
    "knn_target_log_prob",
    "merge_topk",
    "rescore",
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'knnext' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""knnext: nearest-neighbor search and mixing for language models, as PyTorch ops.

The ops are loaded on import; everything that reads models, corpora or indexes is loaded when it is
first named, so that ``import knnext`` costs little more than ``import torch``.
"""

from __future__ import annotations

import importlib
import sys
import warnings as _warnings
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _version
from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

from knnext import errors as errors
from knnext.say import log_as_told as _log_as_told

if TYPE_CHECKING:
    from knnext.corpus import load_corpus, tokenize
    from knnext.datastore import Datastore, DatastoreError
    from knnext.datastore.build import build_datastore
    from knnext.evaluation import evaluate, search_stream
    from knnext.evaluation.tune import tune
    from knnext.index import ExactIndex, FaissIndex, ShardedIndex
    from knnext.lm.knnlm import KNNLM
    from knnext.lm.logits_processor import KNNLogitsProcessor

    # By their modules: from the package mypy would take the modules themselves.
    from knnext.ops.encode_keys import KeyCodes, encode_keys, mean_key
    from knnext.ops.failed_queries import failed_queries
    from knnext.ops.gather_tokens import gather_tokens
    from knnext.ops.key_sqnorms import key_sqnorms
    from knnext.ops.knn_interpolate import knn_interpolate
    from knnext.ops.knn_search import knn_search
    from knnext.ops.knn_softmax import knn_softmax
    from knnext.ops.knn_target_log_prob import knn_target_log_prob
    from knnext.ops.merge_topk import merge_topk
    from knnext.ops.rescore import rescore

try:
    __version__ = _version("knnext")
except PackageNotFoundError:  # run from the tree, not installed
    __version__ = "0+tree"

__all__ = [
    "KNNLM",
    "Datastore",
    "DatastoreError",
    "ExactIndex",
    "FaissIndex",
    "KNNLogitsProcessor",
    "KeyCodes",
    "ShardedIndex",
    "build_datastore",
    "encode_keys",
    "evaluate",
    "failed_queries",
    "gather_tokens",
    "key_sqnorms",
    "knn_interpolate",
    "knn_search",
    "knn_softmax",
    "knn_target_log_prob",
    "load_corpus",
    "mean_key",
    "merge_topk",
    "rescore",
    "search_stream",
    "tokenize",
    "tune",
]

_ELSEWHERE = {
    "Datastore": "knnext.datastore",
    "DatastoreError": "knnext.datastore",
    "ExactIndex": "knnext.index",
    "FaissIndex": "knnext.index",
    "KNNLM": "knnext.lm.knnlm",
    "KNNLogitsProcessor": "knnext.lm.logits_processor",
    "ShardedIndex": "knnext.index",
    "build_datastore": "knnext.datastore.build",
    "evaluate": "knnext.evaluation",
    "load_corpus": "knnext.corpus",
    "search_stream": "knnext.evaluation",
    "tokenize": "knnext.corpus",
    "tune": "knnext.evaluation.tune",
}


if _trouble := _log_as_told():
    _warnings.warn(_trouble, errors.KnnextWarning, stacklevel=2)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'knnext' has no attribute {name!r}")
    return getattr(importlib.import_module(_ELSEWHERE.get(name, "knnext.ops")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _command_asks_for_words() -> bool:
    """This process is the command, called for its help or version, or with no word at all:
    seconds without torch."""
    # While `python -m knnext` finds the package, argv[0] is "-m" still.
    command, *words = sys.argv or [""]
    told = not words or any(word in ("-h", "--help", "--version") for word in words)
    return _Path(command).name in ("knnext", "-m") and told


if not _command_asks_for_words():
    for _name in set(__all__) - set(_ELSEWHERE):
        globals()[_name] = __getattr__(_name)

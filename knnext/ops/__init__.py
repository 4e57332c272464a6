"""The ops, one module each: the typed function, its docstring, its fake and its gradient.

``torch.ops.knnext.X`` and ``knnext.X`` are the same op; the function adds types and chooses the
overload from the argument.
"""

from __future__ import annotations

from knnext.ops._library import REPORT, FallbackWarning
from knnext.ops.encode_keys import KeyCodes, encode_keys, mean_key
from knnext.ops.failed_queries import failed_queries
from knnext.ops.gather_tokens import gather_tokens
from knnext.ops.key_sqnorms import key_sqnorms
from knnext.ops.knn_interpolate import knn_interpolate
from knnext.ops.knn_search import knn_search
from knnext.ops.knn_search_codes import OP as _search_codes  # noqa: F401  registers its rules
from knnext.ops.knn_softmax import knn_softmax
from knnext.ops.knn_target_log_prob import knn_target_log_prob
from knnext.ops.merge_topk import merge_topk
from knnext.ops.rescore import rescore

__all__ = [
    "REPORT",
    "FallbackWarning",
    "KeyCodes",
    "encode_keys",
    "failed_queries",
    "gather_tokens",
    "key_sqnorms",
    "knn_interpolate",
    "knn_search",
    "knn_softmax",
    "knn_target_log_prob",
    "mean_key",
    "merge_topk",
    "rescore",
]

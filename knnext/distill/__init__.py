"""p_knn of every token of a text, sparse, as data to train another model on.

`distill` writes it: for each token the likeliest tokens by the neighbors and their probabilities,
with its own document or row left out. `DistillationData` reads it for torch, and `sparse_kl` is the
loss. docs/distill.md is the guide.
"""

from knnext.distill.data import DistillationData, collate
from knnext.distill.job import Distilled, distill
from knnext.distill.loss import mixture_kl, sparse_kl

__all__ = ["DistillationData", "Distilled", "collate", "distill", "mixture_kl", "sparse_kl"]

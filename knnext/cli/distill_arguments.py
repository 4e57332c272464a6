"""Options of the command distill."""

from __future__ import annotations

import argparse

from knnext.cli.arguments import (
    add_corpus,
    add_datastore,
    add_model,
    add_search_options,
    add_text_limits,
    add_windows,
    positive,
    positive_float,
    refuse_dtype,
)


def add_distill_options(c: argparse.ArgumentParser) -> None:
    add_datastore(c)
    add_model(c)
    add_corpus(c, "train", required=False)
    c.add_argument("--out", required=True, metavar="FOLDER", help="new, or begun by this command")
    c.add_argument(
        "--exclude",
        choices=("document", "row", "none"),
        default="document",
        help="what of the datastore a token must not find, where the text is in it: the whole "
        "document that it belongs to (default), or itself; none: the text is not in it",
    )
    c.add_argument(
        "--top", type=positive, default=64, help="likeliest tokens to keep of each; default: 64"
    )
    c.add_argument("--temperature", type=positive_float, help="of p_knn; default: as tuned")
    c.add_argument(
        "--shard-tokens",
        type=positive,
        default=1 << 18,
        metavar="N",
        help="tokens of a file, about: what a kill can lose; default: 262144",
    )
    add_windows(c)
    add_text_limits(c)
    add_search_options(c)
    refuse_dtype(c, keys=False, model=True)

"""Options that several commands share, and the types of arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

Check = Callable[[str], Any]


def add_datastore(c: argparse.ArgumentParser) -> None:
    c.add_argument("datastore", help="folder of the datastore")


def add_model(c: argparse.ArgumentParser, required: bool = True) -> None:
    c.add_argument("--model", required=required, help="folder or hub name of a causal LM")
    c.add_argument("--device", help="such as cpu or cuda:1; default: a GPU where there is one")
    c.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that the model brings; default: refuse such a model",
    )


def add_corpus(c: argparse.ArgumentParser, split: str, required: bool = True) -> None:
    text = "stdlib, a file, a folder, or hf:NAME[:CONFIG]"
    text += "" if required else "; default: the datastore's"
    c.add_argument("--corpus", required=required, help=text)
    c.add_argument(
        "--split", choices=("train", "valid", "test"), default=split, help=f"default: {split}"
    )
    kept = "" if required else "the datastore's, or "
    c.add_argument("--text-column", help=f"of tables and datasets; default: {kept}text")
    c.add_argument("--split-seed", type=seed, help=f"of a split made by hash; default: {kept}0")
    c.add_argument(
        "--shares",
        type=shares,
        metavar="TRAIN,VALID,TEST",
        help=f"of a split made by hash; default: {kept}80,10,10; 100,0,0 takes all for train",
    )
    add_text_errors(c, f"default: {kept}strict")
    if not required:
        c.add_argument(
            "--allow-overlap",
            action="store_true",
            help="score documents that are in the datastore too; figures are then too good",
        )


def add_text_errors(c: argparse.ArgumentParser, default: str = "default: strict") -> None:
    c.add_argument(
        "--text-errors",
        choices=("strict", "replace"),
        help="bytes that are not UTF-8, rows without text: an error, or read on with U+FFFD and "
        f"without the rows; {default}",
    )


def add_windows(c: argparse.ArgumentParser) -> None:
    c.add_argument("--block-size", type=positive, help="tokens of a window; default: the context")
    c.add_argument("--stride", type=positive, help="tokens between windows; default: half of it")
    c.add_argument("--batch-size", type=positive, default=8, help="windows at once; default: 8")
    c.add_argument(
        "--bos-each-window",
        action=argparse.BooleanOptionalAction,
        help="begin every window with bos; default: where the tokenizer does so by itself",
    )


def add_text_limits(c: argparse.ArgumentParser) -> None:
    c.add_argument("--document-tokens", type=positive, help="only the head of each document")


def add_index_path(c: argparse.ArgumentParser) -> None:
    c.add_argument("--index-path", metavar="FOLDER", help="default: beside the datastore")


def add_search_options(c: argparse.ArgumentParser, k: int | None = None) -> None:
    shown = "as tuned, or 1024" if k is None else k
    c.add_argument("--k", type=positive, default=k, help=f"neighbors; default: {shown}")
    c.add_argument("--index", choices=("exact", "faiss"), help="default: as tuned, or exact")
    add_index_path(c)
    c.add_argument("--nprobe", type=positive, help="lists to visit; default: the index's own")
    c.add_argument(
        "--rescore", action="store_true", default=None, help="real distances on FAISS's choice"
    )


def add_mixture(c: argparse.ArgumentParser) -> None:
    c.add_argument("--temperature", type=positive_float, help="default: as tuned")
    c.add_argument("--lmbda", type=share, help="weight of p_knn; default: as tuned")


# Types of arguments; their names are what argparse calls a wrong value


def positive(text: str) -> int:
    return checked(int, text, lambda value: value >= 1, "a whole number of at least 1")


def natural(text: str) -> int:
    return checked(int, text, lambda value: value >= 0, "a whole number of at least 0")


def positive_float(text: str) -> float:
    return checked(float, text, lambda x: 0 < x < float("inf"), "a number above 0")


def share(text: str) -> float:
    return checked(float, text, lambda x: 0 <= x <= 1, "a number from 0 to 1")


def shares(text: str) -> tuple[float, float, float]:
    from knnext.corpus.documents import check_shares

    try:
        return check_shares([float(part) for part in text.split(",")])
    except ValueError:
        wanted = "three numbers from 0 for train, valid and test, train above 0, as 80,10,10"
        raise argparse.ArgumentTypeError(f"wanted are {wanted}, got {text!r}") from None


def floats(text: str) -> list[float]:
    return [
        checked(float, part, lambda x: x == x, "numbers, as 0.5,1,2") for part in text.split(",")
    ]


def names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def seed(text: str) -> int:
    """What every generator of torch, numpy and FAISS takes."""
    wanted = "a whole number from 0 to 2**63 - 1"
    return checked(int, text, lambda value: 0 <= value < 2**63, wanted)


def seeds(text: str) -> tuple[int, ...]:
    found = tuple(seed(part) for part in text.split(","))
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"wanted are different seeds, got {text!r}")
    return found


def num_bytes(text: str) -> int:
    """``10MB``, ``1.5 GB``, ``2000``: powers of 1000."""
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "B": 1}
    number = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    unit = units.get(text.strip()[len(number) :].upper())
    wanted = "a size, as 10MB or 2000"
    if unit is None:
        raise argparse.ArgumentTypeError(f"wanted is {wanted}, got {text!r}")
    return checked(lambda part: int(float(part) * unit), number, lambda n: n >= 1, wanted, text)


def checked(
    convert: Callable[[str], Any],
    text: str,
    fits: Callable[[Any], bool],
    wanted: str,
    given: str | None = None,
) -> Any:
    try:
        value = convert(text)
        good = fits(value)
    except (ValueError, OverflowError):
        good = False
    if not good:
        raise argparse.ArgumentTypeError(f"wanted is {wanted}, got {given or text!r}")
    return value

"""Options that several commands share, and the types of arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

Check = Callable[[str], Any]
_HIDDEN = argparse.SUPPRESS


def new_command(commands: Any, name: str, run: str, text: str) -> argparse.ArgumentParser:
    """A command that runs ``module:function``; ``text`` is its help."""
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
    )
    command.set_defaults(run=run)
    return command


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
    add_loading(c)


def add_loading(c: argparse.ArgumentParser, default: str = "auto") -> None:
    """How the model of --model is loaded: arguments of `load_lm` (knnext/cli/session.py)."""
    c.add_argument(
        "--model-dtype",
        choices=("auto", "checkpoint", "bfloat16", "float16", "float32"),
        default=default,
        help="auto: as the datastore was built; without one on a GPU the checkpoint's, on the CPU "
        "bfloat16 where checkpoint and processor have it (AMX, AVX-512 BF16), else float32; "
        f"checkpoint: as the files have it; default: {default}",
    )
    c.add_argument(
        "--attn-implementation", metavar="NAME", help="such as sdpa or eager; default: the model's"
    )
    c.add_argument("--revision", help="branch, tag or commit of a hub name")
    c.add_argument("--tokenizer", help="folder or hub name of another tokenizer than the model's")
    c.add_argument("--gguf", metavar="FILE", help="weights in this GGUF file of --model")
    c.add_argument("--adapter", metavar="FOLDER", help="PEFT adapter on the model, such as a LoRA")
    c.add_argument(
        "--merge-adapter",
        action="store_true",
        help="put the adapter into the weights: faster, and rounded once more",
    )
    c.add_argument(
        "--device-map", choices=("auto",), help="auto: spread the model over the GPUs here"
    )
    c.add_argument(
        "--quantization",
        choices=("8bit", "4bit", "torchao:int8wo", "torchao:int8dq", "torchao:float8wo"),
        help="load the weights in fewer bits: by bitsandbytes, or by torchao",
    )
    c.add_argument(
        "--compile",
        action="store_true",
        help="compile the model's blocks, which takes a while and makes long runs faster",
    )


class Renamed(argparse.Action):
    """An option that has another name now: refused with that name."""

    def __init__(self, option_strings: list[str], dest: str, hint: str, **_: Any) -> None:
        super().__init__(option_strings, dest, nargs="?", default=argparse.SUPPRESS, help=_HIDDEN)
        self.hint = hint

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None
    ) -> None:
        parser.error(f"{option} is no option: {self.hint}")


def add_key_dtype(c: argparse.ArgumentParser, default: str | None) -> None:
    shown = "" if default is None else f"; default: {default}"
    c.add_argument(
        "--key-dtype",
        choices=("float16", "bfloat16", "float32"),
        default=default,
        help=f"of the keys{shown}",
    )


def refuse_dtype(c: argparse.ArgumentParser, *, keys: bool, model: bool) -> None:
    """What --dtype was for the keys, and what it is for a model everywhere else."""
    found = ["the keys' is --key-dtype"] if keys else []
    found += ["the model's is --model-dtype"] if model else []
    c.add_argument("--dtype", action=Renamed, hint=", ".join(found))


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


def add_ranks(c: argparse.ArgumentParser) -> None:
    c.add_argument(
        "--rank-timeout",
        type=positive_float,
        default=1800.0,
        metavar="SECONDS",
        help="under torchrun: how long a rank waits for another; default: 1800",
    )


def add_windows(c: argparse.ArgumentParser, *, build: bool = False) -> None:
    c.add_argument(
        "--block-size", type=positive, help="tokens of a window; default: the context, at most 1024"
    )
    part = "three quarters" if build else "half"
    c.add_argument(
        "--stride", type=positive, help=f"tokens between windows; default: {part} of a window"
    )
    c.add_argument(
        "--batch-size", type=positive, help="windows at once; default: as the memory has room"
    )
    c.add_argument(
        "--separate-documents",
        action=argparse.BooleanOptionalAction,
        default=False if build else None,
        help="read each document alone: what stands before a token is then of its own document; "
        + ("default: one stream" if build else "default: as the datastore was built"),
    )
    if not build:
        c.add_argument(
            "--full-last-window",
            action="store_true",
            help="let the last window reach back until it is full, as lm-evaluation-harness does",
        )
    c.add_argument(
        "--bos-each-window",
        action=argparse.BooleanOptionalAction,
        help="begin every window with bos; default: where the tokenizer does so by itself",
    )


def add_parts(c: argparse.ArgumentParser, what: str) -> None:
    """How several processes share the work; under torchrun they do without a word."""
    c.add_argument(
        "--parts",
        type=positive,
        metavar="N",
        help=f"share {what} with other processes that run this same command, anywhere: each takes "
        "parts of N that nobody has taken; default under torchrun: 8 a process",
    )
    c.add_argument(
        "--part",
        type=part,
        metavar="I/N",
        help="make part I of N alone, counted from 1: 1/64 to 64/64 (task 0 of an array of tasks "
        "that counts from 0 makes 1/64); the last one to end joins them, or `knnext join`",
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
    add_documents(c)
    add_search_memory(c)


def add_documents(c: argparse.ArgumentParser) -> None:
    """Which documents of the datastore a search may find (knnext/cli/delete.py)."""
    for name, text in (("include", "find these alone"), ("exclude", "never find these")):
        c.add_argument(
            f"--{name}-documents",
            nargs="+",
            action="append",
            metavar="NAME",
            help=f"documents of the datastore, by name or @FILE with one a line: {text}",
        )


def add_search_memory(c: argparse.ArgumentParser) -> None:
    """Arguments of `ExactIndex` that bound what a search holds at once."""
    c.add_argument(
        "--query-batch", type=positive, help="of exact search: queries at once; default: 4096"
    )
    c.add_argument(
        "--chunk-bytes",
        type=num_bytes,
        metavar="SIZE",
        help="of exact search: keys or codes read at once; default: 268MB (256 MiB)",
    )
    c.add_argument(
        "--resident-bytes",
        type=num_bytes_or_none,
        metavar="SIZE",
        help="of exact search: keys or codes kept in memory between passes if they are no more; "
        "default: 2 GiB, on a GPU half of what is free; 0 keeps none",
    )


def add_mixture(c: argparse.ArgumentParser) -> None:
    c.add_argument("--temperature", type=positive_float, help="default: as tuned")
    c.add_argument("--lmbda", type=share, help="weight of p_knn; default: as tuned")


# Types of arguments; their names are what argparse calls a wrong value


def positive(text: str) -> int:
    return checked(int, text, lambda value: value >= 1, "a whole number of at least 1")


def part(text: str) -> tuple[int, int]:
    """``3/64``: a part and of how many, counted from 1."""
    number, slash, count = text.partition("/")
    wanted = "a part and their number, counted from 1, as 3/64"
    if not slash:
        raise argparse.ArgumentTypeError(f"wanted is {wanted}, got {text!r}")
    found = natural(number), positive(count)
    if found[0] == 0:
        raise argparse.ArgumentTypeError(
            f"parts are counted from 1, got {text!r}: of tasks that are counted from 0, task T "
            f"makes part T + 1, here 1/{found[1]}"
        )
    if found[0] > found[1]:
        raise argparse.ArgumentTypeError(
            f"the parts are 1/{found[1]} to {found[1]}/{found[1]}, got {text!r}"
        )
    return found


def natural(text: str) -> int:
    return checked(int, text, lambda value: value >= 0, "a whole number of at least 0")


def port(text: str) -> int:
    return checked(int, text, lambda n: 0 <= n <= 65535, "a port from 0 (any free one) to 65535")


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


def num_bytes_or_none(text: str) -> int:
    return 0 if text.strip() == "0" else num_bytes(text)


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

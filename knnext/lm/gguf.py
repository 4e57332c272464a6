"""Models in a GGUF file, which transformers reads and dequantizes."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from knnext.errors import MissingFileError, ModelError, missing_package

_MAGIC = b"GGUF"


def split_gguf(path: str | Path, gguf: str | Path | None) -> tuple[str | Path, str | None]:
    """(folder or hub name, name of the file in it): a path that is itself a GGUF file is split."""
    if gguf is None:
        file = Path(path).expanduser()
        if file.suffix.lower() == ".gguf" and file.is_file():
            return file.parent, file.name
        return path, None
    return path, str(gguf)


def check_gguf(folder: Path, name: str) -> Path:
    """The file. MissingFileError or ModelError where the folder has no such GGUF file."""
    check_libraries()
    file = folder / Path(name).expanduser()  # an absolute name stays what it is
    if not file.is_file():
        there = sorted(path.name for path in folder.glob("*.gguf"))
        hint = f" (there: {', '.join(there[:5])})" if there else ""
        raise MissingFileError(f"no GGUF file {name} in {folder}{hint}")
    with file.open("rb") as content:
        head = content.read(len(_MAGIC))
    if head != _MAGIC:
        raise ModelError(f"{file} is no GGUF file: it begins with {head!r}, not {_MAGIC!r}")
    return file


def check_libraries() -> None:
    """MissingPackageError that says what to install, where transformers could not read GGUF."""
    for package in ("gguf", "accelerate"):
        try:
            __import__(package)
        except ImportError as error:
            raise missing_package("GGUF files need", package, "gguf") from error


def gguf_type(file: Path) -> str:
    """The type that most of the file's bytes are in, such as "GGUF Q4_1".

    ModelError where the file cannot be read to its end.
    """
    from gguf import GGUFReader

    try:
        tensors = GGUFReader(str(file)).tensors
    except Exception as error:  # whatever numpy says of bytes that are not there
        line = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ModelError(f"{file} is damaged or cut short ({line})") from error
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_bytes)
    return f"GGUF {sizes.most_common(1)[0][0]}" if sizes else "GGUF"


@contextmanager
def quiet_conversion() -> Iterator[None]:
    """No bar of transformers' GGUF reader inside the block, where stderr is no terminal."""
    from transformers import modeling_gguf_pytorch_utils

    reader: Any = modeling_gguf_pytorch_utils
    bar = getattr(reader, "tqdm", None)
    if bar is None or sys.stderr.isatty():
        yield
        return
    reader.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        reader.tqdm = bar

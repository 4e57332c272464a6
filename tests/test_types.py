"""What a type checker sees of the package from a program outside of it."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

PROGRAM = """
from __future__ import annotations

import torch
from torch import Tensor

import knnext
from knnext import KNNLM, Datastore, ExactIndex, FaissIndex
from knnext.errors import KnnextError
from knnext.evaluation import Evaluation


def nearest(store: Datastore, queries: Tensor) -> tuple[Tensor, Tensor]:
    return ExactIndex(store).search(queries, 10)


def perplexities(found: Evaluation) -> list[str]:
    return [str(found)]


def mixed(logits: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    try:
        distances, indices = knnext.knn_search(logits, keys, k=8)
    except (KnnextError, ValueError):
        raise SystemExit("no") from None
    tokens = knnext.gather_tokens(values, indices)
    return knnext.knn_interpolate(logits, distances, tokens, temperature=1.0, lmbda=0.25)


reveal_type(Datastore.open("store"))  # Datastore
reveal_type(ExactIndex(Datastore.open("store")))  # ExactIndex
reveal_type(FaissIndex.open("i", Datastore.open("store")))  # FaissIndex
reveal_type(KNNLM(torch.nn.Linear(1, 1), None, 8, 1.0, 0.5))  # KNNLM
reveal_type(mixed)  # Tensor
reveal_type(knnext.knn_search)  # Tensor
reveal_type(knnext.knn_softmax)  # Tensor
reveal_type(knnext.evaluate)  # Evaluation
reveal_type(knnext.load_corpus("stdlib"))  # Corpus
ExactIndex(3)  # error
"""

#: What we import and users check, if at all, on their own account; they would take minutes.
OTHERS = "transformers tokenizers datasets matplotlib pyarrow scipy peft gguf accelerate starlette "
OTHERS += "uvicorn faiss huggingface_hub lm_eval shtab"

CONFIGURED = """
import distutils.core
built = distutils.core.run_setup("setup.py", stop_after="commandline")
print(built.get_command_obj("editable_wheel").mode)
"""

MYPY = (sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "cache")


def test_the_marker_is_there_and_goes_into_wheels() -> None:
    assert (ROOT / "knnext" / "py.typed").is_file()
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^knnext = \[.*"py\.typed"', text, re.MULTILINE)


def test_an_editable_install_is_a_path_and_no_hook() -> None:
    """Type checkers run no import hooks: a path is all that they follow."""
    done = subprocess.run(
        [sys.executable, "-c", CONFIGURED], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("compat\n", ""), "and nobody is warned"


@pytest.mark.slow
def test_a_strict_program_sees_types(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    site = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(site)], check=True)
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    paths = f"{sysconfig.get_paths()['purelib']}\n{ROOT}\n"  # as an editable install has them
    (site / "lib" / version / "site-packages" / "knnext.pth").write_text(paths)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    skipped = ",".join(f"{name}.*" for name in OTHERS.split())
    config = f"[mypy]\nstrict = true\n[mypy-{skipped}]\n"
    (tmp_path / "mypy.ini").write_text(f"{config}follow_imports = skip\n")
    done = subprocess.run(
        [*MYPY, "--python-executable", str(site / "bin" / "python"), str(program)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    notes = {int(n): text for n, text in re.findall(r":(\d+): note: Revealed (.*)", done.stdout)}
    wanted = [
        (number, line.rpartition("# ")[2])
        for number, line in enumerate(PROGRAM.splitlines(), start=1)
        if line.startswith("reveal_type")
    ]
    assert len(wanted) == 9
    for number, name in wanted:
        assert name in notes[number].rpartition("->")[2], f"{notes[number]}\n{done.stdout}"
    last = len(PROGRAM.splitlines())
    errors = re.findall(r":(\d+): error: .*\[([\w-]+)\]$", done.stdout, re.MULTILINE)
    assert errors == [(str(last), "arg-type")], done.stdout + done.stderr

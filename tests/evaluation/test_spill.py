"""Neighbors that lie in a file: the same figures, and memory that does not grow with the text."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from knnext.evaluation import evaluate, spill
from knnext.evaluation.scores import StreamScores
from knnext.evaluation.tune import tune


def scores_of(count: int = 700, k: int = 9) -> StreamScores:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(-1, 6, (count, k), generator=generator, dtype=torch.int32)
    tokens[5] = -1
    distances = torch.rand(count, k, generator=generator).sort(1).values * 9
    return StreamScores(
        log_p_lm=-torch.rand(count, generator=generator) * 5,
        targets=torch.randint(0, 6, (count,), generator=generator),
        document_ids=torch.arange(count) // 50,
        ends_document=torch.zeros(count, dtype=torch.bool),
        distances=distances.masked_fill(tokens < 0, torch.inf),
        tokens=tokens,
        indices=torch.where(tokens < 0, -1, tokens).long(),
    )


def spilled(scores: StreamScores) -> StreamScores:
    moved = {}
    for name in ("distances", "tokens", "indices"):
        tensor = getattr(scores, name)
        moved[name] = spill.empty_rows(*tensor.shape, tensor.dtype)
        moved[name].copy_(tensor)
        spill.release(moved[name])
    return replace(scores, **moved)


@pytest.fixture()
def files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Everything goes to files in the folder given, and is read a few rows at a time."""
    monkeypatch.setattr(spill, "MEMORY_BYTES", 0)
    monkeypatch.setattr(spill, "_PIECE_BYTES", 1000)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def test_figures_are_the_same_to_the_bit(files: Path) -> None:
    scores = scores_of()
    mapped = spilled(scores)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spill, "_PIECE_BYTES", 1 << 30)  # all rows at once
        whole = scores.log_p_knn(0.7), scores.has_neighbors, scores.target_found
    for name in ("distances", "tokens", "indices"):
        assert torch.equal(getattr(mapped, name), getattr(scores, name))
    parts = mapped.log_p_knn(0.7), mapped.has_neighbors, mapped.target_found
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert torch.equal(mapped.truncate(3).log_p_knn(2.0), scores.truncate(3).log_p_knn(2.0))
    assert evaluate(mapped, 0.7, 0.3).mixture == evaluate(scores, 0.7, 0.3).mixture
    grid = {"temperatures": [0.5, 2.0], "lmbdas": [0.1, 0.4]}
    one, other = tune(mapped, **grid), tune(scores, **grid)
    assert np.array_equal(one.surface, other.surface) and one.nll == other.nll


def test_files_are_gone_with_the_tensors(files: Path) -> None:
    mapped = spilled(scores_of())
    view = mapped.distances[:5, :2]
    assert list(files.iterdir()) == [] and len(spill._mapped) >= 3
    del mapped
    gc.collect()
    spill.release(view, None, torch.zeros(3))  # a view keeps its file, others have none
    assert view.sum() > 0
    del view
    gc.collect()
    assert len(spill._mapped) == 0


@pytest.mark.parametrize("k", [1, 9])
def test_kept_scores_are_read_into_files_too(files: Path, tmp_path: Path, k: int) -> None:
    scores = scores_of()
    spilled(scores).truncate(k).save(tmp_path / "scores.npz")
    loaded = StreamScores.load(tmp_path / "scores.npz")
    assert loaded.distances.untyped_storage().data_ptr() in spill._mapped
    for name in ("log_p_lm", "distances", "tokens", "indices", "ends_document"):
        wanted, found = getattr(scores.truncate(k), name), getattr(loaded, name)
        assert torch.equal(found, wanted) and found.dtype == wanted.dtype, name
    with np.load(tmp_path / "scores.npz", allow_pickle=False) as archive:  # by anyone
        assert np.array_equal(archive["distances"], scores.truncate(k).distances.numpy())


@pytest.mark.parametrize("where", [0.1, 0.5, 0.9])
def test_damage_is_seen(files: Path, tmp_path: Path, where: float) -> None:
    path = tmp_path / "scores.npz"
    scores_of().save(path)
    content = bytearray(path.read_bytes())
    content[int(len(content) * where)] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(ValueError, match="does not hold scores"):
        StreamScores.load(path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="does not hold scores"):
        StreamScores.load(path)


def test_what_numpy_wrote_is_read(tmp_path: Path) -> None:
    """Files of before were written by np.savez."""
    scores = scores_of()
    scores.save(tmp_path / "new.npz")
    with np.load(tmp_path / "new.npz") as archive:
        np.savez(tmp_path / "old.npz", allow_pickle=False, **archive)
    assert torch.equal(StreamScores.load(tmp_path / "old.npz").tokens, scores.tokens)


def test_a_disk_without_room(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"want 100 B on the disk of .*TMPDIR"):
        spill.empty_rows(25, 1, torch.float32)


_CHILD = """
    import resource, sys
    import torch
    from knnext.evaluation import evaluate, search_stream, spill
    from knnext.evaluation.scores import StreamScores
    from knnext.evaluation.pieces import run_model
    from knnext.evaluation.tune import tune
    from knnext.lm import hidden_states
    from tests.evaluation.noise import NoiseIndex, noise_states, text_of

    spill.MEMORY_BYTES = 1 << 20
    hidden_states.hidden_states = noise_states

    def run(count):
        text = text_of(count)
        options = {"k": 1024, "batch_size": 8, "query_batch": 256, "allow_overlap": True}
        scores = search_stream(None, NoiseIndex(), text, **options)
        evaluate(scores, 1.0, 0.3)
        tune(scores, [1.0, 2.0], [0.1, 0.5], refine=False)
        scores.save(sys.argv[1])
        evaluate(StreamScores.load(sys.argv[1]), 1.0, 0.3)
        run_model(None, text, "att", torch.float32, {})
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    before = run(2_000)
    print((run(6_000) - before) / 4_000)
"""


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    """Neighbors of k = 1024 take 16 KB a token with their indices; kept in memory, twice that."""
    script = textwrap.dedent(_CHILD)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "scores.npz")],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert float(done.stdout) < 6_000, "bytes a token"

"""Distillation data as loaders read it: workers, shuffling, ranks, other folders, damage."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from knnext.distill import DistillationData, collate
from knnext.errors import CorruptDatastoreError, DatastoreError
from tests.distill.test_distill import Made, rows, run
from tests.distill.test_distill import made as made  # a fixture

pytest.importorskip("pyarrow")


@pytest.fixture(scope="module")
def folder(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("data") / "D"
    run(made, found, shard_tokens=60)
    assert len(list(found.glob("*.parquet"))) > 2
    return found


def labels(loader: DataLoader[Any]) -> list[int]:
    return [label for batch in loader for label in batch["labels"][batch["mask"]].tolist()]


SPAWN = pytest.param("spawn", False, marks=pytest.mark.slow)  # imports torch anew


@pytest.mark.parametrize(("begin", "shuffle"), [("fork", False), ("fork", True), SPAWN])
def test_workers_read_each_token_once(begin: str, shuffle: bool, folder: Path) -> None:
    data = DistillationData(folder, 16)
    first = data[0]["labels"].tolist()  # files are open here before workers begin
    loader = DataLoader(
        data, batch_size=3, shuffle=shuffle, num_workers=2, collate_fn=collate,
        multiprocessing_context=begin, persistent_workers=True,
    )  # fmt: skip
    wanted = rows(folder)["token"]
    for _ in range(2):
        found = labels(loader)
        assert sorted(found) == sorted(wanted)
        assert shuffle or found == wanted
    assert data[0]["labels"].tolist() == first


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_of_a_training_divide_it(size: int, folder: Path) -> None:
    data = DistillationData(folder, 8)
    seen: list[int] = []
    for rank in range(size):
        sampler = DistributedSampler(data, size, rank, shuffle=True, drop_last=True)
        sampler.set_epoch(1)
        seen += list(sampler)
        loader = DataLoader(data, batch_size=2, sampler=sampler, collate_fn=collate)
        assert sum(len(batch["labels"]) for batch in loader) == len(data) // size
    assert len(set(seen)) == len(seen) and len(seen) > len(data) - size


def test_files_are_found_from_any_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    data = DistillationData("D", 16)
    monkeypatch.chdir(tmp_path)
    assert data[len(data) - 1]["labels"].tolist() == rows(folder)["token"][-len(data[-1]["tail"]) :]


def test_any_damaged_byte_is_known_or_means_nothing(folder: Path, tmp_path: Path) -> None:
    """Pages have checksums, and what lies between them is compared with the plan."""
    copy = tmp_path / "D"
    shutil.copytree(folder, copy)
    path = copy / "tokens-00001.parquet"
    content = path.read_bytes()
    wanted = [item["labels"].tolist() for item in iterate(DistillationData(copy, 16))]
    known = 0
    for place in range(0, len(content), len(content) // 60):
        damaged = bytearray(content)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        try:
            found = [item["labels"].tolist() for item in iterate(DistillationData(copy, 16))]
            assert found == wanted
        except CorruptDatastoreError as error:
            known += "tokens-00001" in str(error)
    assert known > 30


def iterate(data: DistillationData) -> Any:
    return (data[number] for number in range(len(data)))


def test_a_file_that_another_program_wrote_anew(folder: Path, tmp_path: Path) -> None:
    from pyarrow import parquet

    copy = tmp_path / "D"
    shutil.copytree(folder, copy)
    path = copy / "tokens-00000.parquet"
    table = parquet.read_table(path)
    parquet.write_table(table, path, row_group_size=7)
    with pytest.raises(CorruptDatastoreError, match=r"in groups of 4,096; it has \d+ rows in"):
        DistillationData(copy)[0]
    parquet.write_table(table.drop_columns(["tail"]), path)
    with pytest.raises(CorruptDatastoreError, match="is not the shard that"):
        DistillationData(copy)[0]


@pytest.mark.parametrize(
    "wrong",
    ["[]", "null", "{", '{"magic": "knnext-distillation", "format_version": 1}',
     '{"magic": "knnext-distillation", "format_version": 1, "tokens": 5, "shards": [4], "top": 2}',
     '{"magic": "knnext-distillation", "format_version": 1, "tokens": 5, "shards": 5, "top": []}',
     '{"magic": "knnext-distillation", "format_version": 2}', "[" * 100_000],
)  # fmt: skip
def test_a_plan_that_is_none(wrong: str, tmp_path: Path) -> None:
    (tmp_path / "distill.json").write_text(wrong)
    with pytest.raises(DatastoreError, match=r"is not what `knnext distill|reads version 1"):
        DistillationData(tmp_path)


def test_damage_that_the_disk_tells_of_stays_what_it_is(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "D"
    shutil.copytree(folder, copy)
    data = DistillationData(copy)
    (copy / "tokens-00000.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="tokens-00000"):
        data[0]
    assert isinstance(torch.stack([data[len(data) - 1]["tail"]]), torch.Tensor)

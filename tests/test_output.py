"""Files that commands leave behind: whole or absent, named where the disk is full."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from knnext import output
from knnext.evaluation import StreamScores, write_token_log
from knnext.output import check_outputs, check_writable, whole_file, write_json, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"name": "\udc80"})
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError), whole_file(path) as part:
        part.write_text("half")
        raise ZeroDivisionError
    assert path.read_bytes() == before and names(tmp_path) == ["a.json"]


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    """Each has a part of its own; what is there in the end is whole, of the last to end."""
    path = tmp_path / "a.json"
    with whole_file(path) as one:
        one.write_text("one")
        with whole_file(path) as other:
            other.write_text("other")
            assert one != other and one.read_text() == "one"
        assert path.read_text() == "other"
    assert path.read_text() == "one" and names(tmp_path) == ["a.json"]


# The module alone, without the package's own, which loads torch.
ALONE = """
import sys, types
sys.modules["knnext"] = types.ModuleType("knnext")
sys.modules["knnext"].__path__ = [sys.argv[1]]
from knnext.output import check_writable, scratch_folder, whole_file, write_json
from pathlib import Path
path = Path(sys.argv[2])
"""
HERE = str(Path(output.__file__).parent)
WRITE = """
for i in range(200):
    check_writable(path)
    write_json(path, [i] * 1000)
"""


def test_two_processes_that_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    command = [sys.executable, "-c", ALONE + WRITE, HERE, str(path)]
    writers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        ends = [writer.communicate(timeout=120) for writer in writers]
    finally:
        for writer in writers:
            writer.kill()
    assert [writer.returncode for writer in writers] == [0, 0], ends
    assert json.loads(path.read_text()) == [199] * 1000 and names(tmp_path) == ["a.json"]


# It tells when it has a part, and is killed or let end.
HOLD = """
is_file = sys.argv[3] == "file"
with (whole_file if is_file else scratch_folder)(path) as part:
    (part if is_file else part / "within").write_text("half")
    print("has", flush=True)
    input()
"""


@contextmanager
def holding(path: Path, kind: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that has a part of this path."""
    command = [sys.executable, "-c", ALONE + HOLD, HERE, str(path), kind]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, **pipes)
    try:
        assert process.stdout is not None and process.stdout.readline() == "has\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_killed_writers_left_goes_with_the_next(tmp_path: Path, kind: str) -> None:
    """And not what a living one writes, nor what is of another name."""
    path = tmp_path / "a[s].json"
    others = {"a[s].json.part", "a[s].jsonl.1-0.part", "as.json.1-0.part", "a[s].json.1-0.part.b"}
    for name in others:
        (tmp_path / name).touch()
    with holding(path, kind) as killed, holding(path, kind) as living:
        killed.kill()
        killed.wait()
        left = set(names(tmp_path)) - others
        assert len(left) == 2
        for write in (lambda: write_json(path, 1), lambda: check_writable(path)):
            write()
            (of_the_living,) = {*names(tmp_path)} - others - {path.name}
            assert of_the_living in left
        living.communicate("\n")
        assert living.returncode == 0
    assert set(names(tmp_path)) == {path.name, *others}
    assert path.read_text() == ("half" if kind == "file" else "1\n")


def test_a_part_that_another_takes_for_left_before_it_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, taken = output._opened, []

    def slow(path: Path) -> int:
        if not taken:
            taken.append(path)
            path.unlink()
        return real(path)

    monkeypatch.setattr(output, "_opened", slow)
    write_json(tmp_path / "a", 1)
    assert len(taken) == 1 and names(tmp_path) == ["a"]


def test_a_name_that_a_process_with_our_number_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in another container over the same disk."""
    with whole_file(tmp_path / "a") as theirs:
        theirs.write_text("theirs")
        monkeypatch.setattr(output, "_numbers", iter([int(theirs.name[2:-5].split("-")[1], 16), 9]))
        write_json(tmp_path / "a", 1)
        assert theirs.read_text() == "theirs"


def test_without_locks_nothing_is_taken_for_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("fcntl.flock", refuse)
    with whole_file(tmp_path / "a") as part:
        write_json(tmp_path / "a", 1)
        assert part.exists()
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("where", ["pipe", "/dev/null", "/dev/full"])
def test_what_is_no_file_is_left_alone(tmp_path: Path, where: str) -> None:
    path = tmp_path / where  # an absolute path stays as it is
    if where == "pipe":
        os.mkfifo(path)
    before = path.stat().st_mode
    with pytest.raises(OSError, match=f"not a regular file.*{path}"):
        check_writable(path)
    with pytest.raises(OSError, match="not a regular file"):
        write_json(path, 1)
    assert path.stat().st_mode == before


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link, target = tmp_path / "link.json", tmp_path / "real" / "a.json"
    link.symlink_to(target)  # of which nothing is there yet
    for content in (1, 2):
        write_json(link, content)
        assert link.is_symlink() and json.loads(target.read_text()) == content
    assert names(tmp_path / "real") == ["a.json"]


def test_what_cannot_be_written_is_named_before(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert check_writable(tmp_path / "new") == tmp_path / "new"
    for path in (tmp_path, tmp_path / "none" / "a", tmp_path / "file" / "a"):
        with pytest.raises(OSError, match=str(path)):
            check_writable(path)
    assert names(tmp_path) == ["file"]


def test_two_outputs_are_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_outputs("a", None, tmp_path / "b", reads=(None, "c"))
    for outputs, reads in ((("a", str(tmp_path / "a")), ()), (("a",), (tmp_path / "a",))):
        with pytest.raises(ValueError, match="would be written over"):
            check_outputs(*outputs, reads=reads)
    assert names(tmp_path) == []


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """A file may grow to so many bytes here, which a full disk does not differ from."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def text(path: Path) -> Callable[[], None]:
    return lambda: write_text(path, "x" * 500_000)


def scores(path: Path) -> Callable[[], None]:
    n = torch.zeros(30_000, dtype=torch.int64)
    wide = n[:, None]
    return lambda: StreamScores(n.float(), n, n, n.bool(), wide.float(), wide.int()).save(path)


def log(path: Path) -> Callable[[], None]:
    n = torch.arange(90_000)
    wide = n[:, None]
    made = StreamScores(n.sin(), n, n % 7, n < 0, wide.float(), wide.int())
    return lambda: write_token_log(made, path, 1.0, 0.5)


def picture(path: Path) -> Callable[[], None]:
    from matplotlib.figure import Figure

    from knnext.report.plots import save_figure

    figure = Figure(figsize=(6, 6))
    figure.figimage(torch.rand(600, 600).numpy())
    return lambda: save_figure(figure, path)


def index(path: Path) -> Callable[[], None]:
    import faiss

    from knnext.index.faiss_build import _write

    flat = faiss.IndexFlatL2(64)
    flat.add(torch.zeros(2000, 64).numpy())
    return lambda: _write(path, flat)


@pytest.mark.parametrize(
    ("what", "name", "needs"),
    [
        (text, "a.txt", "torch"),
        (scores, "a.npz", "torch"),
        (log, "a.jsonl", "torch"),
        (log, "a.parquet", "pyarrow.parquet"),
        (picture, "a.png", "matplotlib"),
        (index, "a.faiss", "faiss"),
    ],
)
def test_a_full_disk_names_the_file_and_keeps_none(
    tmp_path: Path, what: Callable[[Path], Callable[[], None]], name: str, needs: str
) -> None:
    pytest.importorskip(needs)
    write = what(tmp_path / name)
    with full_disk(200_000), pytest.raises(OSError) as caught:
        write()
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(tmp_path / name) and names(tmp_path) == []
    write()
    assert names(tmp_path) == [name]


def test_a_full_disk_whatever_the_library_calls_it(tmp_path: Path) -> None:
    with full_disk(1000):
        with pytest.raises(OSError, match=r"a\.bin") as caught, whole_file(tmp_path / "a.bin"):
            raise RuntimeError("write error in C++")
        with pytest.raises(OSError, match=r"b\.txt"):
            write_text(tmp_path / "b.txt", "x" * 2000)
    assert caught.value.errno == errno.EFBIG and names(tmp_path) == []
    with pytest.raises(RuntimeError, match="no disk"), whole_file(tmp_path / "a.bin"):
        raise RuntimeError("no disk in it")

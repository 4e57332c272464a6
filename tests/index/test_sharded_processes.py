"""ShardedIndex in processes of torchrun's: the bits of one process, over gloo; and ends."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.index.test_exact import grid_keys, make_datastore
from tests.index.threads import PATIENCE as GROUP_PATIENCE
from tests.launch import TORCHRUN, ended, on_machines, on_processes, processes, two_machines

PROGRAM = "tests.index.sharded_program"


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_searches_of_torchruns_processes_are_those_of_one(tmp_path: Path, size: int) -> None:
    words = ["--nproc-per-node", str(size), "-m", PROGRAM, str(tmp_path), "16"]
    with processes([*TORCHRUN, "--standalone", *words]) as [process]:
        code, out, err = ended(process)
    assert code == 0, err
    said = [f"rank {rank} of {size}: the same in 16 cases" for rank in range(size)]
    assert all(line in out for line in said), out


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_lost_in_a_search_ends_all_others(tmp_path: Path, number: signal.Signals) -> None:
    store = make_datastore(tmp_path / "ds", grid_keys(900))
    with on_processes([PROGRAM, str(store.path)], 3) as begun:
        assert begun[0].stdout is not None and begun[0].stdout.readline() == "searching\n"
        os.killpg(begun[1].pid, number)
        lost, causes = time.monotonic(), []
        for process in (begun[0], begun[2]):
            code, _, err = ended(process)
            [said] = [line for line in err.splitlines() if line.startswith("lost:")]
            assert code == 1 and "lost the other ranks" in said
            causes.append(said)
        # Whoever notices ends, and is then itself lost to the last one.
        late = "did not answer within 8 s" if number == signal.SIGSTOP else "has gone"
        assert any(late in said for said in causes), causes
        # Nothing goes on in them for as long as the group would wait, which is far longer.
        assert time.monotonic() - lost < 0.75 * GROUP_PATIENCE


@pytest.mark.slow
def test_a_cable_that_is_cut_in_a_search_ends_in_one_sentence(tmp_path: Path) -> None:
    store = make_datastore(tmp_path / "ds", grid_keys(900))
    with (
        two_machines() as machines,
        on_machines(machines, [PROGRAM, str(store.path)]) as begun,
    ):
        assert begun[0].stdout is not None and begun[0].stdout.readline() == "searching\n"
        name, cable = machines[0].split()
        subprocess.run(["ip", "-n", name, "link", "set", cable, "down"], check=True)
        found = [ended(process) for process in begun]
        assert all(code for code, _, _ in found)
        said = [line for *_, err in found for line in err.splitlines() if line.startswith("lost:")]
        # torchrun ends a rank whose machine has lost the first one, maybe before it can say so.
        assert said and all("did not answer within 8 s" in line for line in said), found

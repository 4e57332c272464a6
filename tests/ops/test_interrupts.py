"""Ctrl-C, or any signal whose handler raises, ends a long op at once and leaves it whole.

No clock decides: the inputs would keep an op busy for minutes (they are expanded, and take no
memory), so an op that ends was ended. The parent sends signals for as long as its child lives; the
child's handler lets those pass that find no op at work.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.index.stores import DIM, make_datastore
from tests.ops.mixing_cases import ROOT

PRELUDE = """
import os, signal, sys, threading
import torch, knnext

class Stop(Exception):
    pass

inside, raises, calls = False, KeyboardInterrupt, 0

def handler(number, frame):
    global calls
    calls += 1
    if inside and raises is not None:
        raise raises("from the handler")

def run(name, op):
    global inside
    try:
        inside = True
        op()
        inside = False
        print(name, "finished", flush=True)
    except BaseException as error:
        inside = False
        print(name, "ended by", type(error).__name__, *error.args, flush=True)

def wide(rows, dim=256, dtype=torch.float32):
    return torch.linspace(0, 1, dim, dtype=dtype).expand(rows, dim)

def ids(rows, width, top=5):
    return torch.arange(rows).remainder(top)[:, None].expand(rows, width)

signal.signal(signal.SIGINT, handler)
signal.signal(signal.SIGUSR1, handler)
ROWS, K, LOG = 1 << 22, 1 << 12, 1 << 40
ops = torch.ops.knnext
q, x = wide(300), wide(4000)
right = knnext.knn_search(torch.eye(9, 5), torch.eye(7, 5), 3)
"""
CHECK = """
for a, b in zip(knnext.knn_search(torch.eye(9, 5), torch.eye(7, 5), 3), right):
    assert torch.equal(a, b)
print("as before", flush=True)
"""
D, T = "wide(ROWS, K)", "ids(ROWS, K, 2)"
OPS = {
    "few_queries": "knnext.knn_search(wide(2), wide(LOG), 3)",
    "many_queries": "knnext.knn_search(wide(60_000), wide(LOG), 3)",
    "inner_product": "knnext.knn_search(q, wide(LOG), 3, 'ip')",
    "refined": "knnext.knn_search(q, wide(LOG), 3, refine=True)",
    "half": "knnext.knn_search(q.half(), wide(1, 256).half().expand(LOG, 256), 3)",
    "torch_ops": "ops.knn_search(q, wide(LOG), 3)",
    "torch_ops_default": "ops.knn_search.default(q, wide(LOG), 3)",
    "compiled": "compiled(q, wide(LOG))",
    "by_codes": (
        "(lambda x: knnext.knn_search(wide(ROWS), x, 3, codes=knnext.encode_keys(x)))"
        "(torch.rand(4000, 256))"
    ),
    "encode_keys": "knnext.encode_keys(wide(1 << 14, 1 << 14), torch.zeros(1 << 14))",
    "rescore": "knnext.rescore(wide(64, 1 << 14), wide(5, 1 << 14), ids(64, 1 << 18))",
    "rescore_float64": (
        "knnext.rescore(wide(64, 1 << 14, torch.float64), wide(5, 1 << 14, torch.float64),"
        " ids(64, 1 << 18))"
    ),
    "rescore_gradients": (
        "ops._rescore_gradients(torch.ones(1, 1).expand(64, 1 << 18), wide(64, 1 << 14),"
        " wide(5, 1 << 14), ids(64, 1 << 18), None, 'l2', True)"
    ),
    "merge_topk": f"knnext.merge_topk({D}, {T}, 1)",
    "knn_softmax": f"knnext.knn_softmax({D}, {T}, 1.0, 2)",
    "knn_softmax_one_temperature_a_row": f"knnext.knn_softmax({D}, {T}, torch.ones(ROWS), 2)",
    "knn_interpolate": f"knnext.knn_interpolate(wide(ROWS, 2), {D}, {T}, 1.0, 0.5)",
    "knn_target_log_prob": f"knnext.knn_target_log_prob({D}, {T}, torch.zeros(ROWS).long(), 1.0)",
}
COMPILED = """
compiled = torch.compile(
    lambda q, x: knnext.knn_search(q, x, 3)[0] + 1, fullgraph=True, backend="aot_eager"
)
compiled(q, x)
"""


def while_signalled(code: str, number: int = signal.SIGINT) -> list[str]:
    """Lines of a child, itself the leader of a process group that gets the signal again and again.

    It is told of from its first line on; before, its handler may not be there.
    """
    child = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + "print('ready', flush=True)\n" + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    assert child.stdout is not None
    try:
        lines = [child.stdout.readline()]
        while lines[0].strip() == "ready":
            try:
                child.wait(0.02)
                break
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, number)
        return [line.strip() for line in [*lines, *child.stdout]]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ctrl_c_ends_every_long_op() -> None:
    calls = "".join(f"run({name!r}, lambda: {call})\n" for name, call in OPS.items())
    _, *ends, last = while_signalled(COMPILED + calls + CHECK)
    assert ends == [f"{name} ended by KeyboardInterrupt from the handler" for name in OPS]
    assert last == "as before"


def test_what_a_handler_raises_arrives_and_one_that_returns_ends_nothing() -> None:
    code = f"""
raises = Stop
run("search", lambda: {OPS["torch_ops"]})
raises, calls = None, 0
def patient(number, frame):
    global calls
    calls += 1
    if calls == 5:
        raise Stop("the fifth")
signal.signal(signal.SIGUSR1, patient)
run("search", lambda: {OPS["many_queries"]})
"""
    said = while_signalled(code + CHECK, signal.SIGUSR1)
    assert said[1:] == [
        "search ended by Stop from the handler",
        "search ended by Stop the fifth",
        "as before",
    ]


@pytest.mark.slow
def test_memory_of_an_interrupted_op_is_free_again() -> None:
    code = f"""
from tests.ops.memory import allocated_bytes
def interrupted():
    run("search", lambda: {OPS["many_queries"]})
interrupted(), interrupted()
before = allocated_bytes()
for _ in range(5):
    interrupted()
print("grown by", (allocated_bytes() - before) >> 20, "MiB", flush=True)
"""
    said = while_signalled(code)
    assert said[1:-1] == ["search ended by KeyboardInterrupt from the handler"] * 7
    assert said[-1] == "grown by 0 MiB"


@pytest.mark.slow
def test_an_op_of_another_thread_is_left_alone() -> None:
    code = (
        """
results, done, finished, inside = [], threading.Event(), threading.Event(), True
def search():
    while not done.is_set() or len(results) < 5:
        try:
            results.append([t.clone() for t in knnext.knn_search(q, x, 3)])
        except BaseException as error:
            results.append(error)
    finished.set()
worker = threading.Thread(target=search)
try:
    worker.start()
    finished.wait()
except KeyboardInterrupt as error:
    inside = False
    print("main thread", type(error).__name__, flush=True)
done.set()
finished.wait()
assert results and not [r for r in results if isinstance(r, BaseException)], results
"""
        + CHECK
    )
    assert while_signalled(code)[1:] == ["main thread KeyboardInterrupt", "as before"]


@pytest.mark.slow
def test_a_forked_child_is_interrupted_too() -> None:
    code = f"""
torch.set_num_threads(1)
child = os.fork()
if child == 0:
    run("forked", lambda: {OPS["torch_ops"]})
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    said = while_signalled(code + CHECK)
    assert said[1:] == ["forked ended by KeyboardInterrupt from the handler", "as before"]


@pytest.mark.slow
def test_a_search_of_an_index_is_interrupted_within_its_op(tmp_path: Path) -> None:
    make_datastore(tmp_path / "store", torch.rand(4000, DIM))
    code = f"""
index = knnext.ExactIndex(knnext.Datastore.open({str(tmp_path / "store")!r}), query_batch=1 << 40)
run("index", lambda: index.search(wide(1 << 25, {DIM}), k=1))
"""
    assert while_signalled(code)[1:] == ["index ended by KeyboardInterrupt from the handler"]


@pytest.mark.slow
def test_an_interrupt_in_a_backward_pass_arrives_as_itself() -> None:
    code = """
keys = torch.rand(5, 1 << 14, requires_grad=True)
distances = knnext.rescore(torch.rand(64, 1 << 14), keys, ids(64, 1 << 13))
run("backward", lambda: distances.sum().backward())
"""
    assert while_signalled(code)[1:] == ["backward ended by KeyboardInterrupt from the handler"]

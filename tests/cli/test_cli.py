"""The command line: what it accepts, how it fails, and a whole run on a tiny corpus."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from knnext import cli
from knnext.cli import main, plain
from knnext.cli.arguments import num_bytes
from knnext.cli.parser import build_parser

COMMANDS = "demo plan build join index tune eval search generate info import doctor".split()  # noqa: SIM905
WORDS = "the a row key value state of next token near far text model and store".split()  # noqa: SIM905


def python_m_knnext(*words: str, **options: Any) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", "knnext", *words], **{**pipes, **options})


# The parser


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "--json" in out and "--debug" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_leads_to_a_function(command: str) -> None:
    import importlib

    subparsers = build_parser()._subparsers
    assert subparsers is not None
    chosen = subparsers._group_actions[0].choices[command]  # type: ignore[index,call-overload]
    module, function = chosen.get_default("run").split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import knnext

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"knnext {knnext.__version__}\n"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "COMMAND"),
        (["nonsense"], "nonsense"),
        (["build", "store"], "--model"),
        (["info"], "datastore"),
        (["search", "s", "text", "--model", "m", "--k", "0"], "at least 1"),
        (["eval", "s", "--lmbda", "1.5"], "from 0 to 1"),
        (["eval", "s", "--temperature", "nan"], "above 0"),
        (["tune", "s", "--temperatures", "1,x"], "0.5,1,2"),
        (["demo", "--max-bytes", "10 parsecs"], "10MB"),
        (["demo", "--train-sec", "5"], "--train-sec"),  # no abbreviations: they break later
    ],
)
def test_wrong_usage_is_one_line_and_2(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and named in captured.err and "--help" in captured.err


@pytest.mark.parametrize(
    ("text", "count"), [("10MB", 10**7), ("1.5 GB", 15 * 10**8), ("2000", 2000), ("3kB", 3000)]
)
def test_num_bytes(text: str, count: int) -> None:
    assert num_bytes(text) == count


def test_plain_holds_no_nan() -> None:
    value = {"a": [float("nan"), 1.5, (float("inf"), True)], 3: Path("x"), "n": None}
    assert plain(value) == {"a": [None, 1.5, [None, True]], "3": "x", "n": None}


# Failures


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    from knnext.cli import doctor as cli_doctor

    def fail(args: Any, say: Any) -> None:
        raise error

    monkeypatch.setattr(cli_doctor, "run", fail)


def test_failure_is_one_line_and_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, ValueError("k must be\n  at least 1"))
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == "knnext doctor: k must be at least 1\n"


def test_a_defect_is_one_line_and_names_its_kind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, KeyError("x"))
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == "knnext doctor: KeyError: 'x' (--debug shows where)\n"


def test_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, ValueError("boom"))
    assert main(["doctor", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("module", "extra"), [("transformers", "lm"), ("faiss", "faiss")])
def test_a_missing_extra_is_named(
    module: str,
    extra: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fail_with(monkeypatch, ModuleNotFoundError(f"No module named '{module}.x'", name=f"{module}.x"))
    assert main(["doctor"]) == 1
    err = capsys.readouterr().err
    assert f'pip install ".[{extra}]"' in err and err.count("\n") == 1


def test_interrupt_is_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, KeyboardInterrupt())
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "knnext doctor: interrupted\n"


def test_missing_datastore(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tmp_path / "none")]) == 1
    err = capsys.readouterr().err
    assert str(tmp_path / "none") in err and err.count("\n") == 1


def test_json_of_a_failure_leaves_stdout_empty(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", str(tmp_path / "none"), "--json"]) == 1
    assert capsys.readouterr().out == ""


def test_doctor_plans_a_search(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--queries", "7", "--entries", "1000", "--dim", "64", "--json"]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert facts["search"]["queries"] == 7 and facts["search"]["dim"] == 64
    assert "torch" in captured.err  # the words for people


def test_python_m_knnext_and_nothing_heavy_for_help() -> None:
    program = (
        "import sys; sys.argv = ['knnext', '--help']\n"
        "from knnext.cli import main\n"
        "assert main() == 0\n"
        "heavy = {'transformers', 'tokenizers', 'datasets', 'faiss', 'matplotlib', 'knnext.demo'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    command = [sys.executable, "-m", "knnext", "--version"]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    assert found.stdout.startswith("knnext ")


@pytest.mark.slow
def test_ctrl_c_ends_a_running_demo_cleanly(tmp_path: Path) -> None:
    process = python_m_knnext("demo", "--out", str(tmp_path / "demo"))
    try:
        while not (tmp_path / "demo" / "demo.json").exists():
            assert process.poll() is None
            time.sleep(0.1)
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert "Traceback" not in err and err.endswith("knnext demo: interrupted\n")


# A whole run


class Run:
    """Runs commands in one folder, with a tiny model and corpus in it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys
        self.store = str(folder / "store")
        self.model = ["--model", str(folder / "model")]

    def __call__(self, *words: str, code: int = 0) -> Any:
        self.capsys.readouterr()
        assert main([*words, "--json"]) == code, self.capsys.readouterr().err
        captured = self.capsys.readouterr()
        if code:
            assert captured.out == "" and "Traceback" not in captured.err
            return captured.err.splitlines()[-1]
        return json.loads(captured.out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of three splits and a model that has seen some of it."""
    pytest.importorskip("transformers")
    from knnext.corpus import load_corpus, tokenize
    from knnext.lm.load import save_lm
    from knnext.lm.train import TrainConfig, train_lm, train_tokenizer

    folder = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("valid", 4), ("test", 4)):
        (folder / "corpus" / split).mkdir(parents=True)
        for number in range(count):
            lines = (" ".join(rng.choice(WORDS, 12)) + ".\n" for _ in range(25))
            text = f"Document {number}.\n" + "".join(lines)
            (folder / "corpus" / split / f"{number}.txt").write_text(text)
    train = load_corpus(str(folder / "corpus")).train
    tokenizer = train_tokenizer(train, 300)
    config = TrainConfig(vocab_size=300, num_layers=1, dim=16, num_heads=2, block_size=32)
    tokens = tokenize(train, tokenizer).tokens
    trained = train_lm(tokens, tokenizer, config, max_steps=30, device="cpu")
    save_lm(folder / "model", trained.model, tokenizer)
    return folder


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(folder, capsys)


def cpu(run: Run) -> list[str]:
    return [*run.model, "--device", "cpu"]


@pytest.fixture
def built(run: Run) -> Run:
    run("build", run.store, *cpu(run), "--corpus", str(run.folder / "corpus"))
    return run


def test_build_then_build_again(built: Run) -> None:
    again = built("build", built.store, *cpu(built), "--corpus", str(built.folder / "corpus"))
    info = built("info", built.store, "--verify")
    assert info["num_entries"] == again["num_entries"] > 3000
    assert info["fingerprint"] == again["fingerprint"]
    assert info["verified"] is True and info["key_layer"] == "att" and not info["unfinished"]


def test_build_of_another_layer_is_refused(built: Run) -> None:
    corpus = str(built.folder / "corpus")
    words = ("build", built.store, *cpu(built), "--corpus", corpus, "--key-layer", "ffn")
    assert "key_layer" in built(*words, code=1)


def test_tune_eval_search_generate(built: Run) -> None:
    run, store = built, built.store
    scores = str(run.folder / "valid.npz")
    tuned = run("tune", store, *cpu(run), "--k", "32", "--save-scores", scores)
    assert tuned["perplexity"] <= tuned["base_perplexity"] and tuned["index"] == "exact"
    assert Path(tuned["picture"]).stat().st_size > 1000
    assert json.loads(Path(tuned["path"]).read_text())["k"] == 32
    assert run("info", store)["tuning"]["temperature"] == tuned["temperature"]

    # From the stored search: the same fit, without a model, and a grid of one's own.
    again = run("tune", store, "--scores", scores, "--out", str(run.folder / "again.json"))
    assert again["lmbda"] == pytest.approx(tuned["lmbda"])
    grid = ("--temperatures", "1,2", "--lmbdas", "0,0.5", "--out", str(run.folder / "g.json"))
    assert (
        run("tune", store, "--scores", scores, *grid)["perplexity"] >= 0.999 * again["perplexity"]
    )

    log = run.folder / "tokens.jsonl"
    found = run("eval", store, *cpu(run), "--token-log", str(log))
    assert found["temperature"] == tuned["temperature"] and found["k"] == 32
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(rows) == found["num_tokens"]
    nll = -np.mean([row["log_p"] for row in rows])
    assert nll == pytest.approx(found["mixture"]["nll"], rel=1e-6)
    base = run("eval", store, *cpu(run), "--temperature", "1", "--lmbda", "0")
    assert base["mixture"]["nll"] == pytest.approx(found["base"]["nll"])

    near = run("search", store, "the next token of a", *cpu(run), "--k", "5")["neighbors"]
    assert [n["distance"] for n in near] == sorted(n["distance"] for n in near)
    assert sum(n["share"] for n in near) == pytest.approx(1)
    train = {p.name: p.read_text() for p in (run.folder / "corpus" / "train").iterdir()}
    for neighbor in near:
        text = neighbor["before"] + neighbor["token"] + neighbor["after"]
        whole = train[Path(neighbor["document"]).name]
        assert text.replace("<|endoftext|>", "") in whole

    words = ("generate", store, "the model", *cpu(run), "--max-new-tokens", "6")
    first = run(*words)
    assert first["continuation"] and first == run(*words)
    assert run(*words, "--num-beams", "2")["text"] == "the model"


def test_faiss_index(built: Run) -> None:
    pytest.importorskip("faiss")
    run, store = built, built.store
    index = run("index", store, "--factory", "IVF8,Flat", "--nprobe", "4")
    assert index["factory"] == "IVF8,Flat" and index["num_entries"] > 3000
    assert run("info", store)["index"]["nprobe"] == 4
    mixture = ("--temperature", "2", "--lmbda", "0.3", "--k", "16")
    options = (*cpu(run), *mixture, "--index", "faiss")
    all_lists = run("eval", store, *options, "--nprobe", "8", "--rescore")
    exact = run("eval", store, *cpu(run), *mixture, "--index", "exact")
    assert all_lists["mixture"]["nll"] == pytest.approx(exact["mixture"]["nll"], abs=2e-3)
    near = run("search", store, "a row of", *cpu(run), "--index", "faiss", "--k", "3")
    assert len(near["neighbors"]) == 3
    for of_faiss in (["--rescore"], ["--index-path", f"{store}.index"]):
        words = ("eval", store, *cpu(run), *mixture, *of_faiss, "--index", "exact")
        assert "are for --index faiss" in run(*words, code=1)
    assert "built from something else" in run("index", store, "--factory", "SQ8", code=1)


def test_exact_search_by_codes(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """The same figures as without, and each command says which way it goes."""
    store, build = str(run.folder / "coded"), [*cpu(run), "--corpus", str(run.folder / "corpus")]
    evaluate = ["eval", store, *cpu(run), "--temperature", "2", "--lmbda", "0.3", "--k", "16"]
    run("build", store, *build)
    found = []
    for way in ("over all keys", "by eight-bit codes (coded.codes)"):
        capsys.readouterr()
        assert main([*evaluate, "--json"]) == 0
        captured = capsys.readouterr()
        assert f"exact search: {way}" in captured.err
        found.append(json.loads(captured.out)["mixture"])
        made = run("build", store, *build, "--codes")["codes"]
    assert found[0] == found[1]
    assert made["num_entries"] == run("info", store)["num_entries"]

    # Built anew in the same place, with other keys: the codes follow.
    for file in Path(store).iterdir():
        file.unlink()
    run("build", store, *build, "--key-layer", "ffn", "--codes")
    assert "by eight-bit codes" in run("info", store)["search"]


def test_eval_without_a_tuning(built: Run) -> None:
    (built.folder / "store.tuning.json").unlink(missing_ok=True)
    assert "knnext tune" in built("eval", built.store, *cpu(built), code=1)
    assert "--model" in built("tune", built.store, code=1)


def test_another_model_is_refused(built: Run, tmp_path: Path) -> None:
    from knnext.lm.load import load_lm, save_lm

    model, tokenizer = load_lm(built.folder / "model")
    model.transformer.wte.weight.data[0, 0] += 1
    save_lm(tmp_path / "other", model, tokenizer)
    words = ("search", built.store, "text", "--model", str(tmp_path / "other"))
    assert "model_revision" in built(*words, code=1)


def test_import(run: Run, tmp_path: Path) -> None:
    keys = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float16)
    values = np.arange(1, 51, dtype=np.int64)
    for name, array in (("keys", keys), ("vals", values)):
        padded = np.zeros((60, *array.shape[1:]), array.dtype)
        padded[:50] = array
        padded.tofile(tmp_path / f"old_{name}.npy")
    target = str(tmp_path / "new")
    words = ("import", str(tmp_path / "old"), target, "--dim", "8")
    imported = run(
        *words, "--num-entries", "60", "--key-dtype", "float16", "--value-dtype", "int64"
    )
    assert imported["num_entries"] == 50 and imported["origin"]["dropped_rows"] == 10
    assert run("info", target, "--verify")["verified"]


def test_text_from_stdin(
    built: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("the next token of a"))
    piped = built("search", built.store, "-", *cpu(built), "--k", "3")
    assert piped == built("search", built.store, "the next token of a", *cpu(built), "--k", "3")


def test_words_for_people(built: Run, capsys: pytest.CaptureFixture[str]) -> None:
    show: Callable[[list[str]], int] = cli.main
    assert show(["info", built.store]) == 0
    assert "entries" in capsys.readouterr().out
    assert show(["search", built.store, "the model", *cpu(built), "--k", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("distance") == 2 and "[" in out

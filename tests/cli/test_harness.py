"""The model "knnext" of lm-evaluation-harness, with the real one, on tasks of this file's own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from knnext import KNNLM, Datastore, ExactIndex, build_datastore, evaluate, search_stream, tokenize
from knnext.corpus import Document
from knnext.lm.load import load_lm, save_lm
from knnext.lm.train import train_tokenizer
from tests.lm.tiny_models import transformers

lm_eval = pytest.importorskip("lm_eval", reason="needs the package lm_eval")
huggingface = pytest.importorskip("lm_eval.models.huggingface")

from knnext.cli import lm_eval as command  # noqa: E402
from knnext.cli.harness import KNNHarnessLM, asked_positions  # noqa: E402

CONTEXT = 48
WORDS = "the quick brown fox jumps over a lazy dog and sleeps".split()  # noqa: SIM905
MIX: dict[str, Any] = {"k": 8, "temperature": 3.0, "lmbda": 0.6}

TASKS = {
    "choice": """
        output_type: multiple_choice
        doc_to_text: "{{text}}"
        doc_to_choice: "{{choices}}"
        doc_to_target: "{{gold}}"
    """,
    # One token each, in one context: the harness runs the model once for all of them.
    "letters": """
        output_type: multiple_choice
        doc_to_text: "{{text}}"
        doc_to_choice: ["a", "b", "c"]
        doc_to_target: 1
    """,
    "rolling": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{long}}"
        metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
    """,
    "writing": """
        output_type: generate_until
        doc_to_text: "{{text}}"
        doc_to_target: " the"
        generation_kwargs: {until: ["q"], max_gen_toks: 9, do_sample: false}
        metric_list: [{metric: exact_match}]
    """,
}


def sentence(generator: torch.Generator, count: int) -> str:
    chosen = torch.randint(len(WORDS), (count,), generator=generator).tolist()
    return " ".join(WORDS[number] for number in chosen)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ and store/, of documents that the tasks are not of; tasks/ with their data."""
    place = tmp_path_factory.mktemp("harness")
    generator = torch.Generator().manual_seed(0)
    texts = [Document(f"{n}", sentence(generator, 60)) for n in range(6)]
    words = train_tokenizer(texts, vocab_size=290)
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    save_lm(place / "model", model, words)
    build_datastore(model, words, tokenize(texts, words), place / "store")

    tasks = place / "tasks"
    tasks.mkdir()
    lines = [
        {
            "text": sentence(generator, 2 + number),
            "choices": [sentence(generator, size) for size in (1, 2, 4)],
            "gold": number % 3,
            "long": sentence(generator, 9 * number + 1),  # of one window and of several
        }
        for number in range(7)
    ]
    (tasks / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for name, text in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ntest_split: test\n"
        files = {"data_files": {"test": str(tasks / "data.jsonl")}, "cache_dir": str(place)}
        body = "\n".join(line.strip() for line in text.strip().splitlines())
        given = f"{head}dataset_kwargs: {json.dumps(files)}\n{body}\n"
        (tasks / f"{name}.yaml").write_text(given)
    return place


@pytest.fixture(scope="module")
def manager(place: Path) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(place / "tasks"), include_defaults=False)


def run(model: Any, manager: Any, batch_size: int = 3, **arguments: Any) -> Any:
    """(figures of each task, what the model answered to each request of each task)"""
    found = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments or None,
        tasks=list(TASKS),
        task_manager=manager,
        batch_size=batch_size if arguments else None,
        device="cpu",
        bootstrap_iters=0,
    )
    assert found is not None
    answers = {name: [doc["resps"] for doc in found["samples"][name]] for name in TASKS}
    return found["results"], answers, found["config"]


def close(found: Any, wanted: Any) -> None:
    """Log-likelihoods to float32 rounding, all else exactly."""
    if isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            close(one, other)
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=1e-5, abs=1e-4)
    else:
        assert found == wanted


@pytest.fixture(scope="module")
def plain(place: Path, manager: Any) -> Any:
    return run("hf", manager, pretrained=str(place / "model"))


@pytest.fixture(scope="module")
def lm(place: Path) -> tuple[KNNLM, Any]:
    model, words = load_lm(place / "model", model_dtype="float32")
    return KNNLM(model, ExactIndex(Datastore.open(place / "store")), **MIX), words


@pytest.fixture(scope="module")
def mixed(place: Path, manager: Any) -> Any:
    folders = {"pretrained": str(place / "model"), "datastore": str(place / "store")}
    return run("knnext", manager, **folders, **MIX)


@pytest.mark.parametrize("given", [{}, {"lmbda": 0}, {"datastore": "store", "lmbda": 0.0}])
def test_where_nothing_is_mixed_it_is_the_harness_own(
    place: Path, manager: Any, plain: Any, given: dict[str, Any]
) -> None:
    if "datastore" in given:
        given = {**given, "datastore": str(place / "store")}
    results, answers, _ = run("knnext", manager, pretrained=str(place / "model"), **given)
    assert answers == plain[1] and results == plain[0]


def test_with_a_datastore_it_is_the_mixture(
    manager: Any, plain: Any, mixed: Any, lm: tuple[KNNLM, Any]
) -> None:
    """As the harness has it of a KNNLM that is handed to it as a model, searched everywhere."""
    model, words = lm
    whole = huggingface.HFLM(pretrained=model, tokenizer=words, batch_size=2)
    results, answers, config = run(whole, manager)
    for name in TASKS:
        close(mixed[1][name], answers[name])
        assert mixed[1][name] != plain[1][name]
        for metric, value in results[name].items():
            close(mixed[0][name][metric], value)
    assert mixed[2]["lmbda"] == MIX["lmbda"] and mixed[2]["datastore_entries"] > 300
    assert "lmbda" not in config


def test_rolling_is_what_evaluate_finds(
    place: Path, mixed: Any, lm: tuple[KNNLM, Any], manager: Any
) -> None:
    model, words = lm
    lines = (place / "tasks" / "data.jsonl").read_text().splitlines()
    documents = [Document(str(n), json.loads(line)["long"]) for n, line in enumerate(lines)]
    scores = search_stream(
        model.model,
        model.index,
        tokenize(documents, words, words="harness"),
        k=MIX["k"],
        allow_overlap=True,  # of a document of one word
        separate_documents=True,
        full_last_window=True,
        block_size=CONTEXT,
        stride=CONTEXT,
    )
    found = evaluate(scores, MIX["temperature"], MIX["lmbda"], resamples=1)
    assert mixed[0]["rolling"]["word_perplexity,none"] == pytest.approx(found.mixture.word, 1e-5)
    total = sum(answer[0][0] for answer in mixed[1]["rolling"])
    assert -total / found.num_tokens == pytest.approx(found.mixture.nll, abs=1e-5)


@pytest.mark.parametrize("given", [{"batch_size": 1}, {"batch_size": 5, "logits_cache": False}])
def test_batches_change_nothing(
    place: Path, manager: Any, mixed: Any, given: dict[str, Any]
) -> None:
    folders = {"pretrained": str(place / "model"), "datastore": str(place / "store")}
    _, answers, _ = run("knnext", manager, **folders, **MIX, **given)
    for name in TASKS:
        close(answers[name], mixed[1][name])


def counted(lm: KNNHarnessLM) -> list[int]:
    sizes: list[int] = []
    search = lm.model.index.search
    lm.model.index.search = lambda queries, k: sizes.append(len(queries)) or search(queries, k)
    return sizes


def test_only_what_is_asked_for_is_searched(place: Path) -> None:
    from lm_eval.api.instance import Instance

    lm = KNNHarnessLM(str(place / "model"), str(place / "store"), device="cpu", batch_size=2, **MIX)
    sizes, words = counted(lm), lm.tokenizer
    asked = [("the quick brown fox", " jumps over"), ("a lazy", " dog"), ("the", " the" * 10)]
    instances = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in asked
    ]
    found = lm.loglikelihood(instances, disable_tqdm=True)
    assert all(score == score for score, _ in found)
    lengths = [len(words.encode(a + b)) - len(words.encode(a)) for a, b in asked]
    assert sum(sizes) == sum(lengths) and max(sizes) < sum(lengths)
    until = {"until": [], "max_gen_toks": 3}
    sizes.clear()
    lm.generate_until(
        [Instance(request_type="generate_until", doc={}, arguments=("a fox", until), idx=0)],
        disable_tqdm=True,
    )
    assert sizes == [1, 1, 1]


def test_positions_that_texts_share() -> None:
    """Of a text that is asked of twice, and of one that another begins with, all that is asked."""
    asked = [(None, [1, 2], [3, 4]), (None, [1], [2, 3, 5]), (None, [1, 2, 3], [6])]
    found = asked_positions([*asked, (None, [7] * 9, [8] * 9)], 6)
    assert sorted(found.values()) == [3, 6]  # of [1, 2, 3], and of what is cut to [7, 8, ... 8]
    lm = KNNHarnessLM.__new__(KNNHarnessLM)
    lm._asked = asked_positions([(None, [1], [2, 3]), (None, [1, 2, 0], [0, 9])], 10)
    lm._lengths = [2, 4]
    rows = torch.tensor([[1, 2, 0, 0, 0], [5, 5, 5, 5, 5]])
    assert lm._searched(rows).int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_settings_are_those_that_tune_left(place: Path, tmp_path: Path) -> None:
    from knnext.evaluation.tuning_file import tuning_path

    kept = {**MIX, "index": "exact", "nprobe": None, "rescore": False}
    path = tuning_path(place / "store")
    path.write_text(json.dumps(kept))
    try:
        lm = KNNHarnessLM(str(place / "model"), str(place / "store"), device="cpu")
        assert (lm.model.k, lm.model.temperature, lm.model.lmbda) == (8, 3.0, 0.6)
        lm = KNNHarnessLM(str(place / "model"), str(place / "store"), device="cpu", k=5)
        assert (lm.model.k, lm.model.lmbda) == (5, 0.6)
    finally:
        path.unlink()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"k": 8}, "k is for a datastore, and none is given"),
        ({"lmbda": 0.5}, "lmbda is for a datastore"),
        ({"chunk_bytes": "1GB"}, "chunk_bytes is for a datastore"),
        ({"datastore": "nowhere", **MIX}, "nowhere"),
        ({"datastore": "store"}, "no temperature and lmbda"),
        ({"datastore": "store", **MIX, "k": 0}, "k must be an integer of at least 1, got 0"),
        ({"datastore": "store", **MIX, "lmbda": 2.0}, "lmbda must be from 0 to 1"),
        ({"datastore": "store", **MIX, "temperature": 0}, "temperature must be above 0"),
        ({"datastore": "store", **MIX, "index": "hnsw"}, "index must be exact or faiss"),
        ({"datastore": "store", **MIX, "nprobe": 4}, "nprobe .*for --index faiss"),
        ({"datastore": "store", **MIX, "index_path": "x"}, "index-path are for --index faiss"),
        ({"datastore": "store", **MIX, "chunk_bytes": "x"}, "chunk_bytes: wanted is a size"),
        ({"datastore": "store", **MIX, "dtype": "bfloat16"}, "dtype"),
        ({"datastore": "store", **MIX, "pretrained": "other"}, "model_revision"),
    ],
    ids=str,
)
def test_what_is_refused(place: Path, given: dict[str, Any], message: str) -> None:
    given = {"pretrained": "model", **given}
    if given["pretrained"] == "other" and not (place / "other").exists():
        model, words = load_lm(place / "model")
        torch.nn.init.normal_(next(model.parameters()))
        save_lm(place / "other", model, words)
    for name in ("pretrained", "datastore"):
        if name in given:
            given[name] = str(place / given[name])
    with pytest.raises((ValueError, OSError), match=message):
        KNNHarnessLM(device="cpu", **given)


def answer(lm: KNNHarnessLM) -> float:
    from lm_eval.api.instance import Instance

    pair = ("the quick brown fox", " jumps over")
    asked = Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0)
    return float(lm.loglikelihood([asked], disable_tqdm=True)[0][0])


def test_a_path_with_a_tilde_and_one_from_a_folder_that_is_left(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.chdir(place)
    given: dict[str, Any] = {"device": "cpu", **MIX}
    lms = [KNNHarnessLM("model", folder, **given) for folder in ("store", "~/store")]
    monkeypatch.chdir(tmp_path)
    found = {answer(lm) for lm in lms}
    assert found == {answer(KNNHarnessLM(str(place / "model"), place / "store", **given))}
    assert {lm.get_model_info()["datastore"] for lm in lms} == {str(place / "store")}


@pytest.mark.parametrize("add", [True, False])
def test_a_bos_before_each_text(place: Path, lm: tuple[KNNLM, Any], add: bool) -> None:
    """The tokenizer that puts it there is another, but no other tokens are meant by its ids."""
    model, words = lm
    given = {"device": "cpu", "add_bos_token": add, **MIX}
    found = answer(KNNHarnessLM(str(place / "model"), str(place / "store"), **given))
    context, rest = words.encode("the quick brown fox"), words.encode(" jumps over")
    ids = [words.bos_token_id] * add + context + rest
    with torch.no_grad():
        rows = model(torch.tensor([ids])).logits[0]
    wanted = sum(rows[i - 1, ids[i]].item() for i in range(len(ids) - len(rest), len(ids)))
    assert found == pytest.approx(wanted, rel=1e-5)


def test_a_tokenizer_that_was_used(place: Path, lm: tuple[KNNLM, Any]) -> None:
    """It keeps how the latest batch was padded and cut; it is the same for all that."""
    model, words = lm
    words(["the", "a lazy dog"], padding=True, truncation=True, max_length=2)
    try:
        found = KNNHarnessLM(model.model, place / "store", tokenizer=words, **MIX)
    finally:
        words("the")  # takes both back
    assert answer(found) == answer(KNNHarnessLM(model, tokenizer=words))


def test_a_knnlm_or_a_model_of_ones_own(place: Path, lm: tuple[KNNLM, Any]) -> None:
    model, words = lm
    assert KNNHarnessLM(model, tokenizer=words).model is model
    with pytest.raises(ValueError, match="a KNNLM, which has its datastore"):
        KNNHarnessLM(model, place / "store", tokenizer=words, **MIX)
    store = Datastore.open(place / "store")
    found = KNNHarnessLM(model.model, store, tokenizer=words, **MIX)
    assert isinstance(found.model, KNNLM) and found.model.model is model.model


@pytest.mark.slow  # lm_eval reads the files of all its own tasks first
def test_the_command(
    place: Path, tmp_path: Path, mixed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = f"pretrained={place / 'model'},datastore={place / 'store'}"
    mixture = ",".join(f"{name}={value}" for name, value in MIX.items())
    words = ["--model", "knnext", "--model_args", f"{folders},{mixture}", "--tasks", "choice"]
    words += ["--include_path", str(place / "tasks"), "--device", "cpu", "--batch_size", "2"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *words, "--output_path", str(tmp_path)])
    command.main()
    (file,) = tmp_path.rglob("results_*.json")
    found = json.loads(file.read_text())
    assert found["results"]["choice"]["acc,none"] == mixed[0]["choice"]["acc,none"]
    assert found["config"]["k"] == 8 and found["config"]["datastore"] == str(place / "store")


def test_later_releases_find_it_by_its_entry_point() -> None:
    from importlib.metadata import EntryPoint

    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    _, _, rest = text.partition('[project.entry-points."lm_eval.models"]\n')
    name, value = rest.splitlines()[0].split(" = ")
    group = "lm_eval.models"
    assert EntryPoint(name, value.strip('"'), group).load() is KNNHarnessLM and name == "knnext"


def test_a_gguf_file(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs the package gguf")
    from tests.lm.gguf_files import write_gguf

    model, words = load_lm(place / "model", model_dtype="float32")
    write_gguf(tmp_path / "tiny.gguf", model, words, "F16")
    model, words = load_lm(tmp_path, gguf="tiny.gguf")
    texts = [Document("a", " ".join(WORDS * 9))]
    store = build_datastore(model, words, tokenize(texts, words), tmp_path / "store")
    given = {"datastore": store, "gguf_file": "tiny.gguf", "device": "cpu", **MIX}
    assert isinstance(KNNHarnessLM(str(tmp_path), **given).model, KNNLM)
    with pytest.raises(ValueError, match=r"quantization|model_revision"):
        KNNHarnessLM(str(place / "model"), **{**given, "gguf_file": None})

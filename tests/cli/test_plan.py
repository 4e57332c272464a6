"""``knnext plan`` and ``knnext doctor --rates``: what they say, keep and refuse."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import torch

from knnext.cli import main
from knnext.planning import measure
from knnext.planning.measure import SMALL
from knnext.planning.rates import NAMES, Rates, keep, kept_path, read_rates, this_machine
from knnext.planning.stated import STATED
from knnext.planning.words import duration, rate_text

Plan = Callable[..., tuple[int, dict[str, Any], str]]
MODEL = ("--dim", "1024", "--layers", "16", "--params", "270M")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "knnext" / "rates"


@pytest.fixture
def plan(cache: Path, capsys: pytest.CaptureFixture[str]) -> Plan:
    """(exit code, what --json prints, what people read)"""

    def run(*words: str, model: tuple[str, ...] = MODEL) -> tuple[int, dict[str, Any], str]:
        free = () if "--free" in words else ("--free", "100TB")
        code = main(["plan", *model, *free, *words, "--json"])
        said = capsys.readouterr()
        return code, json.loads(said.out) if said.out else {}, said.err

    return run


def test_the_issue_s_line(plan: Plan) -> None:
    code, found, text = plan(
        *("--tokens", "3e9", "--gpus", "8", "--nodes", "2", "--k", "512", "--codes", "--index")
    )
    assert code == 0 and found["fits"] and not found["refusals"]
    assert found["job"]["tokens"] == 3 * 10**9 and found["job"]["ranks"] == 16
    assert found["disk"]["datastore"] == 3 * 10**9 * (2048 + 4)
    assert found["disk"]["codes"] == 3 * 10**9 * (1024 + 12) + 4096
    assert found["job"]["factory"] == "IVF4096,PQ64"
    for part in ("disk", "memory of a rank", "time", "rates", "forward", "index training"):
        assert part in text
    assert all(stage["seconds"] > 0 for stage in found["stages"])
    assert "stated, not measured: NVIDIA H200 SXM datasheet" in text
    assert "`knnext doctor --rates` measures this machine's" in text


@pytest.mark.parametrize(
    ("text", "tokens"), [("3e9", 3 * 10**9), ("3B", 3 * 10**9), ("113M", 113 * 10**6), ("7", 7)]
)
def test_numbers_as_people_write_them(plan: Plan, text: str, tokens: int) -> None:
    assert plan("--tokens", text, "--gpus", "8")[1]["job"]["tokens"] == tokens


@pytest.mark.parametrize("text", ["0", "-3", "many", "1.5", "nan", "inf", "1e400"])
def test_numbers_that_are_none(plan: Plan, text: str) -> None:
    code, _, said = plan("--tokens", text)
    assert code == 2 and "wanted is a whole number of at least 1" in said


def test_a_refusal_ends_with_1_and_names_what_fits(plan: Plan) -> None:
    code, found, text = plan("--tokens", "3e9", "--gpus", "8", "--free", "1TB")
    assert code == 1 and not found["fits"]
    assert "does not fit: the disk has 931.32 GiB free" in text
    most = found["refusals"][0].partition("; ")[2].split()[0].replace(",", "")
    assert plan("--tokens", most, "--gpus", "8", "--free", "1TB")[0] == 0


def test_memory_can_be_said(plan: Plan) -> None:
    words = ("--tokens", "113M", "--gpus", "1")
    assert "keys streamed" in plan(*words)[1]["placement"]["tier"]
    assert plan(*words, "--gpu-memory", "300GB")[1]["placement"]["tier"] == "keys resident"
    assert plan(*words, "--resident")[0] == 1
    assert "from disk" in plan(*words, "--memory", "64GB")[1]["placement"]["tier"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--k", "20000", "--gpus", "1"), "k must be at most 16,384 on GPUs"),
        (("--index", "LSQ8x8"), "known are Flat, PQ64"),
        (("--rates", "cpu", "--gpus", "2"), "is of a machine without GPUs"),
        (("--rates", "here"), "run `knnext doctor --rates`"),
        (("--rates", "missing.json"), "missing.json"),
        (("--block-size", "64", "--stride", "65"), "stride must be at most block=64"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_line(
    plan: Plan, words: tuple[str, ...], named: str
) -> None:
    code, found, said = plan("--tokens", "1e6", *words)
    assert code == 1 and not found
    assert named in said and len(said.splitlines()) == 1


# Models


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder with its configuration and nothing else."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("planned") / "model"
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=500,
        max_position_embeddings=256,
    )
    config.save_pretrained(path)
    return path


def test_a_model_is_known_by_its_configuration(plan: Plan, folder: Path) -> None:
    code, found, _ = plan("--tokens", "1e6", model=("--model", str(folder)))
    shape = found["job"]["shape"]
    assert code == 0
    block = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96 + 2 * 64  # attention, gated layers, two norms
    assert shape["active"] == 3 * block + 64
    assert shape["params"] == 3 * block + 64 + 2 * 500 * 64
    assert (shape["dim"], shape["layers"], shape["attention"]) == (64, 3, 64)
    assert found["job"]["block"] == 256  # its context


def test_the_configuration_counts_what_the_model_has(folder: Path) -> None:
    """Every kind of block: the numbers are those of the parameters, experts as they are chosen."""
    import transformers

    from knnext.planning.model_shape import read_shape

    config = transformers.MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        num_local_experts=8,
        num_experts_per_tok=2,
    )
    config.save_pretrained(folder.parent / "experts")
    shape = read_shape(str(folder.parent / "experts"))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    assert shape.params == sum(p.numel() for p in model.parameters())
    experts = 2 * 8 * 3 * 32 * 48
    others = shape.params - experts - 2 * 100 * 32
    assert shape.active == pytest.approx(others + experts / 4)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox"])
def test_kinds_of_models(tmp_path: Path, name: str) -> None:
    import transformers

    from knnext.planning.model_shape import read_shape

    made = {
        "gpt2": lambda: transformers.GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=90),
        "opt": lambda: transformers.OPTConfig(
            hidden_size=48,
            word_embed_proj_dim=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=64,
            vocab_size=90,
        ),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            vocab_size=90,
        ),
    }[name]()
    made.save_pretrained(tmp_path)
    shape = read_shape(str(tmp_path))
    assert (shape.dim, shape.layers, shape.attention) == (48, 2, 48)
    assert 0 < shape.active < shape.params
    assert read_shape(str(tmp_path), "ffn").dim == (24 if name == "opt" else 48)


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (("--model", "/nowhere/at/all"), "there is no such folder"),
        (("--model", "{empty}"), "has no config.json, or describe the model by --dim"),
        (("--model", "{odd}"), "cannot be read"),
        (("--model", "{encoder}"), "makes no causal language model here"),
        (("--model", "{folder}", "--layers", "3"), "--layers is for a plan without --model"),
        (("--model", "{folder}", "--key-layer", "last"), "--key-layer must be att, ffn or module:"),
        (("--layers", "3"), "give --model"),
    ],
)
def test_models_that_tell_nothing(
    plan: Plan, folder: Path, tmp_path: Path, model: tuple[str, ...], named: str
) -> None:
    for name, config in (("odd", "{"), ("encoder", '{"model_type": "vit"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
    (tmp_path / "empty").mkdir()
    places = {name: tmp_path / name for name in ("empty", "odd", "encoder")} | {"folder": folder}
    given = tuple(word.format(**places) for word in model)
    code, found, said = plan("--tokens", "1e6", model=given)
    assert code == 1 and not found and named in said and len(said.splitlines()) == 1


def test_a_hub_that_cannot_be_reached_is_said(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(
            "We couldn't connect to 'https://huggingface.co' to load the files.\nAnd more"
        )

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    code, _, said = plan("--tokens", "1e6", model=("--model", "someone/model"))
    assert code == 1 and "the configuration of someone/model cannot be read: We couldn't" in said
    assert "--dim, --layers and --params" in said and len(said.splitlines()) == 1


# Rates


def measured(**changes: Any) -> Rates:
    found = STATED["cpu"]
    values = {name: replace(r, source="measured: so", measured=True) for name, r in
              found.rates.items()}  # fmt: skip
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    from knnext.datastore.meta import installed_version

    rates = Rates(this_machine(), values, now, installed_version())
    return replace(rates, **changes)


def test_what_was_measured_here_is_used(plan: Plan, cache: Path) -> None:
    path = keep(measured())
    assert path.parent == cache and read_rates(path) == measured(created=read_rates(path).created)
    _, found, text = plan("--tokens", "1e6", "--gpus", "0")
    assert found["rates"]["forward"]["measured"] and "measured: so" in text
    assert "note: rates" not in text
    _, found, text = plan("--tokens", "1e6", "--gpus", "8")
    assert not found["rates"]["forward"]["measured"]
    if not torch.cuda.device_count():
        assert "this machine has no GPU" in text


def test_old_rates_are_named(plan: Plan) -> None:
    then = datetime.now(timezone.utc) - timedelta(days=45)
    keep(measured(created=then.isoformat(timespec="seconds")))
    assert "they were measured 45 days ago" in plan("--tokens", "1e6", "--gpus", "0")[2]
    keep(measured(knnext_version="0.0.1"))
    assert "they are of knnext 0.0.1" in plan("--tokens", "1e6", "--gpus", "0")[2]


def test_rates_of_another_machine_are_named(plan: Plan, tmp_path: Path) -> None:
    other = measured(machine=replace(this_machine(), name="Abacus"))
    assert kept_path(other.machine) != kept_path(this_machine())
    path = keep(other)
    assert "datasheets" in plan("--tokens", "1e6", "--gpus", "0")[2]  # not this machine's
    _, found, text = plan("--tokens", "1e6", "--gpus", "0", "--rates", str(path))
    assert found["machine"]["name"] == "Abacus" and "rates of another machine: Abacus" in text


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[]", '{"magic": "knnext-rates"}', "null", '{"magic": "x", "format_version": 1}'],
)
def test_a_file_that_holds_no_rates_is_refused(plan: Plan, tmp_path: Path, content: str) -> None:
    path = tmp_path / "rates.json"
    path.write_text(content)
    code, _, said = plan("--tokens", "1e6", "--gpus", "0", "--rates", str(path))
    assert code == 1 and "is not what `knnext doctor --rates` writes" in said


@pytest.mark.parametrize("value", [0, -1, "fast", None, float("inf")])
def test_a_rate_that_is_none_is_refused(tmp_path: Path, value: Any) -> None:
    body = measured().to_json()
    body["rates"]["forward"]["value"] = value
    (tmp_path / "r.json").write_text(json.dumps(body))
    with pytest.raises(ValueError, match=r"forward is .*, want a number above 0"):
        read_rates(tmp_path / "r.json")


def test_a_relative_cache_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert kept_path(this_machine()).parent == Path("/home/somebody/.cache/knnext/rates")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Measures little, and each thing once."""
    monkeypatch.setattr(measure, "Sizes", lambda: SMALL)
    monkeypatch.setattr(measure, "_RUNS", 1)
    yield


def test_doctor_measures_and_keeps(
    cache: Path, tmp_path: Path, quick: None, capfd: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    assert main(["doctor", "--rates", "--disk", str(tmp_path), "--json"]) == 0
    said = capfd.readouterr()
    found = json.loads(said.out)["rates"]
    kept = read_rates(found["path"])
    assert Path(found["path"]).parent == cache and kept.machine == this_machine()
    wanted = {name for name in NAMES if name not in ("network", "link", "latency")}
    assert wanted - {"host_to_device"} <= set(kept.rates)
    assert all(rate.measured and rate.value > 0 for rate in kept.rates.values())
    assert "of this machine" in said.err and "WARNING" not in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]  # the disk's file is gone
    assert torch.get_num_threads() == threads


def test_a_disk_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--rates", "--disk", "/nowhere/at/all"]) == 1
    assert "there is no such folder" in capsys.readouterr().err
    assert main(["doctor", "--model", "x"]) == 1
    assert "--model is for --rates" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "not known"), (2e-5, "20 us"), (0.25, "250 ms"), (59.98, "1 min"), (5400, "1.5 h"),
     (86400 * 3, "3 days"), (86400 * 365.25 * 4000, "4,000 years")],
)  # fmt: skip
def test_times_as_people_read_them(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_rates_as_people_read_them() -> None:
    assert rate_text("forward", 3.956e14) == "396 TFLOP/s"
    assert rate_text("disk_read", 5.2e9) == "5.2 GB/s"
    assert rate_text("latency", 2e-5) == "20 us"

"""The report: what is escaped, what the explorer shows, and the page at work in a browser."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from knnext.datastore import Datastore
from knnext.evaluation.scores import StreamScores
from knnext.evaluation.spans import neighbor_spans
from knnext.report import Report, Row, Surface, render, script_json, write_report
from knnext.report.excerpts import choose_excerpts
from knnext.report.explorer import MAX_BYTES, System, explorer_data
from knnext.report.table import format_bytes, text_table

pytest.importorskip("tokenizers")
pytest.importorskip("transformers")

NASTY = (
    '</script><script>document.title="owned"</script> & "quotes" \'single\'\n\t<!-- $x {{data}}\n'
)
PROSE = "A neighbor is a row of the datastore; its token is what came next in the text.\n"
TEXTS = {"docs/<b>nasty</b>.py": NASTY * 12, "src/prose.txt": PROSE * 20, "src/more.txt": PROSE * 9}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from knnext.corpus import Document
    from knnext.lm.train import train_tokenizer

    return train_tokenizer([Document(n, t) for n, t in TEXTS.items()], vocab_size=300)


@pytest.fixture(scope="module")
def store(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    path = tmp_path_factory.mktemp("report") / "store"
    with Datastore.create(path, 4, vocab_size=len(tokenizer)) as store:
        for name, text in TEXTS.items():
            ids = tokenizer.encode(text, add_special_tokens=False)
            keys = torch.randn(len(ids), 4, generator=torch.Generator().manual_seed(0))
            store.append(keys, torch.tensor(ids, dtype=torch.int32), [(name, len(ids))])
    return Datastore.open(path)


@pytest.fixture(scope="module")
def scores(store: Datastore) -> StreamScores:
    """Each row of the datastore scored with ten neighbors, of which the first is always right."""
    generator = torch.Generator().manual_seed(1)
    n, k = store.num_entries, 10
    targets = store.values[:].long()
    indices = torch.randint(0, n, (n, k), generator=generator)
    indices[:, 0] = torch.arange(n)
    indices[:, -1] = -1
    distances = torch.rand(n, k, generator=generator).cumsum(1)
    distances[:, -1] = math.inf
    found = store.values[:][indices.clamp_min(0)].int().masked_fill(indices < 0, -1)
    ends = torch.zeros(n, dtype=torch.bool)
    ends[store.document_offsets[1:-1] - 1] = True
    return StreamScores(
        log_p_lm=-4 * torch.rand(n, generator=generator),
        targets=targets,
        document_ids=store.document_of(torch.arange(n)),
        ends_document=ends,
        distances=distances,
        tokens=found,
        indices=indices,
        document_names=list(store.document_names),
    )


def systems(scores: StreamScores) -> list[System]:
    """Two: all neighbors, and the nearest four."""
    return [System("exact", scores, 1.5, 0.4, "all <of> it"),
            System("nearest", scores.truncate(4), 0.7, 0.2)]  # fmt: skip


@pytest.fixture(scope="module")
def report(scores: StreamScores, store: Datastore, tokenizer: Any) -> Report:
    grid = [
        [100 + (t - 3) ** 2 + 40 * (w - 0.5) ** 2 for w in (0.1, 0.5, 0.9)] for t in range(1, 6)
    ]
    return Report(
        title="Neighbors & <friends>",
        lead='On "test" text.',
        rows=[
            Row("base LM", 200.0, (180.0, 220.0), tokens_per_second=9000, num_bytes=3_000_000),
            Row("exact", 90.0, (80.0, 101.0), -0.55, (-0.6, -0.5), 3.0, 0.5, 800, 130_000_000),
        ],
        surface=Surface(range(1, 6), (0.1, 0.5, 0.9), grid, (3, 0.5, 100), 106, "exact"),
        facts={"corpus": "a <i> & b"},
        explorer=explorer_data(
            systems(scores), store, tokenizer, excerpt_tokens=120, num_neighbors=3
        ),
    )


def data_of(page: str) -> dict[str, Any]:
    match = re.search(r'id="explorer-data">(.*?)</script>', page, re.S)
    assert match
    return json.loads(match.group(1))


def test_spans_are_the_text_around_a_row(store: Datastore, tokenizer: Any) -> None:
    offset = int(store.document_offsets[1])
    rows = torch.tensor([offset, offset + 5, int(store.document_offsets[2]) - 1])
    first, middle, last = neighbor_spans(store, tokenizer, rows, before=3, after=2)
    name = "src/prose.txt"
    assert [s.document for s in (first, middle, last)] == [name] * 3
    assert first.before == "" and last.after == ""  # never text of another document
    around = tokenizer.decode(store.values[offset + 2 : offset + 8].tolist())
    assert middle.before + middle.token + middle.after == around
    assert TEXTS[name].startswith(first.token + first.after)


def test_spans_without_documents(tmp_path: Path, tokenizer: Any) -> None:
    with Datastore.create(tmp_path / "plain", 2) as store:
        store.append(torch.zeros(5, 2), torch.tensor([70, 71, 72, 73, 74]))
    opened = Datastore.open(tmp_path / "plain")
    (span,) = neighbor_spans(opened, tokenizer, torch.tensor([1]), before=9, after=9)
    assert (len(span.before), len(span.after), span.document) == (1, 3, "")


def test_excerpts_hold_consecutive_targets_of_one_document(scores: StreamScores) -> None:
    excerpts = choose_excerpts(scores, 2, 50)
    assert len(excerpts) == 2
    for positions in (excerpt.positions for excerpt in excerpts):
        assert len(scores.document_ids[positions].unique()) == 1
        assert not scores.ends_document[positions].any()
        assert positions.tolist() == list(range(int(positions[0]), int(positions[0]) + 50))
    assert len({excerpt.document for excerpt in excerpts}) == 2


def mixed(lm: float, knn: float | None, lmbda: float) -> float:
    return math.log((1 - lmbda) * math.exp(lm) + lmbda * (0 if knn is None else math.exp(knn)))


def test_explorer_data_agrees_with_the_scores(
    scores: StreamScores, store: Datastore, tokenizer: Any
) -> None:
    data = explorer_data(systems(scores), store, tokenizer, excerpt_tokens=40, num_neighbors=20)
    excerpt = data["excerpts"][0]
    document = data["documents"]
    at = choose_excerpts(scores, 12, 40)[0].positions
    for number, system in enumerate(systems(scores)):
        found = excerpt["systems"][number]
        log_p = [mixed(*p, system.lmbda) for p in zip(excerpt["lm"], found["knn"], strict=True)]
        wanted = system.scores.log_p(system.temperature, system.lmbda)[at]
        assert log_p == pytest.approx(wanted.tolist(), abs=1e-4)
        for i, near in enumerate(found["near"]):
            spans, distances, shares = near[0::3], near[1::3], near[2::3]
            assert len(spans) == (9, 4)[number]  # the padding is left out
            assert sum(shares) == pytest.approx(1, abs=1e-3)
            assert distances == sorted(distances)
            assert data["spans"][spans[0]][1] == excerpt["targets"][i]
            assert document[data["spans"][spans[0]][3]] == excerpt["name"]
            votes = dict(zip(found["votes"][i][0::2], found["votes"][i][1::2], strict=True))
            mass = votes.get(excerpt["targets"][i])
            if mass is not None:
                assert math.log(mass) == pytest.approx(found["knn"][i], abs=1e-3)
    assert [s["name"] for s in data["systems"]] == ["exact", "nearest"]
    assert [data["vocab"][t] for t in excerpt["targets"]] == [
        tokenizer.decode([t]) for t in scores.targets[at].tolist()
    ]


@pytest.mark.parametrize("most", [60_000, 20_000, 9_000, 1])
def test_the_data_keeps_to_its_size(
    scores: StreamScores, store: Datastore, tokenizer: Any, most: int
) -> None:
    """Excerpts become shorter, then fewer; of no page is nothing left."""
    whole = explorer_data(systems(scores), store, tokenizer)
    data = explorer_data(systems(scores), store, tokenizer, max_bytes=most)
    assert len(script_json(whole).encode()) > 60_000
    lengths = [len(excerpt["texts"]) for excerpt in data["excerpts"]]
    assert len(script_json(data).encode()) <= most or lengths == [1]
    assert lengths and max(lengths) < max(len(e["texts"]) for e in whole["excerpts"])


def test_a_page_is_small_enough_to_be_sent(report: Report) -> None:
    empty = len(render(replace(report, explorer=None)).encode())
    assert MAX_BYTES + empty < 1_900_000  # and some room for continuations


def test_the_page_leads_to_its_parts(report: Report) -> None:
    page = render(report)
    links = re.findall(r'<nav aria-label="On this page">(.*?)</nav>', page)
    named = re.findall(r'href="#([\w-]+)"', links[0])
    assert named == ["surface-title", "facts-title"]
    assert all(f'id="{name}"' in page for name in named)
    assert "<nav" not in render(Report("t", "l", report.rows))


def test_a_character_of_several_tokens_is_whole(tokenizer: Any, tmp_path: Path) -> None:
    """Byte pairs of a sign that the tokenizer has never seen, which no token shows alone."""
    ids = tokenizer.encode("a 漢 b 🦊", add_special_tokens=False)
    n = len(ids)
    with Datastore.create(tmp_path / "s", 2, vocab_size=len(tokenizer)) as writer:
        writer.append(torch.zeros(n, 2), torch.tensor(ids, dtype=torch.int32), [("d", n)])
    store = Datastore.open(tmp_path / "s")
    rows = torch.arange(n)[:, None]
    scores = StreamScores(
        torch.zeros(n) - 1, torch.tensor(ids), torch.zeros(n, dtype=torch.int64),
        torch.zeros(n, dtype=torch.bool), torch.ones(n, 1), store.values[rows[:, 0]][:, None],
        rows, ["d"],
    )  # fmt: skip
    (excerpt,) = explorer_data([System("x", scores, 1.0, 0.5)], store, tokenizer)["excerpts"]
    assert "".join(excerpt["texts"]) == "a 漢 b 🦊"
    assert len(excerpt["texts"]) == n > 4 and "" in excerpt["texts"]


def test_missing_indices_are_refused(
    scores: StreamScores, store: Datastore, tokenizer: Any
) -> None:
    parts = {name: getattr(scores, name) for name in scores.__dataclass_fields__}
    bare = StreamScores(**{**parts, "indices": None})
    with pytest.raises(ValueError, match="indices"):
        explorer_data([System("x", bare, 1.0, 0.5)], store, tokenizer)
    with pytest.raises(ValueError, match="at least one"):
        explorer_data([], store, tokenizer)


def test_page_is_whole_and_escaped(report: Report) -> None:
    page = render(report)
    assert page.count("</script>") == 2  # the data and the script, and none out of the corpus
    assert "<friends>" not in page and "Neighbors &amp; &lt;friends&gt;" in page
    assert "a &lt;i&gt; &amp; b" in page
    outside = re.sub(r'id="explorer-data">.*?</script>', "", page, flags=re.S)
    assert "{{" not in outside
    assert not re.search(r"""(src|href)=["'](?!#)""", page)  # nothing is fetched
    assert "http" not in page.replace("http-equiv", "")
    data = data_of(page)
    assert any("</script>" in s[0] + data["vocab"][s[1]] + s[2] for s in data["spans"])
    assert "docs/<b>nasty</b>.py" in data["documents"]


def test_script_json_ends_no_element() -> None:
    text = script_json({"a": "</script><!-- & \u2028"})
    assert not set(text) & set("<>&\u2028")
    assert json.loads(text) == {"a": "</script><!-- & \u2028"}


def test_report_without_tokens_or_surface(tmp_path: Path) -> None:
    path = write_report(tmp_path / "r.html", Report("t", "l", [Row("base", 2.0, (math.nan,) * 2)]))
    page = path.read_text(encoding="utf-8")
    assert "nan" not in page.lower().replace("infinity", "")
    assert data_of(page)["excerpts"] == []
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_lone_surrogates_do_not_end_a_report(tmp_path: Path) -> None:
    report = Report("t", "l", [], explorer=None, facts={"file": "bad\udcff"})
    assert "bad" in write_report(tmp_path / "r.html", report).read_text(encoding="utf-8")


def test_text_table_is_aligned(report: Report) -> None:
    lines = text_table(report.rows).splitlines()
    assert len(lines) == 4
    assert lines[3].startswith("exact") and "−55.0 %" in lines[3] and "130 MB" in lines[3]
    ends = [re.search(r"tokens/s|9,000|800", lines[i]).end() for i in (0, 2, 3)]  # type: ignore[union-attr]
    assert len(set(ends)) == 1


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (999_600, "1.0 MB"), (128e6, "128 MB")],
)
def test_format_bytes(count: float, text: str) -> None:
    assert format_bytes(count) == text

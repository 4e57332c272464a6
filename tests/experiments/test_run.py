"""Running, resuming, refusing, and the page that joins the results."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from knnext.cli import main
from knnext.experiments import catalog, run
from knnext.experiments.lab.presets import PRESETS, TINY, preset
from knnext.experiments.lab.results import (
    Description,
    Findings,
    PaperFigure,
    load_result,
    percent_interval,
    plain,
)
from knnext.experiments.report import markdown_table, write_report

PAPER = (PaperFigure("19.17 | <att>", "recalled"), PaperFigure("21.75", "code"))
DESCRIPTION = Description(
    "representation", "Fake & title", "Does it?", "It <does>.", "nothing", PAPER
)


class Fake:
    """An experiment that counts its runs."""

    DESCRIPTION = DESCRIPTION

    def __init__(self, fail: bool = False) -> None:
        self.runs, self.fail = 0, fail

    def run(self, lab):
        self.runs += 1
        with lab.step("work"):
            pass
        if self.fail:
            raise RuntimeError("broken on purpose")
        rows = [{"t": 1.0, "ppl": 12.345678, "x": None, "ok": True, "ci": [1.0, float("inf")]}]
        return Findings(rows, "agrees", "It does, by <5>.", "-5.0 % [-6.0, -4.0]")

    def plot(self, result, axes):
        axes.plot([0, 1], [result["rows"][0]["ppl"]] * 2)


@pytest.fixture
def fake(monkeypatch):
    modules = {"representation": Fake(), "padding": Fake(fail=True)}
    monkeypatch.setattr(run, "load", modules.__getitem__)
    return modules


def quiet(_line: str) -> None:
    pass


def test_a_finished_one_is_not_run_again(fake, tmp_path):
    first = run.run_experiment("representation", TINY, tmp_path, say=quiet)
    again = run.run_experiment("representation", TINY, tmp_path, say=quiet)
    assert fake["representation"].runs == 1
    assert again == first == load_result(tmp_path / "representation.json")
    assert first["rows"][0] == {"t": 1.0, "ppl": 12.345678, "x": None, "ok": True, "ci": [1, None]}
    assert first["versions"]["torch"]
    assert first["preset"]["train"]["dim"] == TINY.train.dim
    assert (tmp_path / "representation.png").read_bytes()[:4] == b"\x89PNG"
    run.run_experiment("representation", TINY, tmp_path, fresh=True, say=quiet)
    assert fake["representation"].runs == 2


def test_other_settings_are_refused_by_name(fake, tmp_path):
    run.run_experiment("representation", TINY, tmp_path, say=quiet)
    with pytest.raises(ValueError, match=r"other settings \(k 64, not 65\)"):
        run.run_experiment("representation", TINY.with_options(k=65), tmp_path, say=quiet)


def test_a_failing_one_does_not_stop_the_others(fake, tmp_path):
    results, failures = run.run_all(TINY, tmp_path, names=("padding", "representation"), say=quiet)
    assert list(results) == ["representation"]
    assert failures == {"padding": "RuntimeError: broken on purpose"}
    assert not (tmp_path / "padding.json").exists()


def test_a_damaged_result_is_named(tmp_path):
    (tmp_path / "representation.json").write_text("{")
    with pytest.raises(ValueError, match="does not hold an experiment's result"):
        load_result(tmp_path / "representation.json")
    (tmp_path / "representation.json").write_text('{"format_version": 99}')
    with pytest.raises(ValueError, match="format version 99"):
        load_result(tmp_path / "representation.json")


def test_the_page(fake, tmp_path):
    run.run_experiment("representation", TINY, tmp_path, say=quiet)
    said: list[str] = []
    page, table = write_report(tmp_path, ("representation", "padding"), said.append)
    assert said[0] == "not run yet: padding"
    text = page.read_text()
    check_page(text)
    assert "It &lt;does&gt;." in text and "<does>" not in text
    assert "(recalled, unverified)" in text
    assert "data:image/png;base64," in text
    assert "http" not in re.sub(r"base64,[^']*", "", text).replace("http-equiv", "")
    rows = table.read_text().splitlines()
    assert rows[0] == "# The experiments" and rows[2].startswith("| experiment | claim")
    assert "19.17 \\| <att> (recalled, unverified); 21.75 |" in rows[4]
    assert rows[4].endswith("| -5.0 % [-6.0, -4.0] | agrees |")


def check_page(text: str) -> None:
    """Every element that is opened is closed, in order."""
    void = {"meta", "img", "br", "link"}
    stack: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in void:
                stack.append(tag)

        def handle_endtag(self, tag):
            assert stack.pop() == tag

    Checker().feed(text)
    assert stack == []


def test_an_empty_folder_has_no_page(tmp_path):
    with pytest.raises(ValueError, match="holds no results"):
        write_report(tmp_path, say=quiet)


def test_markdown_of_nothing_recalled():
    result = SimpleNamespace()
    result = {**vars(result), "claim": "c", "paper": [], "headline": "h", "agreement": "agrees"}
    assert markdown_table({"x": result}).splitlines()[2] == "| x | c | – | h | agrees |"


def test_percentages():
    assert percent_interval(0.0, -0.01, 0.01) == "+0.0 % [-1.0, +1.0]"
    assert percent_interval(0.0, 0.0, 0.0) == "+0.0 % [+0.0, +0.0]"
    assert percent_interval(0.1, float("nan"), float("nan")) == "-9.5 %"
    assert plain({"a": (1, float("nan"))}) == {"a": [1, None]}


def test_presets():
    assert preset("small") is PRESETS["small"]
    with pytest.raises(ValueError, match="preset must be one of small"):
        preset("huge")
    for one in PRESETS.values():
        json.dumps(one.to_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "experiment must be one of representation"),
        (["all", "--only", "representation,x"], "got 'x'"),
        (["representation", "--set", "x.y=1"], "--set must be EXPERIMENT.OPTION=JSON"),
        (["representation", "--set", "padding.share={"], "must be given JSON"),
        (["padding", "--set", "padding.shares=1"], "has no such option, but fractions, share"),
        (["representation", "--only", "padding"], "--only goes with all and report"),
        (["report", "--out", "/nonexistent"], "holds no results"),
    ],
)
def test_wrong_command_lines(capsys, arguments, message):
    assert main(["experiment", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_options_reach_the_preset(fake, tmp_path, capsys, monkeypatch):
    seen = []

    def run_experiment(name, settings, out, **_):
        seen.append((name, settings, str(out)))
        return {"name": name}

    monkeypatch.setattr(run, "run_experiment", run_experiment)
    arguments = ["experiment", "padding", "--preset", "tiny", "--out", str(tmp_path), "--json"]
    arguments += ["--seeds", "4,5", "--k", "7", "--set", "padding.share=0.5"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out) == {"name": "padding"}
    ((name, settings, out),) = seen
    assert (name, out) == ("padding", str(tmp_path))
    assert settings == TINY.with_options(k=7, seeds=(4, 5), options={"padding.share": 0.5})
    assert settings.option("padding.share", 0.1) == 0.5
    assert settings.option("padding.other", 0.1) == 0.1


def test_the_options_named_are_those_that_are_read():
    """By the source, of the laboratory too: `option("NAME.OPTION", ...)`, or in NAME.py
    `_option(lab, "OPTION", ...)`."""
    read = set()
    for path in Path(catalog.__file__).parent.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        read |= set(re.findall(r'option\(\s*"([a-z-]+\.\w+)"', source))
        own = re.findall(r'_option\(lab, "(\w+)"', source)
        read |= {f"{path.stem.replace('_', '-')}.{option}" for option in own}
    named = {f"{name}.{option}" for name in catalog.NAMES for option in catalog.OPTIONS[name]}
    assert read == named


def test_every_experiment_describes_itself(capsys):
    assert main(["experiment", "list"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == list(catalog.NAMES)
    for name in catalog.NAMES:
        module = catalog.load(name)
        assert name == module.DESCRIPTION.name
        assert module.DESCRIPTION.question.endswith("?")
        assert callable(module.run)
        assert callable(module.plot)

"""The page to decide from: what it says, and that it holds everything it needs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("jinja2", reason="the [report] extra has it")
pytest.importorskip("PIL", reason="the [report] extra has it")

import atpatch_onnx
from atpatch_onnx import cli
from atpatch_onnx.certificate import Check
from atpatch_onnx.errors import InputError
from atpatch_onnx.rates import Rate
from atpatch_onnx.reporting import charts, report
from atpatch_onnx.reporting.collect import Sources, collect
from atpatch_onnx.reporting.command import load_vocabulary
from atpatch_onnx.reporting.findings import Findings, Labels
from atpatch_onnx.reporting.page import render
from atpatch_onnx.reporting.verdict import judge

from hosts import save_arrays
from reporting_hosts import KINDS, TARGET, inputs, patched

NASTY = "<script>alert('x')</script>\"&"
VOID = frozenset("area base br col hr img input link meta rect circle path use image".split())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: patched(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def findings(folders: dict[str, Path]) -> dict[str, Findings]:
    return {kind: measure(folder) for kind, folder in folders.items()}


def measure(folder: Path, *, bad: str | None = "bad.npz", clean: str = "clean.npz") -> Findings:
    sources = Sources(folder / clean, None if bad is None else folder / bad)
    model = folder / "model.onnx", folder / "model.patched.onnx"
    return collect(*model, sources, runs=2, ep="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_is_whole_and_loads_nothing(kind: str, findings: dict[str, Findings]) -> None:
    found = replace(
        findings[kind], labels=Labels((), (NASTY,) * 3, dict.fromkeys(range(16), NASTY))
    )
    page = render(found, judge(found))
    seen = Outline.of(page)
    assert found.kind == kind
    assert len(page.encode()) < 3_000_000
    assert seen.headings[0] == 1
    assert seen.headings.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(seen.headings, seen.headings[1:], strict=False))
    assert len(seen.ids) == len(set(seen.ids))
    assert set(seen.references) <= set(seen.ids)
    assert seen.lang == "en"
    assert {"header", "nav", "main", "footer"} <= seen.landmarks
    assert "script" not in seen.tags
    assert all(url.startswith(("data:", "#")) for url in seen.urls)
    assert not re.search(r"@import|url\(|javascript:|https?://", page)
    assert "default-src 'none'" in page
    assert not seen.unnamed


@pytest.mark.parametrize(
    ("kind", "marks"),
    [("image", "svg.overlay"), ("text", "div.tokens"), ("tabular", "table.bars")],
)
def test_every_kind_of_input_is_drawn_its_way(
    kind: str, marks: str, findings: dict[str, Findings]
) -> None:
    found = findings[kind]
    page = render(found, judge(found))
    tag, name = marks.split(".")
    drawn = len(re.findall(f'<{tag} class="{name}"', page))
    panels = sum(len(example.sites) for example in found.examples)
    assert drawn == panels * (1 if kind == "tabular" else 2)
    titles = [example.title for example in found.examples]
    assert titles == ["A clean input, not flagged", "A bad input, flagged", "A bad input, flagged"]
    for example in found.examples[1:]:
        assert (example.before, example.label) == (TARGET, example.after)
        assert example.flagged


def test_rates_are_those_of_evaluate(
    folders: dict[str, Path], findings: dict[str, Findings]
) -> None:
    folder = folders["image"]
    expected = atpatch_onnx.evaluate(
        folder / "model.onnx",
        folder / "model.patched.onnx",
        folder / "clean.npz",
        triggered=folder / "bad.npz",
    )
    assert findings["image"].evaluation == expected
    page = render(findings["image"], judge(findings["image"]))
    assert "100.0\u202f%" in page
    assert findings["image"].original.sha256 in page
    assert f"atpatch-onnx revert {folder / 'model.patched.onnx'}" in page


def test_a_healed_model_is_to_be_deployed(findings: dict[str, Findings]) -> None:
    for found in findings.values():
        verdict = judge(found)
        assert verdict.headline == "Deploy the patched model"
        assert {answer.status for answer in verdict.answers} == {"good"}


def test_what_speaks_against_it(findings: dict[str, Findings]) -> None:
    found = findings["image"]
    evaluation = found.evaluation
    assert evaluation is not None
    assert evaluation.attack is not None
    rate = evaluation.attack.attack_success_rate
    still = replace(evaluation.attack, attack_success_rate=replace(rate, after=rate.before))
    worse = replace(evaluation.accuracy, after=Rate.counted(50, 60))
    outputs = [replace(found.clean.outputs[0], unflagged_changed=2)]
    moved = replace(found.clean, identity=False, outputs=outputs)
    failed = (Check("only additions", False, "a weight differs"),)
    for other, headline, said in (
        (replace(found, evaluation=replace(evaluation, attack=still)), "yet", "not fully healed"),
        (replace(found, evaluation=replace(evaluation, accuracy=worse)), "yet", "costs too much"),
        (replace(found, clean=moved), "Do not deploy this file", "2 inputs moved in which"),
        (replace(found, checks=failed), "Do not deploy this file", "a weight differs"),
        (replace(found, evaluation=None), "Not enough evidence", "has not been shown"),
    ):
        verdict = judge(other)
        assert headline in verdict.headline
        assert said in verdict.reason
        assert render(other, verdict)


def test_a_few_healed_inputs_prove_little(findings: dict[str, Findings]) -> None:
    found = findings["image"]
    evaluation = found.evaluation
    assert evaluation is not None
    assert evaluation.attack is not None
    rate = evaluation.attack.attack_success_rate
    for hits, total, status in ((0, 10, "open"), (0, 200, "good"), (30, 200, "bad")):
        after = replace(rate, after=Rate.counted(hits, total))
        attack = replace(evaluation.attack, attack_success_rate=after)
        other = replace(found, evaluation=replace(evaluation, attack=attack))
        verdict = judge(other)
        assert verdict.answers[0].status == status
        assert ("too few" in verdict.reason) == (status == "open")


def test_flags_are_too_many_only_beyond_doubt(findings: dict[str, Findings]) -> None:
    found = findings["image"]
    assert found.evaluation is not None
    for hits, total, status in ((3, 60, "good"), (12, 60, "bad"), (0, 60, "good")):
        share = Rate.counted(hits, total)
        evaluation = replace(found.evaluation, false_positive_rate=share)
        answers = judge(replace(found, evaluation=evaluation)).answers
        assert answers[1].status == status


def test_without_labels_or_bad_inputs_nothing_is_claimed(folders: dict[str, Path]) -> None:
    folder = folders["text"]
    arrays = inputs("text")
    del arrays["labels"]
    save_arrays(folder / "unlabelled.npz", arrays)
    found = measure(folder, bad=None, clean="unlabelled.npz")
    verdict = judge(found)
    assert found.evaluation is None
    assert verdict.headline == "Not enough evidence yet"
    page = render(found, verdict)
    assert "cannot show what was wrong" in page
    assert 'id="rates"' not in page


def test_protected_attributes_of_a_scan_are_flipped(tmp_path: Path) -> None:
    """The attribute in column 3 is pruned everywhere: nobody is swayed by it any more."""
    folder = patched("tabular", tmp_path)
    atpatch_onnx.patch(folder / "model.onnx", columns=3, redistribute="prune", force=True)
    bad = inputs("tabular", triggered=True)
    del bad["target"]
    about = {"made_by": "atpatch-onnx scan", "protected": [{"name": "3"}]}
    save_arrays(folder / "swayed.npz", {**bad, "about": np.array(json.dumps(about))})
    rows = inputs("tabular")
    rows["row"][0, 3] = 1  # the other value occurs
    save_arrays(folder / "clean.npz", rows)
    found = replace(measure(folder, bad="swayed.npz"), labels=Labels(("a", "b", "c", "sex", "d")))
    assert found.flags_always
    assert found.evaluation is not None
    (unfair,) = found.evaluation.unfairness
    assert unfair.rate.before.value > 0.5
    assert unfair.rate.after.value == 0
    verdict = judge(found)
    assert verdict.headline == "Deploy the patched model"
    assert "swayed by sex (column 3)" in render(found, verdict)


def test_the_command(
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = folders["image"]
    monkeypatch.chdir(folder)
    page = tmp_path / "report.html"
    options = f"model.onnx model.patched.onnx --clean clean.npz --bad bad.npz -o {page}"
    words = f"atpatch-onnx report {options} --runs 2 --classes a,b,c --ep cpu".split()

    def call(*more: str) -> int:
        monkeypatch.setattr(sys, "argv", [*words, *more])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0)

    assert call("--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["recommendation"] == "good"
    assert document["size_bytes"] == page.stat().st_size
    assert "2 (c)" in page.read_text()
    assert call() == 0  # it replaces its own page
    assert "Deploy the patched model" in capsys.readouterr().out
    page.write_text("mine")
    assert call() == 2
    assert "exists already" in capsys.readouterr().err
    assert page.read_text() == "mine"


def test_a_patch_that_is_none_writes_no_page(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["image"]
    model = folder / "model.onnx"
    with pytest.raises(atpatch_onnx.AtpatchError):
        report(model, model, tmp_path / "report.html", clean=folder / "clean.npz")
    assert not list(tmp_path.iterdir())


def test_without_the_extra_the_fix_is_said(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "atpatch_onnx.reporting.page")
    folder = folders["image"]
    models = folder / "model.onnx", folder / "model.patched.onnx"
    with pytest.raises(InputError, match=r"pip install 'atpatch-onnx\[report\]'"):
        report(*models, tmp_path / "report.html", clean=folder / "clean.npz")


def test_vocabularies(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[CLS]\nfilm\n")
    assert load_vocabulary(tmp_path / "vocab.txt")[2] == "film"
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 1}}}')
    assert load_vocabulary(tmp_path / "tokenizer.json") == {0: "a", 1: "b"}
    (tmp_path / "unigram.json").write_text('{"model": {"vocab": [["a", -1.5], ["b", -2]]}}')
    assert load_vocabulary(tmp_path / "unigram.json") == {0: "a", 1: "b"}
    for text in ('{"model": 1}', "", "\xff"):
        (tmp_path / "odd").write_bytes(text.encode("latin-1"))
        with pytest.raises(InputError, match="is no vocabulary"):
            load_vocabulary(tmp_path / "odd")


@pytest.mark.parametrize(
    ("size", "keys", "grid"),
    [
        ((8, 8), 17, (4, 4)),
        ((224, 224), 197, (14, 14)),
        ((224, 224), 198, (14, 14)),
        ((32, 64), 33, (4, 8)),
        ((28, 28), 49, (7, 7)),
        ((32, 32), 40, None),
    ],
)
def test_patches_of_an_image_are_told_from_their_number(
    size: tuple[int, int], keys: int, grid: tuple[int, int] | None
) -> None:
    assert charts.grid_of(*size, keys) == grid


def test_bars_stay_within_their_strip() -> None:
    for value in (-1.0, 0.0, 0.5, 2.0, float("nan"), float("inf")):
        for drawn in (charts.bar(value), charts.interval(value, value, value)):
            for number in re.findall(r' (?:x|width)="([^"]+)"', drawn):
                assert 0 <= float(number) <= 100


def test_colours_have_contrast() -> None:
    """WCAG 2.2 AA: 4.5 for text, 3 for what is drawn; in both themes."""
    style = (Path(charts.__file__).parent / "page.css").read_text()
    themes = [
        dict(re.findall(r"--([a-z]+):([^;}]+)", t)) for t in re.findall(r":root\{[^}]+", style)
    ]
    assert len(themes) == 2
    for theme in themes:
        grounds = [colour(theme[name]) for name in ("bg", "surface")]
        for name in ("ink", "muted", "link", "flag", "good", "bad", "open"):
            assert min(contrast(colour(theme[name]), g) for g in grounds) >= 4.5, name
        assert contrast(colour(theme["ink"]), colour(theme["soft"])) >= 4.5
        assert contrast(colour(theme["ink"]), colour(theme["token"])) >= 4.5
        for name in ("before", "after"):
            assert min(contrast(colour(theme[name]), g) for g in grounds) >= 3, name


Colour = tuple[float, float, float]


def colour(text: str) -> Colour:
    if text.startswith("#"):
        digits = text[1:] if len(text) == 7 else "".join(2 * d for d in text[1:])
        parts = [int(digits[i : i + 2], 16) for i in (0, 2, 4)]
    else:
        parts = [int(part) for part in text.split(",")]
    red, green, blue = (part / 255 for part in parts)
    return red, green, blue


def contrast(one: Colour, other: Colour) -> float:
    """WCAG's contrast ratio."""

    def luminance(parts: Colour) -> float:
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


class Outline(HTMLParser):
    """What of a page can be checked without a browser. Raises: AssertionError if tags cross."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.landmarks: set[str] = set()
        self.headings: list[int] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.urls: list[str] = []
        self.unnamed: list[str] = []
        self.lang: str | None = None

    @classmethod
    def of(cls, page: str) -> Outline:
        outline = cls()
        outline.feed(page)
        outline.close()
        assert outline.open == []
        return outline

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        held = dict(attrs)
        self.tags.add(tag)
        self.landmarks |= {tag} & {"header", "nav", "main", "footer"}
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        self.lang = held["lang"] if tag == "html" else self.lang
        self.ids += [held["id"] or ""] if "id" in held else []
        self.references += list(_references(held))
        self.urls += [held[name] or "" for name in ("href", "src") if name in held]
        picture = tag == "img" or held.get("role") == "img"
        hidden = held.get("aria-hidden") == "true"
        if picture and not (held.get("aria-label") or held.get("alt")):
            self.unnamed.append(tag)
        if tag == "svg" and not (picture or hidden):
            self.unnamed.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def _references(held: dict[str, str | None]) -> Iterator[str]:
    yield from (held.get("aria-labelledby") or "").split()
    target = held.get("href") or ""
    if target.startswith("#"):
        yield target[1:]

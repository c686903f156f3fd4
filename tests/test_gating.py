"""Limits on what a patch changes: which hold, what is said, and the XML that CI systems read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from atpatch_onnx import cli, junit
from atpatch_onnx.diffing import OutputDifference, add_output_difference
from atpatch_onnx.errors import CheckError, InputError
from atpatch_onnx.gating import Gate, Limits, gate
from atpatch_onnx.runtime import Session

from hosts import save_arrays
from reporting_hosts import inputs, patched

KNOWN = {
    "testsuites": {"name", "time", "tests", "failures", "disabled", "errors"},
    "testsuite": {
        *("name", "tests", "failures", "errors", "time", "disabled", "skipped"),
        *("timestamp", "hostname", "id", "package", "file", "log", "url", "version", "group"),
    },
    "properties": set(),
    "property": {"name", "value"},
    "testcase": {"name", "assertions", "time", "classname", "status", "class", "file", "line"},
    "failure": {"message", "type"},
    "error": {"message", "type"},
    "system-out": set(),
}
"""Elements of Jenkins' junit-10.xsd that are used, and the attributes that it knows of each."""
INSIDE = {
    "testsuites": {"testsuite"},
    "testsuite": {"properties", "testcase", "system-out"},
    "properties": {"property"},
    "testcase": {"failure", "error", "system-out"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = patched("image", tmp_path_factory.mktemp("gated"))
    clean, bad = inputs("image", 30), inputs("image", 10, triggered=True)
    mixed = {"pixels": np.concatenate([clean["pixels"], bad["pixels"]])}
    save_arrays(made / "mixed.npz", mixed)
    return made


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`diff` with options; returns its exit code and what it wrote to both streams."""
    monkeypatch.chdir(folder)

    def call(*options: str) -> tuple[int, str, str]:
        words = ["atpatch-onnx", "diff", "model.onnx", "model.patched.onnx", *options]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        said = capsys.readouterr()
        return int(stopped.value.code or 0), said.out, said.err

    return call


def test_gates_against_numpy(folder: Path) -> None:
    """Ten of forty inputs are triggered, all of which are flagged and get another class."""
    pixels = np.load(folder / "mixed.npz")["pixels"]
    before, after = (
        Session(folder / name, "cpu").run({"pixels": pixels})["logits"]
        for name in ("model.onnx", "model.patched.onnx")
    )
    moved = float(np.abs(before.astype(np.float64) - after).max())
    agreeing = float((before.argmax(1) == after.argmax(1)).mean())
    assert agreeing == 0.75
    limits = Limits.parse([f"logits:{moved}"], 0.25, agreeing)
    found = gate(*_models(folder), folder / "mixed.npz", limits, ep="cpu")
    assert not found.failed
    assert found.verdict == ""
    assert {g.title: g.found for g in found.gates} == {
        "unflagged-identical": 0,
        "atol:logits": pytest.approx(moved),
        "max-flagged": 0.25,
        "agreement:logits": 0.75,
    }
    limits = Limits.parse([f"{moved * 0.999}"], 0.249, 0.751)
    found = gate(*_models(folder), folder / "mixed.npz", limits, ep="cpu")
    assert [g.name for g in found.failed] == ["atol", "max-flagged", "agreement"]
    assert "the gate atol:logits failed" in found.verdict
    assert "so did max-flagged, agreement:logits" in found.verdict


def test_the_limit_of_an_output_goes_before_that_of_all(folder: Path) -> None:
    limits = Limits.parse(["1e-9", "logits:100"])
    assert not gate(*_models(folder), folder / "mixed.npz", limits, ep="cpu").failed


def test_a_number_that_turns_into_none_passes_no_tolerance() -> None:
    old = np.array([[1.0, np.nan, np.inf], [1.0, 2.0, 3.0]], np.float32)
    for new, largest in (
        (old.copy(), 0.0),
        (np.where(np.isnan(old), 0, old), np.inf),
        (np.where(old == 2, np.nan, old), np.inf),
        (np.where(np.isinf(old), -np.inf, old), np.inf),
        (np.where(old == 2, 2.5, old), 0.5),
    ):
        found = OutputDifference("y")
        add_output_difference(found, old, new.astype(np.float32), np.ones(2, bool), 2)
        assert found.maximum == largest


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"atol": ["logits:x"]}, "--atol logits:x"),
        ({"atol": ["-1"]}, "--atol -1"),
        ({"atol": ["nan"]}, "--atol nan"),
        ({"atol": ["1", "2"]}, "another limit already"),
        ({"max_flagged": 2.0}, "--max-flagged 2"),
        ({"agreement": -0.1}, "--agreement -0.1"),
        ({"latency": 0.0}, "--latency 0"),
    ],
)
def test_limits_that_mean_nothing(options: dict[str, Any], wrong: str) -> None:
    with pytest.raises(InputError, match=wrong):
        Limits.parse(**options)


def test_names_of_outputs_may_hold_colons() -> None:
    assert Limits.parse(["scope:0:1e-3", "0.5"]).atol == {"scope:0": 1e-3, "": 0.5}


def test_limits_on_outputs_need_inputs_and_outputs(folder: Path) -> None:
    with pytest.raises(InputError, match="--inputs"):
        gate(*_models(folder), limits=Limits.parse(["1"]))
    with pytest.raises(InputError, match="found: logits"):
        gate(*_models(folder), folder / "mixed.npz", Limits.parse(["nowhere:1"]), ep="cpu")


def test_the_command_names_the_gate_and_writes_both_documents(run: Any, folder: Path) -> None:
    options = ("--inputs", "mixed.npz", "--atol", "1e9", "--max-flagged", "0.1", "--ep", "cpu")
    code, out, err = run(*options, "--junit", "out.xml", "--json")
    assert code == 1
    assert "the gate max-flagged failed: 10 of 40 inputs flagged (25.00%)" in err
    assert err.count("\n") == 1
    document = json.loads(out)
    assert [g["passed"] for g in document["gates"]] == [True, True, False]
    assert document["flagged_inputs"] == 10
    suite = check_junit((folder / "out.xml").read_bytes())
    names = [case.get("name") for case in suite.iter("testcase")]
    assert names == ["unflagged-identical", "atol logits", "max-flagged"]
    (failure,) = suite.iter("failure")
    assert "10 of 40" in str(failure.get("message"))
    code, out, _ = run(*options[:-4], "--max-flagged", "0.25", "--junit", "out.xml")
    assert code == 0
    assert "passed" in out
    assert not list(check_junit((folder / "out.xml").read_bytes()).iter("failure"))


def test_latency_is_a_ratio_of_paired_runs(run: Any) -> None:
    assert run("--latency", "1e6", "--ep", "cpu")[0] == 0
    code, _, err = run("--latency", "1e-6", "--ep", "cpu")
    assert code == 1
    assert "the gate latency failed: the patched model takes" in err


def test_other_files_are_not_replaced(run: Any, folder: Path) -> None:
    (folder / "notes.xml").write_text("<notes/>")
    code, _, err = run("--junit", "notes.xml")
    assert code == 2
    assert "exists already" in err
    assert (folder / "notes.xml").read_text() == "<notes/>"


def test_a_model_that_is_no_patched_one_is_an_error_in_the_document(
    folder: Path, tmp_path: Path
) -> None:
    altered = tmp_path / "altered.onnx"
    content = bytearray((folder / "model.patched.onnx").read_bytes())
    content[content.index(b"logits")] ^= 1
    altered.write_bytes(content)
    written = tmp_path / "out.xml"
    with pytest.raises(CheckError):
        junit.gate_to(written, folder / "model.onnx", altered, None, Limits())
    suite = check_junit(written.read_bytes())
    assert suite.get("errors") == "1"
    (error,) = suite.iter("error")
    assert error.get("type") == "CheckError"


def test_names_that_xml_cannot_hold() -> None:
    odd = Gate("atol", 'a"<&\x00\x1b', False, 1.0, 0.5, "moved \x07 & <more>")
    suite = check_junit(junit.junit_xml([odd], {"model": "a&b\x01"}))
    (case,) = suite.iter("testcase")
    assert case.get("name") == 'atol a"<&\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}'


def check_junit(content: bytes) -> ElementTree.Element:
    """The one suite of a document that has the form of Jenkins' junit-10.xsd."""
    root = ElementTree.fromstring(content)
    assert root.tag == "testsuites"
    for element in root.iter():
        assert set(element.attrib) <= KNOWN[element.tag]
        assert {child.tag for child in element} <= INSIDE.get(element.tag, set())
    (suite,) = root
    cases = list(suite.iter("testcase"))
    assert len({(c.get("classname"), c.get("name")) for c in cases}) == len(cases)
    assert all(case.get("name") and case.get("classname") for case in cases)
    for where in (root, suite):
        assert where.get("tests") == str(len(cases))
        assert where.get("failures") == str(len(list(root.iter("failure"))))
        assert where.get("errors") == str(len(list(root.iter("error"))))
    return suite


def _models(folder: Path) -> tuple[Path, Path]:
    return folder / "model.onnx", folder / "model.patched.onnx"


def test_nothing_to_compare_is_said(folder: Path, tmp_path: Path) -> None:
    save_arrays(tmp_path / "bad.npz", inputs("image", 5, triggered=True))
    found = gate(
        folder / "model.onnx", folder / "model.patched.onnx", tmp_path / "bad.npz", ep="cpu"
    )
    (identical,) = found.gates
    assert identical.passed
    assert identical.message == "all 5 inputs are flagged: there is none to compare bit for bit"

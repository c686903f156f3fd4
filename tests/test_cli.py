"""The command line end to end on a model that it has not seen, and what it prints for programs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import atpatch_onnx
from atpatch_onnx import cli

from hosts import attention, random_feeds, save_arrays


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    onnx.save(attention(17), tmp_path / "model.onnx")
    many = [random_feeds(seed=seed) for seed in range(30)]
    for feeds in many:
        feeds["mask"][:] = 0
    clean = {name: np.concatenate([feeds[name] for feeds in many]) for name in many[0]}
    save_arrays(tmp_path / "clean.npz", clean)
    return tmp_path


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command in `folder`; returns its exit code and what it printed."""
    monkeypatch.chdir(folder)

    def call(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["atpatch-onnx", *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0), capsys.readouterr().out

    return call


def test_the_main_job(run: Any, folder: Path) -> None:
    original = (folder / "model.onnx").read_bytes()
    code, text = run("inspect", "model.onnx", "--json")
    found = json.loads(text)
    assert code == 0
    assert [site["name"] for site in found["sites"]] == ["attention.0", "attention.1"]
    assert {"name", "index", "form", "scope", "heads", "causal", "cross"} <= set(found["sites"][0])
    assert found["other"] == []
    commands = [
        ("fit", "model.onnx", "--data", "clean.npz", "-o", "det.onnx", "--fpr", "0.05"),
        ("patch", "model.onnx", "--detector", "det.onnx"),
        ("patch", "model.onnx", "--detector", "det.onnx", "--patch-only", "fix.atpatch"),
        ("apply", "model.onnx", "fix.atpatch", "-o", "applied.onnx"),
        ("diff", "model.onnx", "model.patched.onnx", "--inputs", "clean.npz"),
        ("verify", "model.onnx", "model.patched.onnx"),
        ("bench", "model.onnx", "model.patched.onnx", "--inputs", "clean.npz", "--runs", "3"),
        ("revert", "model.patched.onnx", "-o", "original.onnx"),
    ]
    for command in commands:
        code, text = run(*command, "--json")
        assert code == 0, text
        assert json.loads(text)
    assert (folder / "applied.onnx").read_bytes() == (folder / "model.patched.onnx").read_bytes()
    assert (folder / "original.onnx").read_bytes() == original
    assert (folder / "model.onnx").read_bytes() == original
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "command", ["inspect", "fit", "patch", "diff", "verify", "bench", "revert"]
)
def test_people_get_text(command: str, run: Any) -> None:
    for words in (
        ("fit", "model.onnx", "--data", "clean.npz", "-o", "det.onnx"),
        ("patch", "model.onnx", "--detector", "det.onnx", "--sites", "attention.1"),
    ):
        assert run(*words)[0] == 0
    code, text = run(
        *{
            "inspect": ("inspect", "model.onnx"),
            "fit": ("fit", "model.onnx", "--data", "clean.npz", "-o", "det.onnx"),
            "patch": ("patch", "model.onnx", "--detector", "det.onnx", "--sites", "0"),
            "diff": ("diff", "model.onnx", "model.patched.onnx", "--inputs", "clean.npz"),
            "verify": ("verify", "model.onnx", "model.patched.onnx"),
            "bench": (
                "bench",
                "model.onnx",
                "model.patched.onnx",
                "--inputs",
                "clean.npz",
                "--runs",
                "2",
            ),
            "revert": ("revert", "model.patched.onnx", "-o", "back.onnx"),
        }[command]
    )
    assert code == 0
    expected = {
        "inspect": "attention.1",
        "fit": "expect",
        "patch": "skipped",
        "diff": "rewired",
        "verify": "passed",
        "bench": "patched / original",
        "revert": "byte for byte",
    }
    assert expected[command] in text


def test_a_plan_is_written_edited_and_obeyed(run: Any, folder: Path) -> None:
    assert run("inspect", "model.onnx", "--plan", "plan.toml")[0] == 0
    plan = (folder / "plan.toml").read_text()
    assert plan.count("patch = true") == 2
    plan = plan.replace("patch = true", "patch = false", 1)
    plan = plan.replace("patch = true", 'patch = true\ncolumns = [2]\nredistribute = "uniform"')
    (folder / "plan.toml").write_text(plan)
    code, text = run("patch", "model.onnx", "--plan", "plan.toml", "--json")
    assert code == 0
    outcomes = {o["site"]: o for o in json.loads(text)["outcomes"]}
    assert outcomes["attention.0"]["outcome"] == "skipped"
    assert outcomes["attention.1"]["redistribution"] == "uniform"


def test_two_patches_on_one_model_come_off_together(run: Any, folder: Path) -> None:
    assert run("patch", "model.onnx", "--columns", "1", "--sites", "0", "-o", "one.onnx")[0] == 0
    assert run("patch", "one.onnx", "--columns", "2", "-o", "two.onnx")[0] == 0
    assert run("verify", "one.onnx", "two.onnx")[0] == 0
    assert run("patch", "two.onnx", "--columns", "2", "-o", "three.onnx")[0] == 3
    assert run("revert", "two.onnx", "-o", "back.onnx")[0] == 0
    assert (folder / "back.onnx").read_bytes() == (folder / "model.onnx").read_bytes()


def test_models_in_the_wrong_order_are_told_apart(run: Any) -> None:
    run("patch", "model.onnx", "--columns", "1")
    for command in ("diff", "verify", "bench"):
        assert run(command, "model.patched.onnx", "model.onnx")[0] == 2


def test_a_check_that_fails_exits_with_1(run: Any, folder: Path) -> None:
    run("patch", "model.onnx", "--columns", "1")
    content = bytearray((folder / "model.patched.onnx").read_bytes())
    at = content.index(b"c0")
    content[at : at + 2] = b"v0"
    (folder / "model.patched.onnx").write_bytes(content)
    code, text = run("verify", "model.onnx", "model.patched.onnx", "--json")
    assert code == 1
    assert json.loads(text)["passed"] is False


def test_an_input_that_moved_though_nothing_was_flagged_fails_the_diff(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check is on the numbers themselves: a reader that sees no flags makes it fail."""
    from atpatch_onnx.diffing import FlagReader

    run("patch", "model.onnx", "--columns", "1")

    def blind(_reader: FlagReader, part: Any) -> Any:
        return np.zeros(part.real, bool)

    monkeypatch.setattr(FlagReader, "read", blind)
    assert run("diff", "model.onnx", "model.patched.onnx", "--inputs", "clean.npz")[0] == 1


def test_the_module_and_the_script_are_the_same_program(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "atpatch_onnx", "inspect", "model.onnx", "--json"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(json.loads(done.stdout)["sites"]) == 2


def test_the_functions_have_the_names_of_the_commands() -> None:
    commands = {command.callback.__name__ for command in cli.app.registered_commands}  # type: ignore[union-attr]
    assert commands <= set(atpatch_onnx.__all__)
    assert all(callable(getattr(atpatch_onnx, name)) for name in atpatch_onnx.__all__)
    with pytest.raises(AttributeError):
        atpatch_onnx.nothing  # noqa: B018

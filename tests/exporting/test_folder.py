"""Exports appear whole or not at all, and the command says what it made."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from atpatch_onnx import InputError, cli, export
from atpatch_onnx.exporting import command
from atpatch_onnx.exporting.folder import copy, new_folder

from releases import make_release, save_data


@pytest.fixture
def release(tmp_path: Path) -> Path:
    folder = make_release(tmp_path / "digits")
    save_data(folder)
    return folder


def content(folder: Path) -> dict[Path, bytes]:
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_full_disk_leaves_what_was_there(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = release / "model.onnx", release / "model.patched.onnx"
    export("edge", *files, output=tmp_path / "out")
    before = content(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(command, "write_about", full)
    for target in ("out", "new"):
        with pytest.raises(InputError, match=r"no space left.*nothing was written"):
            export("edge", *files, output=tmp_path / target, force=True)
    assert content(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"digits", "out"}


def test_the_same_files_make_the_same_folder(release: Path, tmp_path: Path) -> None:
    pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="needs the [export] extra")
    pytest.importorskip("yaml", reason="needs the [export] extra")
    files = release / "model.onnx", release / "model.patched.onnx"
    for kind in ("triton", "kserve", "edge"):
        made = []
        for number in range(2):
            target = tmp_path / f"{kind}{number}"
            export(
                kind, *files, output=target, storage_uri="s3://b/x", inputs=release / "clean.npz"
            )
            made.append({name: b for name, b in content(target).items() if name.suffix != ".npz"})
        assert made[0] == made[1]


def test_a_copy_is_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"weights" * 1000)
    copy(tmp_path / "a", tmp_path / "below" / "b")
    assert (tmp_path / "below" / "b").read_bytes() == (tmp_path / "a").read_bytes()
    assert (tmp_path / "a").stat().st_nlink == 1


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with new_folder(tmp_path / "out", [], force=False) as folder:
            (folder / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_the_command_line(
    release: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(release)

    def run(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["atpatch-onnx", *line.split()])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed = capsys.readouterr()
        return int(stopped.value.code or 0), printed.out, printed.err

    edge = "export edge model.onnx model.patched.onnx --inputs clean.npz"
    code, out, err = run(f"{edge} --bad bad.npz -o bundle")
    assert (code, err) == (0, "")
    assert "run.py" in out
    assert "README.md for how to start it" in out
    code, out, err = run(f"{edge} --bad clean.npz -o useless --json")
    report = json.loads(out)
    assert (code, report["kind"], report["golden"]["bad"]) == (0, "edge", False)
    assert "the patch changes no answer" in err
    assert len(report["files"]) == len(content(release / "useless"))
    code, out, err = run(f"{edge} -o bundle")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert run(f"{edge} -o bundle --force")[0] == 0
    code, out, err = run("export kserve model.onnx fix.atpatch -o service --name x --json")
    assert code == 2
    assert "--storage-uri" in json.loads(out)["error"]["message"]

"""Outputs: nothing is lost by what is replaced, by a failure or by a kill half way."""

from __future__ import annotations

import errno
import os
import resource
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest

from atpatch_onnx import errors

from bad_input import COLUMNS, PATCH, WRITERS, Cli, sentence, snapshot


@pytest.mark.parametrize(
    ("output", "named"),
    [
        ("text.onnx", ["text.onnx", "exists already", "--force"]),
        ("other.patched.onnx", ["other.patched.onnx", "exists already", "--force"]),
        ("other.atpatch", ["other.atpatch", "exists already", "--force"]),
        ("folder", ["folder", "file name"]),
        ("gone/new.onnx", ["gone/new.onnx", "folder does not exist"]),
        ("text.onnx/new.onnx", ["text.onnx/new.onnx", "folder"]),
        ("pipe --force", ["pipe", "file"]),
        ("n" * 300, ["nnnn", "name"]),
    ],
)
@pytest.mark.parametrize("command", WRITERS)
def test_output_that_is_something_else(
    shell: Cli, command: str, output: str, named: list[str]
) -> None:
    shell.fails(command.format(output), 2, *named)


@pytest.mark.parametrize("command", WRITERS)
def test_force_replaces_what_is_something_else(shell: Cli, command: str) -> None:
    shell.works(command.format("text.onnx") + " --force")


def test_certificate_that_is_something_else(shell: Cli) -> None:
    Path("mine.certificate.json").write_text("mine")
    shell.fails(PATCH + " -o mine.onnx", 2, "mine.certificate.json", "exists already")


@pytest.mark.parametrize(
    "command",
    [
        *(w.format(n) for w in WRITERS[:5] for n in ("model.onnx", "folder/../model.onnx")),
        *(w.format(n) for w in WRITERS[:5] for n in ("hard.onnx", "soft.onnx")),
        PATCH + " -o det.onnx",
        PATCH + " --patch-only det.onnx",
        PATCH + " --plan plan.toml -o plan.toml",
        PATCH + " --plan plan.toml --patch-only plan.toml",
        "patch model.onnx --plan detector.toml -o det.onnx",
        "fit model.onnx --data clean.npz -o clean.npz",
        "apply model.onnx fix.atpatch -o fix.atpatch",
        "revert patched.onnx -o patched.onnx",
        *(w.format("ext.data").replace("model.onnx", "ext.onnx") for w in WRITERS[:4]),
        "revert ext.patched.onnx -o ext.data",
    ],
)
def test_output_that_is_an_input(shell: Cli, command: str) -> None:
    shell.fails(command + " --force", 2, "never overwritten", "another name")


def test_demo_keeps_what_it_did_not_make(shell: Cli) -> None:
    def train_victim(_: int) -> None:
        raise errors.InputError("the demo began")

    for name in ("export", "victims"):
        module = types.SimpleNamespace(train_victim=train_victim, export_onnx=None)
        shell.patch.setitem(sys.modules, f"atpatch_onnx.models.{name}", module)
    (shell.folder / "report.json").write_text('{"mine": 1}')
    shell.fails("demo -o .", 2, "holds other files")


DISASTERS = {
    "full": ("write", errno.ENOSPC, 0, "full"),
    "full at the end": ("fsync", errno.ENOSPC, 0, "full"),
    "quota": ("write", errno.EDQUOT, 0, "full"),
    "broken": ("write", errno.EIO, 0, "input/output error"),
    "full at the name": ("link", errno.ENOSPC, 0, "full"),
    "full at the second name": ("link", errno.ENOSPC, 1, "full"),
    "read-only": ("open", errno.EROFS, 0, "not writable"),
    "denied": ("open", errno.EACCES, 0, "not writable"),
}


def strike(
    shell: Cli, call: str, number: int, good: int = 0, nameless: bool = True, error: type = OSError
) -> None:
    """Make `os.CALL` fail in the folder after `good` calls; without O_TMPFILE unless nameless."""
    real, real_open, calls = getattr(os, call), os.open, [0]

    def fail(*args: object, **named: object) -> object:
        calls[0] += 1
        if calls[0] > good:
            raise error(number, os.strerror(number))
        return real(*args, **named)

    def fail_open(path: str, flags: int, *args: int, **named: int) -> int:
        made = flags & os.O_TMPFILE == os.O_TMPFILE
        if made and not nameless:
            raise OSError(errno.EOPNOTSUPP, "no nameless files here")
        if call == "open" and (made or flags & os.O_CREAT):
            raise error(number, os.strerror(number))
        return real_open(path, flags, *args, **named)

    shell.patch.setattr(os, call, fail)
    shell.patch.setattr(os, "open", fail_open)


TWO_FILES = (WRITERS[2], WRITERS[4])  # a model and its certificate


@pytest.mark.parametrize(
    ("command", "disaster", "nameless"),
    [
        (command, disaster, nameless)
        for command in (*WRITERS, COLUMNS + " -o patched.onnx")
        for disaster, (call, _, good, _) in DISASTERS.items()
        for nameless in (True, False)
        if call != "link" or (nameless and (not good or command in TWO_FILES))
    ],
)
def test_disaster(shell: Cli, command: str, disaster: str, nameless: bool) -> None:
    call, number, good, named = DISASTERS[disaster]
    for extra in ("", " --json"):
        strike(shell, call, number, good, nameless)
        before = snapshot(shell.folder)
        code, _, err = shell.run(*shlex.split(command.format("new.onnx") + extra))
        shell.patch.undo()
        os.chdir(shell.folder)
        assert snapshot(shell.folder) == before
        assert code == 2
        sentence(err, (named, "nothing was written", "onnx"))


def test_interrupted(shell: Cli) -> None:
    before = snapshot(shell.folder)
    strike(shell, "write", 0, error=KeyboardInterrupt)
    code, _, err = shell.run(*shlex.split(PATCH))
    assert (code, err) == (130, "interrupted; nothing was written\n")
    assert snapshot(shell.folder) == before


def test_file_size_limit(shell: Cli) -> None:
    before = snapshot(shell.folder)
    done = subprocess.run(
        [sys.executable, "-Bm", "atpatch_onnx", *shlex.split(PATCH)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (999, 999)),
    )
    assert (done.returncode, done.stdout) == (2, "")
    sentence(done.stderr, ("model.patched.onnx", "full", "nothing was written"))
    assert snapshot(shell.folder) == before


KILLED = """
import os, signal
from atpatch_onnx import cli
real = os.{call}
def die(*args, **named):
    if "{call}" == "write":
        real(args[0], bytes(args[1])[:100])
    os.kill(os.getpid(), signal.SIGKILL)
os.{call} = die
cli.main()
"""


@pytest.mark.parametrize("call", ["write", "fsync", "link"])
@pytest.mark.parametrize("output", ["new.onnx", "patched.onnx"])
def test_killed_half_way(shell: Cli, call: str, output: str) -> None:
    before = snapshot(shell.folder)
    code = KILLED.format(call=call)
    done = subprocess.run([sys.executable, "-c", code, *shlex.split(PATCH), "-o", output])
    assert done.returncode == -9
    assert snapshot(shell.folder) == before

"""Files that were altered: flipped bits, edited records, foreign certificates."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from atpatch_onnx import api, errors

from bad_input import WEIGHT, Cli, sentence


def flip(name: str, wanted: bytes, last: bool = False) -> None:
    """Flip one bit in the middle of the first (or last) place of `wanted` in the file."""
    content = bytearray(Path(name).read_bytes())
    place = content.rfind(wanted) if last else content.find(wanted)
    assert place >= 0
    content[place + len(wanted) // 2] ^= 1
    Path(name).write_bytes(content)


@pytest.mark.parametrize(
    ("wanted", "reverts"),
    [
        (WEIGHT.tobytes(), False),
        (b"Transpose", False),
        (b"base_sha256", False),
        (b'"replacements":[[', False),
        (b"ReduceMax", True),
        (np.float32(0.5).tobytes(), True),
    ],
)
def test_one_flipped_bit(shell: Cli, wanted: bytes, reverts: bool) -> None:
    flip("patched.onnx", wanted)
    shell.fails("verify model.onnx patched.onnx", 1)
    if not reverts:
        shell.fails("revert patched.onnx -o new.onnx", 1, "patched.onnx", "altered")
    else:
        shell.works("revert patched.onnx -o new.onnx")
        assert Path("new.onnx").read_bytes() == Path("model.onnx").read_bytes()


def test_truncated_patched_file(shell: Cli) -> None:
    content = Path("patched.onnx").read_bytes()
    Path("patched.onnx").write_bytes(content[:-100])
    shell.fails("verify model.onnx patched.onnx", 2, "patched.onnx", "truncated")
    shell.fails("revert patched.onnx -o new.onnx", 2, "patched.onnx", "truncated")


def test_name_that_is_no_text(shell: Cli) -> None:
    for name in ("patched.onnx", "fix.atpatch"):
        content = Path(name).read_bytes()
        Path(name).write_bytes(content.replace(b"atpatch/", b"atpatch\xfb", 1))
    shell.fails("verify model.onnx patched.onnx", 1, "patched.onnx")
    shell.fails("diff model.onnx patched.onnx", 1, "patched.onnx")
    shell.fails("apply model.onnx fix.atpatch -o new.onnx", 2, "fix.atpatch", "--patch-only")


def test_truncated_atpatch(shell: Cli) -> None:
    Path("cut.atpatch").write_bytes(Path("fix.atpatch").read_bytes()[:-9])
    shell.fails("apply model.onnx cut.atpatch -o new.onnx", 2, "cut.atpatch", "--patch-only")


def edited(name: str, change: Callable[[dict[str, str]], None]) -> None:
    """Change the metadata of a model file."""
    model = onnx.load(name)
    held = {entry.key: entry.value for entry in model.metadata_props}
    change(held)
    onnx.helper.set_model_props(model, held)
    onnx.save(model, name)


def test_altered_metadata(shell: Cli) -> None:
    gone = '{"sites": [{"site": "s", "flagged": "gone"}], "detectors": []}'
    for about in ("[", "5", '{"sites": [{}]}', gone):
        edited("patched.onnx", lambda held, about=about: held.update({"atpatch.patch": about}))  # type: ignore[misc]
        shell.fails("diff model.onnx patched.onnx --inputs clean.npz", 1, "patched.onnx", "altered")
        shell.fails("revert patched.onnx -o new.onnx", 1, "altered")


@pytest.mark.parametrize("record", ["[]", "null", '{"base_sha256": 1, "end": -5}', "{end}"])
@pytest.mark.usefixtures("shell")
def test_altered_record(record: str) -> None:
    far = json.dumps({"base_sha256": "0", "end": 10**17, "replacements": []})
    edited(
        "patched.onnx", lambda held: held.update({"atpatch.record": record.replace("{end}", far)})
    )
    done = subprocess.run(  # a process of its own: one that never ends must not stop the tests
        [sys.executable, "-m", "atpatch_onnx", "revert", "patched.onnx", "-o", "new.onnx"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    sentence(done.stderr, ("patched.onnx", "altered"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c["base"].update(sha256="0" * 64), "another base file"),
        (lambda c: c["result"].update(sha256="0" * 64), "another result file"),
        (lambda c: c["difference"]["inserted_nodes"].pop(), "other differences"),
        (lambda c: c["initializers"][0].update(sha256="0" * 64), "'wq'"),
        (lambda c: c["initializers"][0].pop("sha256"), "'wq'"),
        (lambda c: c["initializers"].pop(), "number of tensors"),
        (lambda c: c.update(initializers=None), "tensors"),
        (lambda c: c.update(base=None), "base"),
    ],
)
@pytest.mark.parametrize("name", ["model", "ext"])
def test_edited_certificate(
    shell: Cli, name: str, change: Callable[[dict[str, object]], None], named: str
) -> None:
    patched = "patched" if name == "model" else "ext.patched"
    path = Path(f"{patched}.certificate.json")
    claimed = json.loads(path.read_text())
    change(claimed)
    path.write_text(json.dumps(claimed))
    shell.fails(f"verify {name}.onnx {patched}.onnx --digests", 1, named)


@pytest.mark.parametrize(
    ("certificate", "code"),
    [
        ("other.patched.certificate.json", 1),
        ("gone.json", 2),
        ("folder", 2),
        ("text.onnx", 2),
        ("model.onnx", 2),
        ("list.json", 2),
        ("odd.json", 1),
    ],
)
def test_certificate_of_another_file(shell: Cli, certificate: str, code: int) -> None:
    Path("list.json").write_text("[]")
    Path("odd.json").write_text('{"base": "x", "result": 3}')
    shell.fails(f"verify model.onnx patched.onnx --certificate {certificate}", code, "certificate")


@pytest.mark.parametrize(
    "edits",
    ["{}", "[1]", '[["add_node"]]', '[["add_node", "x", "y"]]', '[["remove_node", 99]]', "9x"],
)
def test_altered_atpatch(shell: Cli, edits: str) -> None:
    nodes = json.dumps([["add_node", 0, "n"]] * 99)
    edits = nodes if edits == "9x" else edits
    edited("fix.atpatch", lambda held: held.update({"atpatch.patch.edits": edits}))
    shell.fails("apply model.onnx fix.atpatch -o new.onnx", 2, "fix.atpatch", "--patch-only")


@pytest.mark.usefixtures("shell")
def test_any_flipped_byte_of_any_file_is_an_error_that_users_understand() -> None:
    commands: dict[str, Callable[[], object]] = {
        "model.onnx": lambda: api.inspect("model.onnx"),
        "det.onnx": lambda: api.patch("model.onnx", "det.onnx", output="n.onnx", force=True),
        "fix.atpatch": lambda: api.apply("model.onnx", "fix.atpatch", output="n.onnx", force=True),
        "plan.toml": lambda: api.patch("model.onnx", "det.onnx", plan="plan.toml", output="n.onnx"),
        "patched.onnx": lambda: api.verify("model.onnx", "patched.onnx"),
    }
    rng = np.random.default_rng(0)
    for name, command in commands.items():
        content = Path(name).read_bytes()
        for place in rng.integers(0, len(content), 40):
            spoilt = bytearray(content)
            spoilt[place] ^= rng.integers(1, 256)
            Path(name).write_bytes(spoilt)
            try:
                command()
            except errors.AtpatchError as error:
                sentence(f"error: {error}\n")
        Path(name).write_bytes(content)

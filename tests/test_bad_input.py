"""Bad input: one clear sentence, the right exit code, nothing written, nothing lost.

Every case is a command line that is run in a copy of one folder. `Cli.fails` says, in one place,
what failing well means.
"""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx.parser
import pytest

from atpatch_onnx import api, cli, errors

WEIGHT = np.linspace(-1, 1, 16, dtype=np.float32)
ROW = ", ".join(map(str, WEIGHT))
HOST = f"""
<ir_version: 8, opset_import: ["" : 17]>
host (float[N,2,5,4] x) => (float[N,2,5,4] y)
<float[4,4] wq = {{{ROW}}}, float[4,4] wk = {{{ROW}}}, float[4,4] wv = {{{ROW}}}>
{{
  q = MatMul(x, wq)
  k = MatMul(x, wk)
  v = MatMul(x, wv)
  kt = Transpose<perm=[0, 1, 3, 2]>(k)
  scores = MatMul(q, kt)
  p = Softmax<axis=-1>(scores)
  y = MatMul(p, v)
}}
"""
DETECTOR = """
<ir_version: 8, opset_import: ["" : 17],
 metadata_props: ["atpatch.abi": "1", "atpatch.threshold": "0.5"]>
detector (float[B,H,Q,K] attention) => (float[B,H,1,K] anomaly)
{ anomaly = ReduceMax<axes=[2], keepdims=1>(attention) }
"""
MASKED = (  # a second input, a further value of another type, another site name
    HOST.replace("[N,2,5,4] x)", "[N,2,5,4] x, float[N,1,5,5] bias, int64[N] ids)")
    .replace("scores = MatMul(q, kt)", "bare = MatMul(q, kt)\n  scores = Add(bare, bias)")
    .replace("p = Softmax", "i = Identity(ids)\n  p = Softmax")
)
PLAIN = '<ir_version: 8, opset_import: ["" : 17]>\nn (float[N,4] x) => (float[N,4] y)'
FUSED = PLAIN.replace('["" : 17]', '["" : 17, "com.microsoft" : 1]').replace("N,4", "N,5,4")
MODELS = {
    "model": HOST,
    "masked": MASKED,
    "other": HOST.replace("host", "other"),
    "none": PLAIN + "{ y = Softmax<axis=-1>(x) }",
    "fused": FUSED + "{ y = com.microsoft.MultiHeadAttention<num_heads=2>(x, x, x) }",
    "quantised": FUSED + "{ y = com.microsoft.QAttention<num_heads=2>(x, x, x) }",
    "standard": PLAIN.replace("17", "23").replace("N,4", "N,2,5,4") + "{ y = Attention(x, x, x) }",
    "broken": HOST.replace("x, wq", "nowhere, wq"),
}


def changed(*changes: tuple[str, str]) -> str:
    """The detector's text with replacements, each of which must apply."""
    text = DETECTOR
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    return text


INPUT, OUTPUT, REDUCE = "float[B,H,Q,K] attention", "float[B,H,1,K] anomaly", "ReduceMax<axes=[2], "
CALL = "anomaly = ReduceMax<axes=[2], keepdims=1>(attention)"
CUSTOM = ('["" : 17]', '["" : 17, "my.ops" : 1]')
DETECTORS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    # name: text, exit code, what the message must name
    "input-name": (changed(("attention", "probs")), 2, ("signature", "attention", "found probs")),
    "output-name": (changed(("anomaly", "score")), 2, ("signature", "anomaly", "found", "score")),
    "extra-output": (
        changed(
            (OUTPUT, OUTPUT + ", float[B,H,Q,K] extra"), (CALL, CALL + "\nextra = Neg(anomaly)")
        ),
        2,
        ("signature", "extra"),
    ),
    "rank-3": (changed((INPUT, "float[B,Q,K] attention")), 2, ("signature", "[B, Q, K]")),
    "rank-out": (changed((OUTPUT, "float[B,K] anomaly")), 2, ("signature", "[B, K]")),
    "rows": (changed((OUTPUT, "float[B,H,5,K] anomaly")), 2, ("signature", "[B, H, 5, K]")),
    "float16": (
        changed((INPUT, INPUT.replace("float", "float16"))),
        2,
        ("signature", "attention: float16", "expected attention: float32"),
    ),
    "double": (changed((OUTPUT, "double[B,H,1,K] anomaly")), 2, ("signature", "double")),
    "bool": (changed((OUTPUT, "bool[B,H,1,K] anomaly")), 2, ("signature", "anomaly: bool")),
    "layer": (changed((INPUT, INPUT + ", float layer")), 2, ("signature", "layer: float32")),
    "layer-rank": (changed((INPUT, INPUT + ", int64[1] layer")), 2, ("signature", "layer: int64")),
    "opset": (
        changed(("17", "20"), (CALL, "g = Gelu(attention)\n" + CALL)),
        3,
        ("opset 20", "opset 17", "Gelu"),
    ),
    "custom": (changed(CUSTOM, (CALL, "a = my.ops.Odd(attention)\n" + CALL)), 3, ("my.ops",)),
    "custom-in-branch": (
        changed(
            CUSTOM,
            (
                CALL,
                "yes = Constant<value = bool {1}>()\n" + CALL.replace("anomaly =", "m =") + "\n"
                "anomaly = If(yes) <then_branch = t () => (float[B,H,1,K] a) {a = my.ops.Odd(m)}, "
                "else_branch = e () => (float[B,H,1,K] b) {b = Identity(m)}>",
            ),
        ),
        3,
        ("my.ops",),
    ),
    "no-abi": (changed(('"atpatch.abi": "1", ', "")), 2, ("atpatch.abi", "missing", "expected 1")),
    "abi-2": (changed(('"atpatch.abi": "1"', '"atpatch.abi": "2"')), 2, ("atpatch.abi", "2")),
    "no-threshold": (
        changed((', "atpatch.threshold": "0.5"', "")),
        2,
        ("atpatch.threshold", "--threshold"),
    ),
    "threshold-text": (changed(("0.5", "high")), 2, ("atpatch.threshold", "number")),
    "threshold-nan": (changed(("0.5", "nan")), 2, ("threshold", "nan")),
    "threshold-percent": (changed(("0.5", "50")), 2, ("threshold", "50")),
    "scope": (
        changed(('"0.5"', '"0.5", "atpatch.scope": "model"')),
        3,
        ("scope 'model'", "zscore"),
    ),
    "sites-text": (changed(('"0.5"', '"0.5", "atpatch.sites": "["')), 2, ("atpatch.sites", "JSON")),
    "sites-number": (changed(('"0.5"', '"0.5", "atpatch.sites": "5"')), 2, ("atpatch.sites",)),
    "sites-other": (
        changed(('"0.5"', '"0.5", "atpatch.sites": "[\\"elsewhere\\"]"')),
        3,
        ("not fitted",),
    ),
    "unbound": (
        changed(
            (INPUT, INPUT + ", float[N,2,5,4] pixels"),
            ("(attention) }", "(attention)\nz = Neg(pixels) }"),
        ),
        2,
        ("pixels", "--bind pixels="),
    ),
    "wrong-size": (
        changed(
            (OUTPUT + ")", OUTPUT + ")\n<float[7] table = {1,1,1,1,1,1,1}>"),
            (CALL, CALL.replace("anomaly =", "m =") + "\nanomaly = Mul(m, table)"),
        ),
        2,
        ("fails on site", "[2, 2, 5, 5]", "fit it for this model"),
    ),
    "wrong-answer": (
        changed((REDUCE, "ReduceMax<axes=[3], ")),
        2,
        ("answers anomaly of shape", "expected [2, 1 or 2, 1, 5]"),
    ),
    "dangling": (changed(("1>(attention)", "1>(nothing)")), 2, ("nothing",)),
}

SHAPE = (40, 2, 5, 4)
GOOD = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
BIAS, IDS = np.zeros((40, 1, 5, 5), np.float32), np.zeros(40, np.int64)
DATA: dict[str, tuple[str, dict[str, np.ndarray], tuple[str, ...]]] = {  # type: ignore[type-arg]
    # name: model, arrays, what the message must name
    "rank": ("model", {"x": GOOD[0]}, ("'x'", "[2, 5, 4]", "['N', 2, 5, 4]")),
    "size": ("model", {"x": GOOD[:, :, :4]}, ("'x'", "[40, 2, 4, 4]", "['N', 2, 5, 4]")),
    "dtype": ("model", {"x": GOOD.astype(np.int64)}, ("'x'", "int64", "expected float32")),
    "text-array": ("model", {"x": GOOD.astype(str)}, ("'x'", "expected float32")),
    "complex": ("model", {"x": GOOD.astype(complex)}, ("'x'", "complex128", "float32")),
    "fraction": ("masked", {"x": GOOD, "bias": BIAS, "ids": IDS + 0.5}, ("'ids'", "float64")),
    "objects": ("model", {"x": np.array([{}, 1], object)}, ("objects.npz", "numpy.savez")),
    "nan": ("model", {"x": GOOD * np.float32(np.nan)}, ("'x'", "nan")),
    "zero": ("model", {"x": GOOD[:0]}, ("no samples",)),
    "few": ("model", {"x": GOOD[:19]}, ("19 samples", "20")),
    "keys": ("model", {"a": GOOD, "b": GOOD}, ("input x", "found a, b")),
    "no-arrays": ("model", {}, ("input x", "x")),
    "missing": ("masked", {"x": GOOD}, ("inputs bias, ids", "found x")),
    "counts": ("masked", {"x": GOOD, "bias": BIAS[:9], "ids": IDS}, ("x 40", "bias 9")),
}
PLANS: dict[str, tuple[Callable[[str], str], int, tuple[str, ...]]] = {
    # name: what is wrong with the good plan, exit code, what the message must name
    "toml": (lambda t: t + "[[", 2, ("not valid TOML",)),
    "binary": (lambda t: t + "# \udcff", 2, ("not valid TOML",)),
    "model": (lambda t: re.sub('sha256 = ".', 'sha256 = "z', t), 3, ("inspect --plan",)),
    "digest": (lambda t: re.sub("sha256 =", "sha =", t), 3, ("inspect --plan",)),
    "key": (lambda t: t + "colunms = [1]\n", 2, ("'colunms'", "columns")),
    "site": (lambda t: re.sub('name = ".*"', 'name = "elsewhere"', t), 2, ("'elsewhere'",)),
    "nameless": (lambda t: re.sub("name = .*", "", t), 2, ("[[site]]", "name")),
    "table": (lambda t: t.replace("[[site]]", "[site]"), 2, ("[[site]]",)),
    "twice": (lambda t: t + t[t.index("[[site]]") :], 2, ("twice",)),
    "type": (lambda t: t + 'threshold = "high"\n', 2, ("threshold", "type")),
    "bool": (lambda t: t + "threshold = true\n", 2, ("threshold", "type")),
    "text-column": (lambda t: t + 'columns = ["a"]\n', 2, ("columns", "type")),
    "half-column": (lambda t: t + "columns = [1.5]\n", 2, ("columns", "type")),
    "column": (lambda t: t + "columns = [99]\n", 2, ("99", "columns 0 to 4")),
    "nan": (lambda t: t + "threshold = nan\n", 2, ("threshold", "nan")),
    "way": (lambda t: t + 'redistribute = "zero"\n', 2, ("zero", "benign, uniform or prune")),
    "detector": (lambda t: t + 'detector = "gone.onnx"\n', 2, ("gone.onnx", "no such file")),
    "off": (lambda t: t.replace("patch = true", "patch = false"), 3, ("--sites", "plan")),
}
EXTERNAL: dict[str, tuple[str, int, tuple[str, ...]]] = {
    # name: location of the weights, exit code, what the message must name
    "gone": ("gone.data", 2, ("gone.data", "missing")),
    "short": ("short.data", 2, ("short.data", "byte 4", "truncated")),
    "parent": ("../ext.data", 3, ("'../ext.data'", "beside the model")),
    "absolute": ("/etc/hostname", 3, ("'/etc/hostname'", "beside the model")),
    "link": ("leaves.data", 3, ("leaves.data", "link", "cp -L")),
    "folder": ("folder", 2, ("folder",)),
    "nameless": ("", 2, ("location",)),
}


def build(folder: Path) -> None:
    """Fill `folder` with good and bad files of every kind."""
    for name, text in MODELS.items():
        onnx.save(onnx.parser.parse_model(text), folder / f"{name}.onnx")
    onnx.save(onnx.parser.parse_model(DETECTOR), folder / "det.onnx")
    for name, (text, *_) in DETECTORS.items():
        onnx.save(onnx.parser.parse_model(text), folder / f"det-{name}.onnx")
    os.chdir(folder)
    np.savez("clean.npz", x=GOOD)
    for name, (_, arrays, _) in DATA.items():
        np.savez(f"{name}.npz", allow_pickle=True, **arrays)
    model = Path("model.onnx").read_bytes()
    host = onnx.load("model.onnx")
    for tensor in host.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(host, "ext.onnx", save_as_external_data=True, location="ext.data", size_threshold=0)
    for name, (location, *_) in EXTERNAL.items():
        host = onnx.load("ext.onnx", load_external_data=False)
        for tensor in host.graph.initializer:
            tensor.external_data[0].value = location
        Path(f"ext-{name}.onnx").write_bytes(host.SerializeToString())
    Path("short.data").write_bytes(b"1234")
    Path("folder").mkdir()
    Path("leaves.data").symlink_to("/etc/hostname")
    Path("soft.onnx").symlink_to("model.onnx")
    api.inspect("model.onnx", "plan.toml")
    api.patch("model.onnx", "det.onnx", output="patched.onnx")
    api.patch("model.onnx", "det.onnx", patch_only="fix.atpatch")
    api.patch("other.onnx", "det.onnx", output="other.patched.onnx")
    api.patch("other.onnx", "det.onnx", patch_only="other.atpatch")
    api.patch("ext.onnx", "det.onnx", output="ext.patched.onnx", digests=True)
    plan = Path("plan.toml").read_text()
    Path("detector.toml").write_text(plan + 'detector = "det.onnx"\n')
    for name, (spoil, *_) in PLANS.items():
        Path(f"plan-{name}.toml").write_text(spoil(plan), errors="surrogateescape")
    for name, content in {
        "empty.onnx": b"",
        "text.onnx": b"hello, I am a text file\n",
        "pointer.onnx": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        "npz.onnx": Path("clean.npz").read_bytes(),
        "cut.onnx": model[: len(model) // 2],
        "cut-end.onnx": model[:-1],
        "cut.npz": Path("clean.npz").read_bytes()[:900],
        "cut.atpatch": Path("fix.atpatch").read_bytes()[:-9],
        "foreign.onnx": b"something dear to somebody\n",
        "list.json": b"[]",
        "odd.json": b'{"base": "x", "result": 3}',
        "free.certificate.json": b"mine\n",
    }.items():
        Path(name).write_bytes(content)


@dataclass
class Cli:
    """The command line, in a folder of its own that is the working directory."""

    folder: Path
    capsys: pytest.CaptureFixture[str]
    patch: pytest.MonkeyPatch

    def run(self, *words: str) -> tuple[int, str, str]:
        """Exit code, standard output and standard error of `atpatch-onnx WORDS`."""
        self.patch.setattr(sys, "argv", ["atpatch-onnx", *words])
        self.capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        return code, *self.capsys.readouterr()

    def works(self, command: str) -> str:
        """Run a command that succeeds; its output."""
        code, out, err = self.run(*shlex.split(command))
        assert (code, err) == (0, "")
        return out

    def fails(self, command: str, code: int, *named: str) -> None:
        """Run a command that fails well: see the module's docstring."""
        before = snapshot(self.folder)
        for extra in ((), ("--json",)):
            found, out, err = self.run(*shlex.split(command), *extra)
            assert found == code, err
            message = sentence(err, named)
            assert snapshot(self.folder) == before
            if extra:
                document = json.loads(out)
                failed = document["passed"] is False if "passed" in document else None
                assert failed or document["error"]["message"] == message


def sentence(err: str, named: tuple[str, ...] = ()) -> str:
    """The error message, which must be one plain sentence that names the offending things."""
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    message = err.removeprefix("error: ").strip()
    assert not re.search(r"Traceback|Errno|[.!?] [A-Z]|<class|Error\(", message), message
    for word in named:
        assert word.lower() in message.lower(), message
    return message


def snapshot(folder: Path) -> dict[str, object]:
    """Every file by name: what it is, when it was written and its bytes."""
    return {
        str(path.relative_to(folder)): (
            path.lstat().st_mtime_ns if not path.is_dir() else 0,
            path.readlink() if path.is_symlink() else path.is_file() and path.read_bytes(),
        )
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder, home = tmp_path_factory.mktemp("made"), Path.cwd()
    try:
        build(folder)
        yield folder
    finally:
        os.chdir(home)


@pytest.fixture
def shell(
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Cli:
    folder = tmp_path / "here"
    shutil.copytree(made, folder, symlinks=True)
    os.link(folder / "model.onnx", folder / "hard.onnx")
    os.mkfifo(folder / "pipe")
    monkeypatch.chdir(folder)
    return Cli(folder, capsys, monkeypatch)


PATCH, FIT = "patch model.onnx --detector det.onnx", "fit model.onnx --data clean.npz -o new.onnx"
COLUMNS = "patch model.onnx --columns 1"
NOT_ONNX = {
    "gone.onnx": "no such file",
    "folder": "directory",
    "empty.onnx": "is not an ONNX model",
    "text.onnx": "is not an ONNX model",
    "pointer.onnx": "is not an ONNX model",
    "npz.onnx": "is not an ONNX model",
    "cut.onnx": "is truncated",
    "cut-end.onnx": "is truncated",
}


@pytest.mark.parametrize("name", NOT_ONNX)
@pytest.mark.parametrize(
    "command",
    [
        "inspect {}",
        "fit {} --data clean.npz -o new.onnx",
        "patch {} --columns 1",
        "patch model.onnx --detector {}",
        "apply {} fix.atpatch -o new.onnx",
        "revert {} -o new.onnx",
        "verify {} patched.onnx",
        "verify model.onnx {}",
        "diff model.onnx {}",
        "bench {} patched.onnx",
        "bench model.onnx {}",
    ],
)
def test_no_onnx_file(shell: Cli, command: str, name: str) -> None:
    shell.fails(command.format(name), 2, name, NOT_ONNX[name])


@pytest.mark.parametrize("name", DETECTORS)
def test_detector(shell: Cli, name: str) -> None:
    _, code, named = DETECTORS[name]
    shell.fails(f"patch model.onnx --detector det-{name}.onnx", code, f"det-{name}.onnx", *named)


def test_detector_bound_to_what_it_needs(shell: Cli) -> None:
    command = "patch model.onnx --detector det-unbound.onnx --bind "
    shell.fails(command + "pixels=nowhere", 2, "pixels=nowhere", "no value")
    shell.fails(command + "pixels=y", 2, "pixels=y", "behind the site")
    shell.fails(command + "pixels", 2, "NAME=VALUE")
    shell.fails(command + "pixels=x --bind typo=x", 2, "typo")
    masked = command.replace("model", "masked") + "pixels="
    shell.fails(masked + "ids", 2, "pixels=ids", "int64")
    shell.works(command + "pixels=x -o new.onnx")
    onnx.checker.check_model("new.onnx", full_check=True)


@pytest.mark.parametrize("name", DATA)
def test_data(shell: Cli, name: str) -> None:
    model, _, named = DATA[name]
    shell.fails(f"fit {model}.onnx --data {name}.npz -o new.onnx", 2, *named)
    if name != "few":
        shell.works(f"patch {model}.onnx --columns 1 -o made.onnx --strategy select")
        shell.fails(f"diff {model}.onnx made.onnx --inputs {name}.npz", 2, *named)


@pytest.mark.parametrize("name", ["gone.npz", "folder", "model.onnx", "empty.onnx", "cut.npz"])
@pytest.mark.parametrize(
    "command",
    [
        "fit model.onnx -o new.onnx --data {}",
        "diff model.onnx patched.onnx --inputs {}",
        "bench model.onnx patched.onnx --inputs {}",
    ],
)
def test_no_data_file(shell: Cli, command: str, name: str) -> None:
    shell.fails(command.format(name), 2, name)


def test_data_in_damaged_or_foreign_archives(shell: Cli) -> None:
    import zipfile

    np.savez_compressed("flipped.npz", x=GOOD)
    content = bytearray(Path("flipped.npz").read_bytes())
    content[len(content) // 2] ^= 0xFF
    Path("flipped.npz").write_bytes(content)
    with zipfile.ZipFile("torch.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
    for name in ("flipped.npz", "torch.pt"):
        shell.fails(f"fit model.onnx --data {name} -o new.onnx", 2, name, "numpy.savez")


@pytest.mark.parametrize("name", PLANS)
def test_plan(shell: Cli, name: str) -> None:
    _, code, named = PLANS[name]
    shell.fails(f"{PATCH} --plan plan-{name}.toml", code, *named)


@pytest.mark.parametrize("name", EXTERNAL)
def test_external_data(shell: Cli, name: str) -> None:
    _, code, named = EXTERNAL[name]
    for command in (
        "patch ext-{0}.onnx --columns 1 --digests",
        "apply ext-{0}.onnx fix.atpatch -o a",
    ):
        shell.fails(command.format(name), code, f"ext-{name}.onnx", *named)
    shell.fails(f"fit ext-{name}.onnx --data clean.npz -o new.onnx", code, *named)
    shell.fails(f"patch model.onnx --detector ext-{name}.onnx", code, *named)


def test_external_data_is_referenced_where_it_is(shell: Cli) -> None:
    named = ("another folder", "--patch-only")
    shell.fails("patch ext.onnx --columns 1 -o folder/new.onnx", 3, *named)
    shell.fails("revert ext.patched.onnx -o folder/new.onnx", 3, *named)
    Path("ext.data").write_bytes(Path("ext.data").read_bytes()[:-1] + b"!")
    shell.fails("verify ext.onnx ext.patched.onnx --digests", 1, "'wv'")
    Path("ext.data").unlink()
    shell.fails("verify ext.onnx ext.patched.onnx --digests", 2, "ext.data", "missing")


@pytest.mark.parametrize(
    ("command", "code", "named"),
    [
        ("patch none.onnx --columns 1", 3, ["none.onnx", "no attention", "inspect"]),
        ("patch none.onnx --detector det.onnx", 3, ["none.onnx", "no attention"]),
        ("fit none.onnx --data clean.npz -o new.onnx", 3, ["none.onnx", "no attention"]),
        ("patch fused.onnx --columns 1", 3, ["com.microsoft.MultiHeadAttention", "export"]),
        ("patch quantised.onnx --columns 1", 3, ["com.microsoft.QAttention", "export"]),
        ("patch standard.onnx --columns 1", 3, ["ONNX Attention", "export", "opset below 23"]),
        ("fit fused.onnx --data clean.npz -o new.onnx", 3, ["fused.onnx", "refused"]),
        ("patch patched.onnx --columns 1", 3, ["patched already", "revert"]),
        ("fit patched.onnx --data clean.npz -o new.onnx", 3, ["patched.onnx"]),
        ("fit broken.onnx --data clean.npz -o new.onnx", 3, ["broken.onnx", "nowhere"]),
        ("patch det.onnx --detector model.onnx", 3, ["det.onnx", "no attention"]),
        ("patch model.onnx", 2, ["--detector", "--columns"]),
        (COLUMNS + " --detector det.onnx", 2, ["--detector", "--columns", "one of"]),
        ("patch model.onnx --columns 5", 2, ["--columns 5", "0 to 4"]),
        ("patch model.onnx --columns -6", 2, ["--columns -6", "0 to 4"]),
        ("patch model.onnx --columns one", 2, ["--columns one", "3,4,-1"]),
        ("patch model.onnx --columns 1.5", 2, ["--columns 1.5"]),
        (COLUMNS + " --sites decoder.*", 2, ["'decoder.*'", "the model has 1"]),
        (COLUMNS + " --sites 1", 2, ["'1'", "the model has 1"]),
        (COLUMNS + " --redistribute zero", 2, ["zero", "benign, uniform or prune"]),
        (COLUMNS + " --redistribute benign", 2, ["benign", "prune or uniform"]),
        (COLUMNS + " --strategy fast", 2, ["fast", "guard or select"]),
        (COLUMNS + " --ep tpu", 2, ["tpu", "cuda or cpu"]),
        (COLUMNS + " --threshold 0.5", 2, ["--threshold", "--detector"]),
        (COLUMNS + " --bind a=x", 2, ["--bind", "a"]),
        (PATCH + " --threshold nan", 2, ["--threshold nan"]),
        (PATCH + " --threshold 50", 2, ["--threshold 50", "0"]),
        (PATCH + " --plan gone.toml", 2, ["gone.toml", "no such file"]),
        (PATCH + " --plan folder", 2, ["folder", "directory"]),
        (FIT + " --fpr 0", 2, ["--fpr 0", "between 0 and 1"]),
        (FIT + " --fpr 2", 2, ["--fpr 2", "between 0 and 1"]),
        (FIT + " --fpr nan", 2, ["--fpr nan"]),
        (FIT + " --kind mlp", 2, ["--kind mlp", "zscore"]),
        (FIT + " --sites decoder", 2, ["'decoder'"]),
        (FIT + " --batch 0", 2, ["--batch", "at least 1"]),
        (FIT + " --seed -1", 2, ["--seed"]),
        (FIT + " --ep tpu", 2, ["tpu", "cuda or cpu"]),
        ("apply model.onnx other.atpatch -o new.onnx", 3, ["SHA-256", "another"]),
        ("apply patched.onnx fix.atpatch -o new.onnx", 3, ["SHA-256", "another"]),
        ("apply model.onnx text.onnx -o new.onnx", 2, ["text.onnx", "--patch-only"]),
        ("apply model.onnx model.onnx -o new.onnx", 2, ["model.onnx", "--patch-only"]),
        ("apply model.onnx cut.atpatch -o new.onnx", 2, ["cut.atpatch", "--patch-only"]),
        ("apply model.onnx gone.atpatch -o new.onnx", 2, ["gone.atpatch", "no such file"]),
        ("apply model.onnx folder -o new.onnx", 2, ["folder", "directory"]),
        ("revert model.onnx -o new.onnx", 2, ["model.onnx", "no patch", "patched file"]),
        ("revert fix.atpatch -o new.onnx", 2, ["fix.atpatch", "no patch"]),
        ("verify model.onnx other.patched.onnx", 1, ["other.patched.onnx", "model.onnx"]),
        ("verify patched.onnx model.onnx", 1, ["patched.onnx", "model.onnx"]),
        ("verify model.onnx model.onnx", 1, ["model.onnx", "no patch"]),
        ("diff model.onnx none.onnx", 1, ["none.onnx", "is not that model"]),
        ("diff model.onnx other.patched.onnx", 1, ["other.patched.onnx"]),
        ("diff model.onnx patched.onnx --inputs clean.npz --batch 0", 2, ["--batch", "at least 1"]),
        ("diff model.onnx patched.onnx --inputs clean.npz --batch -1", 2, ["--batch"]),
        ("diff model.onnx patched.onnx --inputs clean.npz --ep tpu", 2, ["tpu"]),
        ("bench model.onnx patched.onnx --runs 0", 2, ["--runs"]),
        ("bench model.onnx patched.onnx --warmup -40", 2, ["--warmup"]),
        ("bench model.onnx patched.onnx --batch 0", 2, ["--batch"]),
        ("bench model.onnx patched.onnx --length -5", 2, ["--length"]),
        ("bench model.onnx patched.onnx --threads -1", 2, ["--threads"]),
        ("bench model.onnx none.onnx", 2, ["none.onnx"]),
        ("bench none.onnx model.onnx", 2, ["model.onnx"]),
        ("demo -o foreign.onnx", 2, ["foreign.onnx", "is a file"]),
        ("demo -o .", 2, ["holds other files"]),
        ("inspect", 2, ["MODEL"]),
        ("inspct model.onnx", 2, ["inspct"]),
        ("inspect model.onnx --pln x", 2, ["--pln"]),
        ("apply model.onnx fix.atpatch", 2, ["--output"]),
        (PATCH + " --threshold high", 2, ["--threshold", "high"]),
    ],
)
def test_refused(shell: Cli, command: str, code: int, named: list[str]) -> None:
    shell.fails(command, code, *named)


def test_no_attention_and_fused_attention_can_be_inspected(shell: Cli) -> None:
    found = json.loads(shell.works("inspect none.onnx --json"))
    assert found["sites"] == []
    assert [other["outcome"] for other in found["other"]] == ["not attention"]
    found = json.loads(shell.works("inspect fused.onnx --json"))
    assert found["sites"] == []
    assert "export" in found["other"][0]["fix"]


def test_names_with_markup_are_printed_as_they_are(shell: Cli) -> None:
    for name in ("[red]a.onnx", ":warning:.onnx", "[/].onnx", "back\\slash.onnx"):
        shell.fails(f"inspect '{name}'", 2, name)


def test_runtime_that_lacks_what_is_wanted(shell: Cli) -> None:
    import onnxruntime

    shell.patch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    for command in (PATCH, FIT, "bench model.onnx patched.onnx"):
        shell.fails(f"{command} --ep cuda", 2, "--ep cuda", "CPUExecutionProvider", "[gpu]")
    shell.patch.setitem(sys.modules, "onnxruntime", None)
    for command in (PATCH, FIT, "bench model.onnx patched.onnx"):
        shell.fails(command, 2, "ONNX Runtime is not installed", "pip install")
    shell.works("verify model.onnx patched.onnx")


# Nothing lost: what an output may replace.

WRITERS = (
    "inspect model.onnx --plan {}",
    "fit model.onnx --data clean.npz -o {}",
    "patch model.onnx --detector det.onnx -o {}",
    "patch model.onnx --detector det.onnx --patch-only {}",
    "apply model.onnx fix.atpatch -o {}",
    "revert patched.onnx -o {}",
)


@pytest.mark.parametrize("command", WRITERS)
def test_output_that_is_something_else(shell: Cli, command: str) -> None:
    shell.fails(command.format("foreign.onnx"), 2, "foreign.onnx", "exists already", "--force")
    shell.fails(command.format("other.patched.onnx"), 2, "other.patched.onnx", "--force")
    shell.fails(command.format("other.atpatch"), 2, "other.atpatch", "--force")
    shell.fails(command.format("folder"), 2, "folder", "file name")
    shell.fails(command.format("gone/new.onnx"), 2, "gone/new.onnx", "does not exist")
    shell.fails(command.format("pipe") + " --force", 2, "pipe")
    shell.fails(command.format("n" * 300), 2, "nnn", "name")
    shell.works(command.format("foreign.onnx") + " --force")


def test_certificate_that_is_something_else(shell: Cli) -> None:
    shell.fails(PATCH + " -o free.onnx", 2, "free.certificate.json", "exists already")


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


# Files that were altered.


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


def edited(name: str, change: Callable[[dict[str, str]], None]) -> None:
    """Change the metadata of a model file."""
    model = onnx.load(name)
    held = {entry.key: entry.value for entry in model.metadata_props}
    change(held)
    onnx.helper.set_model_props(model, held)
    onnx.save(model, name)


def test_altered_metadata(shell: Cli) -> None:
    for sites in ("[", "5", "[{}]", '[{"site": "s", "flagged": "gone"}]'):
        edited("patched.onnx", lambda held, sites=sites: held.update({"atpatch.sites": sites}))  # type: ignore[misc]
        shell.fails("diff model.onnx patched.onnx --inputs clean.npz", 1, "patched.onnx", "altered")
        shell.fails("revert patched.onnx -o new.onnx", 1, "altered")


@pytest.mark.parametrize("record", ["[]", "null", '{"base_sha256": 1, "end": -5}', "{end}"])
def test_altered_record(shell: Cli, record: str) -> None:
    far = json.dumps({"base_sha256": "0", "end": 10**17, "replacements": []})
    edited(
        "patched.onnx", lambda held: held.update({"atpatch.record": record.replace("{end}", far)})
    )
    done = subprocess.run(  # a process of its own: one that never ends must not stop the tests
        [sys.executable, "-m", "atpatch_onnx", "revert", "patched.onnx", "-o", "new.onnx"],
        capture_output=True,
        text=True,
        timeout=10,
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
    shell.fails(f"verify {name}.onnx {patched}.onnx", 1, named)


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


def test_any_flipped_byte_of_any_file_is_an_error_that_users_understand(shell: Cli) -> None:
    commands: dict[str, Callable[[], object]] = {
        "model.onnx": lambda: api.inspect("model.onnx"),
        "det.onnx": lambda: api.patch("other.onnx", "det.onnx", output="n", force=True),
        "fix.atpatch": lambda: api.apply("other.onnx", "fix.atpatch", output="n", force=True),
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


# Disasters while writing.

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


@pytest.mark.parametrize("nameless", [True, False], ids=["O_TMPFILE", "mkstemp"])
@pytest.mark.parametrize("disaster", DISASTERS)
@pytest.mark.parametrize("command", [*WRITERS, COLUMNS + " -o patched.onnx"])
def test_disaster(shell: Cli, command: str, disaster: str, nameless: bool) -> None:
    call, number, good, named = DISASTERS[disaster]
    if call == "link" and (not nameless or (good and "-o {}" not in command[5:])):
        pytest.skip("no such call")
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

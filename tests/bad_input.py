"""A folder of good and bad files, and the command line run in it, for tests of failures."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx.parser
import pytest

from atpatch_onnx import api, cli

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
    "fused": FUSED + "{ y = com.microsoft.SparseAttention<num_heads=2>(x, x, x) }",
    "quantised": FUSED + "{ y = com.microsoft.QOrderedAttention<num_heads=2>(x, x, x) }",
    "standard": PLAIN.replace("17", "23").replace("N,4", "N,2,5,4")
    + "{ y = Attention<is_causal=7>(x, x, x) }",
    "old": FUSED.replace('"" : 17', '"" : 9')
    + "{ y = com.microsoft.MultiHeadAttention<num_heads=2>(x, x, x) }",
    "shapeless": '<ir_version: 10, opset_import: ["" : 23]> n (float[] a) => (float[] y)'
    + "{ x = Reshape(a, a) y = Attention(x, x, x) }",
    "free": HOST.replace("[N,2,5,4]", "[N,2,K,4]"),
    "broken": HOST.replace("y = MatMul(p, v)", "z = NoSuchOp(v)\n  y = MatMul(p, z)"),
}
SHAPE = (40, 2, 5, 4)
GOOD = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
BIAS, IDS = np.zeros((40, 1, 5, 5), np.float32), np.zeros(40, np.int64)

PATCH, FIT = "patch model.onnx --detector det.onnx", "fit model.onnx --data clean.npz -o new.onnx"
COLUMNS = "patch model.onnx --columns 1"
WRITERS = (
    "inspect model.onnx --plan {}",
    "fit model.onnx --data clean.npz -o {}",
    "patch model.onnx --detector det.onnx -o {}",
    "patch model.onnx --detector det.onnx --patch-only {}",
    "apply model.onnx fix.atpatch -o {}",
    "revert patched.onnx -o {}",
)


def folder_of_files(factory: pytest.TempPathFactory) -> Path:
    """A folder with models, detectors, data, plans, patches and patched models; made once."""
    made = factory.getbasetemp() / "made"
    if not made.exists():
        folder = factory.mktemp("making")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            _fill()
        folder.rename(made)
    return made


def _fill() -> None:
    for name, text in MODELS.items():
        save(text, f"{name}.onnx")
    save(DETECTOR, "det.onnx")
    np.savez("clean.npz", x=GOOD)
    host = onnx.load("model.onnx")
    for tensor in host.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(host, "ext.onnx", save_as_external_data=True, location="ext.data", size_threshold=0)
    Path("folder").mkdir()
    Path("soft.onnx").symlink_to("model.onnx")
    api.inspect("model.onnx", "plan.toml")
    plan = Path("plan.toml").read_text()
    Path("detector.toml").write_text(
        plan.replace("patch = true", 'patch = true\ndetector = "det.onnx"')
    )
    api.patch("model.onnx", "det.onnx", output="patched.onnx")
    api.patch("model.onnx", "det.onnx", patch_only="fix.atpatch")
    api.patch("other.onnx", "det.onnx", output="other.patched.onnx")
    api.patch("other.onnx", "det.onnx", patch_only="other.atpatch")
    api.patch("ext.onnx", "det.onnx", output="ext.patched.onnx", digests=True)
    Path("text.onnx").write_text("something dear to somebody\n")


def save(text: str, path: str) -> None:
    """Write a model given as text."""
    onnx.save(onnx.parser.parse_model(text), path)


@dataclass
class Cli:
    """The command line, in a folder of its own that is the working directory."""

    folder: Path
    capsys: pytest.CaptureFixture[str]
    patch: pytest.MonkeyPatch

    @classmethod
    def at(
        cls,
        folder: Path,
        factory: pytest.TempPathFactory,
        capsys: pytest.CaptureFixture[str],
        patch: pytest.MonkeyPatch,
    ) -> Cli:
        """The command line in `folder`, which is filled and made the working directory."""
        shutil.copytree(folder_of_files(factory), folder, symlinks=True)
        os.link(folder / "model.onnx", folder / "hard.onnx")
        os.mkfifo(folder / "pipe")
        patch.chdir(folder)
        return cls(folder, capsys, patch)

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
            assert extra or code == 1 or not out
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

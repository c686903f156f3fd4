"""The programs in docs/onnxruntime.md: each runs, and gives what the Python API gives."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest

from atpatch_onnx import api

from hosts import save_arrays

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "onnxruntime.md"
NODE_MODULES = ROOT / os.environ.get("NODE_MODULES", "build/node/node_modules")
HEADERS = [ROOT / "build/onnxruntime/usr/include/onnxruntime", Path("/usr/include/onnxruntime")]

_HOST = """
<ir_version: 8, opset_import: ["" : 17]>
m (float[N, 1, 8, 8] pixels) => (float[N, 10] logits)
<int64[4] rows = {0, 1, 8, 8}, float[1] half = {0.5}>
{
    x = Reshape(pixels, rows)
    hidden = Add(x, half)
    q = Mul(hidden, wq)
    k = Mul(hidden, wk)
    kt = Transpose<perm = [0, 1, 3, 2]>(k)
    s = MatMul(q, kt)
    p = Softmax<axis = -1>(s)
    c = MatMul(p, v)
    logits = ReduceMean<axes = [1, 2], keepdims = 0>(c)
}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the inputs and outputs of the page, patched with a switch."""
    made = tmp_path_factory.mktemp("samples")
    rng = np.random.default_rng(3)
    model = onnx.parser.parse_model(_HOST)
    held = {"wq": (8, 8), "wk": (8, 8), "v": (1, 1, 8, 10)}
    for name, shape in held.items():
        value = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    onnx.save(model, made / "model.onnx")
    api.patch(made / "model.onnx", columns=[1], redistribute="prune", toggle=True)
    save_arrays(made / "in.npz", {"pixels": np.zeros((1, 1, 8, 8), np.float32)})
    return made


def answer(model: Path, **switches: bool) -> np.ndarray:
    """What the Python API answers to the page's input."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feeds = {"pixels": np.zeros((1, 1, 8, 8), np.float32)}
    feeds |= {f"atpatch/{name}": np.array(value) for name, value in switches.items()}
    return np.asarray(session.run(["logits"], feeds)[0]).ravel()


def blocks(section: str) -> list[str]:
    """The indented blocks of a section of the page, which may have empty lines in them."""
    text = PAGE.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    found: list[str] = []
    kept: list[str] = []
    for line in [*text.splitlines(), "end"]:
        if line.startswith("    ") or (kept and not line):
            kept.append(line)
        elif kept:
            found.append(textwrap.dedent("\n".join(kept)).strip())
            kept = []
    return found


def run(command: list[str], folder: Path, **environment: str) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def same(printed: str, wanted: np.ndarray) -> None:
    found = np.array(printed.split(), np.float32)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_switch_changes_the_answer(folder: Path) -> None:
    """Or the other tests would see nothing."""
    patched = folder / "model.patched.onnx"
    assert not np.allclose(answer(patched), answer(patched, enabled=False))
    np.testing.assert_array_equal(answer(patched, enabled=False), answer(folder / "model.onnx"))


def test_python(folder: Path) -> None:
    (sample,) = blocks("Python")
    program = f"import warnings; warnings.simplefilter('ignore')\n{sample}\nprint(*logits.ravel())"
    same(run([sys.executable, "-c", program], folder), answer(folder / "model.patched.onnx"))


@pytest.mark.slow
@pytest.mark.parametrize("switched", [False, True])
def test_cpp(folder: Path, switched: bool) -> None:
    """Linked with the library of the Python package, against the headers of a distribution."""
    compiler = shutil.which("g++")
    headers = next((path for path in HEADERS if path.is_dir()), None)
    if compiler is None or headers is None:
        pytest.skip("no g++, or no headers: apt-get install libonnxruntime-dev")
    package = Path(onnxruntime.__file__).parent / "capi"
    (library,) = package.glob("libonnxruntime.so.*")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(library)
    program = blocks("C++")[0].split("\n\ng++")[0]
    wanted = answer(folder / "model.patched.onnx")
    if switched:
        wanted = answer(folder / "model.patched.onnx", enabled=False)
        off = next(b for b in blocks("What a patch may add") if b.startswith("bool off"))
        together = f"{off}\n  Ort::Value fed[] = {{std::move(input), std::move(enabled)}};\n"
        program = program.replace(
            "  const char* inputs[] = {", f"{together}  const char* inputs[] = {{"
        )
        program = program.replace('{"pixels"}', '{"pixels", "atpatch/enabled"}')
        program = program.replace("inputs, &input, 1,", "inputs, fed, 2,")
    (folder / "main.cpp").write_text(program)
    flags = ["-std=c++17", "-Wall", "-Werror", f"-I{headers}", f"-L{folder}", "-lonnxruntime"]
    run([compiler, "main.cpp", *flags, "-o", "main"], folder)
    same(run([str(folder / "main")], folder, LD_LIBRARY_PATH=str(folder)), wanted)


@pytest.mark.slow
def test_javascript(folder: Path) -> None:
    """And what the page warns of: an input that has a default is passed over."""
    node = shutil.which("node")
    if node is None or not (NODE_MODULES / "onnxruntime-node").is_dir():
        pytest.skip("no Node, or no package: npm install --prefix build/node onnxruntime-node")
    (program,) = blocks("JavaScript")
    patched = answer(folder / "model.patched.onnx")
    fed = 'pixels, "atpatch/enabled": new ort.Tensor("bool", [false], [])'
    for text in (program, program.replace("run({ pixels })", f"run({{ {fed} }})")):
        (folder / "main.js").write_text(text)
        same(run([node, "main.js"], folder, NODE_PATH=str(NODE_MODULES)), patched)

"""Bad usage and bad input: one clear sentence, the right exit code, nothing written."""

from __future__ import annotations

import json
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from atpatch_onnx.runtime import Array

from bad_input import BIAS, COLUMNS, FIT, GOOD, IDS, PATCH, Cli

DATA: dict[str, tuple[str, dict[str, Array], tuple[str, ...]]] = {
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


def spoil(name: str) -> None:
    """Write a file called `name` that is no ONNX model."""
    good = Path("model.onnx").read_bytes()
    contents = {
        "empty.onnx": b"",
        "pointer.onnx": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        "npz.onnx": Path("clean.npz").read_bytes(),
        "cut.onnx": good[: len(good) // 2],
        "cut-end.onnx": good[:-1],
    }
    if name in contents:
        Path(name).write_bytes(contents[name])


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
    spoil(name)
    shell.fails(command.format(name), 2, name, NOT_ONNX[name])


@pytest.mark.parametrize("name", DATA)
def test_data(shell: Cli, name: str) -> None:
    model, arrays, named = DATA[name]
    np.savez(f"{name}.npz", allow_pickle=True, **arrays)
    shell.fails(f"fit {model}.onnx --data {name}.npz -o new.onnx", 2, *named)
    if name not in ("few", "nan"):
        shell.works(f"patch {model}.onnx --columns 1 -o made.onnx --strategy select")
        shell.fails(f"diff {model}.onnx made.onnx --inputs {name}.npz", 2, *named)


@pytest.mark.parametrize("name", "gone.npz folder model.onnx text.onnx cut.npz empty.onnx".split())
@pytest.mark.parametrize(
    "command",
    [
        "fit model.onnx -o new.onnx --data {}",
        "diff model.onnx patched.onnx --inputs {}",
        "bench model.onnx patched.onnx --inputs {}",
    ],
)
def test_no_data_file(shell: Cli, command: str, name: str) -> None:
    spoil("empty.onnx")
    Path("cut.npz").write_bytes(Path("clean.npz").read_bytes()[:900])
    shell.fails(command.format(name), 2, name)


def test_data_in_damaged_or_foreign_archives(shell: Cli) -> None:
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
    spoil, code, named = PLANS[name]
    spoilt = spoil(Path("plan.toml").read_text())
    Path(f"plan-{name}.toml").write_text(spoilt, errors="surrogateescape")
    shell.fails(f"{PATCH} --plan plan-{name}.toml", code, *named)


@pytest.mark.parametrize("name", EXTERNAL)
def test_external_data(shell: Cli, name: str) -> None:
    location, code, named = EXTERNAL[name]
    host = onnx.load("ext.onnx", load_external_data=False)
    for tensor in host.graph.initializer:
        tensor.external_data[0].value = location
    Path(f"ext-{name}.onnx").write_bytes(host.SerializeToString())
    Path("short.data").write_bytes(b"1234")
    Path("leaves.data").symlink_to("/etc/hostname")
    for command in (
        "patch ext-{0}.onnx --columns 1 --digests",
        "apply ext-{0}.onnx fix.atpatch -o a",
    ):
        shell.fails(command.format(name), code, *named)
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
        ("patch fused.onnx --columns 1", 3, ["com.microsoft.SparseAttention", "export"]),
        ("patch quantised.onnx --columns 1", 3, ["com.microsoft.QOrderedAttention", "quantise"]),
        ("patch standard.onnx --columns 1", 3, ["ONNX Attention", "is_causal"]),
        ("patch old.onnx --columns 1", 3, ["com.microsoft.MultiHeadAttention", "opset 9"]),
        ("patch shapeless.onnx --columns 1", 3, ["ONNX Attention", "does not say", "infer_shapes"]),
        ("fit fused.onnx --data clean.npz -o new.onnx", 3, ["fused.onnx", "refused"]),
        ("patch patched.onnx --columns 1", 3, ["patched already", "revert"]),
        ("fit patched.onnx --data clean.npz -o new.onnx", 3, ["patched.onnx"]),
        ("fit broken.onnx --data clean.npz -o new.onnx", 3, ["broken.onnx", "NoSuchOp"]),
        ("patch det.onnx --detector model.onnx", 3, ["det.onnx", "no attention"]),
        ("patch model.onnx", 2, ["--detector", "--columns"]),
        (COLUMNS + " --detector det.onnx", 2, ["--detector", "--columns", "one of"]),
        ("patch model.onnx --columns 5", 2, ["--columns 5", "0 to 4"]),
        ("patch model.onnx --columns -6", 2, ["--columns -6", "0 to 4"]),
        ("patch free.onnx --columns 99999999999999999999", 2, ["--columns 99999999999999999999"]),
        ("patch model.onnx --columns one", 2, ["--columns one", "3,4,-1"]),
        ("patch model.onnx --columns 1.5", 2, ["--columns 1.5"]),
        (COLUMNS + " --sites decoder.*", 2, ["'decoder.*'", "the model has 1"]),
        (COLUMNS + " --sites 1", 2, ["'1'", "the model has 1"]),
        (COLUMNS + " --redistribute zero", 2, ["zero", "benign, uniform or prune"]),
        (COLUMNS + " --redistribute benign", 2, ["benign", "prune or uniform"]),
        (COLUMNS + " --strategy fast", 2, ["fast", "guard, select or rerun"]),
        (COLUMNS + " --ep tpu", 2, ["tpu", "cuda or cpu"]),
        (COLUMNS + " --threshold 0.5", 2, ["--threshold", "--detector"]),
        (COLUMNS + " --bind a=x", 2, ["--bind", "a"]),
        (PATCH + " --threshold nan", 2, ["--threshold nan"]),
        (PATCH + " --threshold 50", 2, ["--threshold 50", "0"]),
        (PATCH + " -o new.onnx --patch-only new.atpatch", 2, ["--patch-only", "-o"]),
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
        ("apply model.onnx gone.atpatch -o new.onnx", 2, ["gone.atpatch", "no such file"]),
        ("apply model.onnx folder -o new.onnx", 2, ["folder", "directory"]),
        ("revert model.onnx -o new.onnx", 2, ["model.onnx", "no patch", "patched file"]),
        ("revert fix.atpatch -o new.onnx", 2, ["fix.atpatch", "no patch"]),
        ("verify model.onnx other.patched.onnx", 1, ["other.patched.onnx", "model.onnx"]),
        ("verify patched.onnx model.onnx", 2, ["patched.onnx", "original first"]),
        ("verify model.onnx model.onnx", 1, ["model.onnx", "no patch"]),
        ("diff model.onnx none.onnx", 1, ["none.onnx", "model.onnx"]),
        ("diff model.onnx other.patched.onnx", 1, ["other.patched.onnx", "model.onnx"]),
        ("diff model.onnx patched.onnx --inputs clean.npz --batch 0", 2, ["--batch", "at least 1"]),
        ("diff model.onnx patched.onnx --inputs clean.npz --batch -1", 2, ["--batch"]),
        ("diff model.onnx patched.onnx --inputs clean.npz --ep tpu", 2, ["tpu"]),
        ("bench model.onnx patched.onnx --runs 0", 2, ["--runs"]),
        ("bench model.onnx patched.onnx --warmup -40", 2, ["--warmup"]),
        ("bench model.onnx patched.onnx --batch 0", 2, ["--batch"]),
        ("bench model.onnx patched.onnx --length -5", 2, ["--length"]),
        ("bench model.onnx none.onnx", 2, ["none.onnx"]),
        ("bench none.onnx model.onnx", 2, ["model.onnx"]),
        ("demo -o text.onnx", 2, ["text.onnx", "is a file"]),
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


def test_cuda_is_not_tried_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime would complain on the error stream, for each command."""
    import onnxruntime

    from atpatch_onnx import runtime

    def absent(name: str) -> None:
        raise OSError(name)

    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: both)
    monkeypatch.setattr(onnxruntime, "InferenceSession", None)
    monkeypatch.setattr("ctypes.CDLL", absent)
    runtime._cuda_works.cache_clear()
    assert runtime.choose_provider() == "cpu"
    assert runtime.choose_provider("cuda") == "cuda"
    runtime._cuda_works.cache_clear()


def test_runtime_that_lacks_what_is_wanted(shell: Cli) -> None:
    import onnxruntime

    shell.patch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    for command in (PATCH, FIT, "bench model.onnx patched.onnx"):
        shell.fails(f"{command} --ep cuda", 2, "--ep cuda", "CPUExecutionProvider", "[gpu]")
    shell.patch.setitem(sys.modules, "onnxruntime", None)
    for command in (PATCH, FIT, "bench model.onnx patched.onnx"):
        shell.fails(command, 2, "ONNX Runtime is not installed", "pip install")
    shell.works("verify model.onnx patched.onnx")

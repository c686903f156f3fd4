"""Triton repositories: the layout and the rules of its ONNX Runtime backend."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from atpatch_onnx import CheckError, InputError, RefusedError, api, export
from atpatch_onnx.exporting.release import load_release
from atpatch_onnx.exporting.values import interface

from releases import WEIGHTS, make_release, save_data

pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="needs the [export] extra")
from triton_rules import all_configurations, configuration, loads_in_triton, session


@pytest.fixture(params=[{}, {"telemetry": True}, {"toggle": True, "telemetry": True}], ids=str)
def release(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    folder = make_release(tmp_path / "digits", **request.param)
    save_data(folder)
    return folder


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    folder = make_release(tmp_path / "digits")
    save_data(folder)
    return folder


def exported(release: Path, target: Path, **options: Any) -> Path:
    report = export(
        "triton",
        release / "model.onnx",
        release / "model.patched.onnx",
        output=target,
        inputs=release / "clean.npz",
        bad=release / "bad.npz",
        **options,
    )
    assert report.golden == {"clean": False, "bad": True}
    assert {f for f in target.rglob("*") if f.is_file()} == {target / f for f in report.files}
    return target


def test_every_version_loads_by_every_configuration(release: Path, tmp_path: Path) -> None:
    folder = exported(release, tmp_path / "repository") / "model"
    for path in all_configurations(folder):
        loads_in_triton(folder, configuration(path))
    versions = {
        path.stem: list(configuration(path).version_policy.specific.versions)
        for path in all_configurations(folder)
    }
    wanted = {"config": [2], "patched": [2], "original": [1], "both": [1, 2]}
    assert versions == wanted
    for name, version in (("patched", 2), ("original", 1)):
        config, served = (
            configuration(folder / "configs" / f"{name}.pbtxt"),
            session(folder / str(version) / "model.onnx"),
        )
        given = [*served.get_inputs(), *served.get_overridable_initializers()]
        assert {i.name for i in config.input} == {i.name for i in given}
        assert [o.name for o in config.output] == [o.name for o in served.get_outputs()]


def test_the_versions_are_the_files_and_prove_themselves(release: Path, tmp_path: Path) -> None:
    folder = exported(release, tmp_path / "repository") / "model"
    for version, name in ((1, "model.onnx"), (2, "model.patched.onnx")):
        there = folder / str(version)
        assert (there / "model.onnx").read_bytes() == (release / name).read_bytes()
        assert (there / WEIGHTS).read_bytes() == (release / WEIGHTS).read_bytes()
    checks = api.verify(folder / "1/model.onnx", folder / "2/model.onnx")
    assert [c.name for c in checks if not c.passed] == []
    assert "none is there" not in checks[-1].detail
    for golden in ("clean", "bad"):
        arrays = np.load(folder.parent / f"golden-{golden}.npz")
        served = session(folder / "2/model.onnx")
        (answer,) = served.run(["y"], {"x": arrays["input/x"]})
        np.testing.assert_array_equal(answer, arrays["output/y"])


def test_no_link_leads_out_and_the_original_still_loads(plain: Path, tmp_path: Path) -> None:
    """onnx refuses models whose weights have a second name: the source's may get none."""
    apart = exported(plain, tmp_path / "apart") / "model"
    linked = exported(plain, tmp_path / "linked", link_weights=True) / "model"
    assert not [p for p in (*apart.rglob("*"), *linked.rglob("*")) if p.is_symlink()]
    assert {(apart / v / WEIGHTS).stat().st_nlink for v in "12"} == {1}
    assert (linked / "1" / WEIGHTS).samefile(linked / "2" / WEIGHTS)
    loads_in_triton(linked, configuration(linked / "configs/both.pbtxt"))
    onnx.load(plain / "model.onnx")
    for version in "12":
        onnx.load(apart / version / "model.onnx")


def test_an_atpatch_file_gives_the_same_repository(release: Path, tmp_path: Path) -> None:
    clean, bad = release / "clean.npz", release / "bad.npz"
    files = []
    for number, patched in enumerate(("model.patched.onnx", "fix.atpatch")):
        target = tmp_path / str(number)
        pair = release / "model.onnx", release / patched
        export("triton", *pair, output=target, inputs=clean, bad=bad)
        files.append({p.relative_to(target): p.read_bytes() for p in target.rglob("*.*x*")})
    assert files[0] == files[1]


def test_triton_batches_where_samples_are_independent(plain: Path, tmp_path: Path) -> None:
    folder = exported(plain, tmp_path / "repository", max_batch_size=8) / "model"
    for path in all_configurations(folder):
        config = configuration(path)
        assert config.max_batch_size == 8
        assert config.HasField("dynamic_batching")
        loads_in_triton(folder, config)


def test_triton_cannot_batch_everything(tmp_path: Path) -> None:
    toggled = make_release(tmp_path / "toggled", toggle=True)
    files = toggled / "model.onnx", toggled / "model.patched.onnx"
    with pytest.raises(RefusedError, match="--toggle"):
        export("triton", *files, output=tmp_path / "out", max_batch_size=4)
    plain = make_release(tmp_path / "plain", external=False)
    host = onnx.load(plain / "model.onnx")
    host.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 3
    onnx.save(host, plain / "fixed.onnx")
    api.patch(plain / "fixed.onnx", columns=1)
    files = plain / "fixed.onnx", plain / "fixed.patched.onnx"
    with pytest.raises(RefusedError, match="no free first dimension"):
        export("triton", *files, output=tmp_path / "out", max_batch_size=4, golden=3)
    host = onnx.load(plain / "model.onnx")
    host.graph.node[-1].output[0] = "whole"
    sizes = onnx.numpy_helper.from_array(np.array([1, 2]), "sizes")
    host.graph.initializer.append(sizes)
    split = onnx.helper.make_node("Split", ["whole", "sizes"], ["first", "rest"], axis=0)
    joined = onnx.helper.make_node("Concat", ["first", "rest"], ["y"], axis=0)
    host.graph.node.extend([split, joined])
    onnx.save(host, plain / "three.onnx")
    api.patch(plain / "three.onnx", columns=1)
    files, clean = (plain / "three.onnx", plain / "three.patched.onnx"), save_data(plain)[0]
    with pytest.raises(RefusedError, match="does not take one sample and two"):
        export("triton", *files, output=tmp_path / "out", inputs=clean, max_batch_size=4, golden=3)
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_it_asks_for_cuda(plain: Path, tmp_path: Path) -> None:
    folder = exported(plain, tmp_path / "repository") / "model"
    for path in all_configurations(folder):
        config = configuration(path)
        accelerators = config.optimization.execution_accelerators.gpu_execution_accelerator
        assert [one.name for one in accelerators] == ["cuda"]
        # Triton overrides the accelerator's options by defaults where there are parameters.
        assert not config.parameters


def test_only_proven_pairs_are_exported(plain: Path, tmp_path: Path) -> None:
    model, patched = plain / "model.onnx", plain / "model.patched.onnx"
    with pytest.raises(InputError, match="carries no patch"):
        export("triton", model, model, output=tmp_path / "out")
    with pytest.raises(InputError, match="original first"):
        export("triton", patched, model, output=tmp_path / "out")
    claimed = json.loads((plain / "model.patched.certificate.json").read_text())
    claimed["base"]["sha256"] = "0" * 64
    (plain / "model.patched.certificate.json").write_text(json.dumps(claimed))
    with pytest.raises(CheckError, match="another base file"):
        export("triton", model, patched, output=tmp_path / "out")
    (plain / "model.patched.certificate.json").unlink()
    content = bytearray(patched.read_bytes())
    at = content.index(b"kt")
    content[at : at + 2] = b"kq"
    patched.write_bytes(content)
    with pytest.raises(CheckError):
        export("triton", model, patched, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_are_replaced_only_if_they_are_exports(plain: Path, tmp_path: Path) -> None:
    target = exported(plain, tmp_path / "out")
    with pytest.raises(InputError, match="--force"):
        exported(plain, target)
    exported(plain, target, force=True, name="other")
    assert not (target / "model").exists()
    shutil.copytree(plain, tmp_path / "mine")
    for force in (False, True):
        with pytest.raises(InputError, match="other files"):
            exported(plain, tmp_path / "mine", force=force)
    inside = shutil.copytree(plain, target / "inside")
    with pytest.raises(InputError, match="holds the input"):
        exported(inside, target, force=True)
    with pytest.raises(InputError, match="is a file"):
        exported(plain, plain / "model.onnx")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "options",
    [{"name": "../x"}, {"name": "a b"}, {"max_batch_size": -1}, {"golden": 0}, {"name": ".x"}],
    ids=str,
)
def test_bad_options(plain: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        exported(plain, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_scalars_and_other_types(tmp_path: Path) -> None:
    """Triton knows no scalars: they are declared as [1] and reshaped."""
    host = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        host (float[N, 2, 5, 4] x, float gain, int64[N, 5] ids, bool keep)
            => (float[N, 2, 5, 4] y, float mean, int64[N, 5] same)
        {
            kt = Transpose <perm = [0, 1, 3, 2]> (x)
            s = MatMul (x, kt)
            t = Mul (s, gain)
            p = Softmax <axis = -1> (t)
            y = MatMul (p, x)
            mean = ReduceMean <keepdims = 0> (y)
            zero = Where (keep, ids, ids)
            same = Identity (zero)
        }"""
    )
    onnx.save(host, tmp_path / "model.onnx")
    api.patch(tmp_path / "model.onnx", columns=1)
    files = tmp_path / "model.onnx", tmp_path / "model.patched.onnx"
    export("triton", *files, output=tmp_path / "out")
    for path in all_configurations(tmp_path / "out/model"):
        config = configuration(path)
        values: Sequence[Any] = [*config.input, *config.output]
        scalars = {v.name for v in values if v.HasField("reshape")}
        assert scalars == {"gain", "keep", "mean"}


def test_an_output_of_unknown_rank_is_refused(tmp_path: Path) -> None:
    """Triton would take it for a scalar."""
    host = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        host (float[N, 2, 5, 4] x, int64[R] shape) => (y)
        {
            kt = Transpose <perm = [0, 1, 3, 2]> (x)
            s = MatMul (x, kt)
            p = Softmax <axis = -1> (s)
            c = MatMul (p, x)
            y = Reshape (c, shape)
        }"""
    )
    host.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    onnx.save(host, tmp_path / "model.onnx")
    api.patch(tmp_path / "model.onnx", columns=1)
    np.savez(tmp_path / "x.npz", x=np.zeros((2, 2, 5, 4), np.float32), shape=np.array([4, 20]))
    files = tmp_path / "model.onnx", tmp_path / "model.patched.onnx"
    with pytest.raises(RefusedError, match="how many dimensions"):
        export("triton", *files, output=tmp_path / "out", inputs=tmp_path / "x.npz")


def test_dims_are_those_that_the_runtime_infers(tmp_path: Path) -> None:
    """Triton compares outputs exactly, and its ONNX Runtime knows more than the file says."""
    folder = make_release(tmp_path / "digits", telemetry=True, external=False)
    release = load_release(folder / "model.onnx", folder / "model.patched.onnx")
    declared = release.patched.skeleton.graph.output[-1].type.tensor_type.shape.dim
    flagged = interface(release.after, {}).outputs[-1]
    assert flagged.dims == (-1, 2, 1, 5)
    assert not all(dim.HasField("dim_value") for dim in declared[1:])

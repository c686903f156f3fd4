"""Sessions that are patched, switched and swapped while they serve."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import atpatch_onnx
from atpatch_onnx import CheckError, Golden, InputError, RefusedError, Session, api
from atpatch_onnx.model_file import ModelFile
from atpatch_onnx.runtime import Arrays
from atpatch_onnx.runtime import Session as Runtime
from atpatch_onnx.serving.outside import without_weights
from atpatch_onnx.serving.stack import PatchSource

from hosts import COLUMN_MEAN, attention, detector, random_feeds, save_arrays

LOUD = 1
"""The key position of `bad` that is over-attended."""


def inputs(seed: int = 0, bad: bool = False) -> Arrays:
    """Three inputs; bad ones have a key that draws most attention."""
    feeds = random_feeds(seed=seed)
    feeds["mask"][:] = 0
    for name in "qk":
        feeds[name] *= 0.3
    if bad:
        feeds["q"][..., 0] = 3
        feeds["k"][:, :, LOUD, 0] = 6
    return feeds


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a detector and patches of several kinds."""
    folder = tmp_path_factory.mktemp("served")
    onnx.save(attention(17), folder / "model.onnx")
    onnx.save(detector(COLUMN_MEAN, threshold=0.6), folder / "det.onnx")
    kinds: dict[str, dict[str, Any]] = {
        "plain": {"detector": folder / "det.onnx"},
        "watched": {"detector": folder / "det.onnx", "telemetry": True, "toggle": True},
        "column": {"columns": [2], "telemetry": True, "sites": ["0"]},
        "deaf": {"detector": folder / "det.onnx", "threshold": 1.0},
        "nervous": {"detector": folder / "det.onnx", "threshold": 0.0},
    }
    for name, options in kinds.items():
        api.patch(folder / "model.onnx", patch_only=folder / f"{name}.atpatch", **options)
    api.patch(folder / "model.onnx", columns=[2], sites=["0"], output=folder / "once.onnx")
    api.patch(folder / "model.onnx", columns=[2], sites=["0"], patch_only=folder / "one.atpatch")
    api.patch(folder / "once.onnx", columns=[3], patch_only=folder / "two.atpatch")
    return folder


def session(made: Path, *patches: str, **options: Any) -> Session:
    return Session(made / "model.onnx", [made / p for p in patches], threads=1, ep="cpu", **options)


def same(one: Arrays, other: Arrays) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("patches", [(), ("plain.atpatch",), ("one.atpatch", "two.atpatch")])
def test_it_answers_as_the_patched_file_does(
    patches: tuple[str, ...], made: Path, tmp_path: Path
) -> None:
    file = made / "model.onnx"
    for number, name in enumerate(patches):
        result = tmp_path / f"{number}.onnx"
        api.apply(file, made / name, output=result)
        file = result
    runtime = Runtime(file, "cpu", threads=1)
    with session(made, *patches) as served:
        assert served.provider == "cpu"
        assert served.sha256 == ModelFile.open(file).sha256
        for feeds in (inputs(), inputs(bad=True)):
            assert same(runtime.run(feeds), served.run(feeds))


def test_patches_out_of_order_are_refused(made: Path) -> None:
    with pytest.raises(RefusedError, match=r"two\.atpatch is for a model with .*patch this model"):
        session(made, "two.atpatch")
    with session(made, "one.atpatch") as served:
        with pytest.raises(RefusedError, match=r"model\.onnx with one\.atpatch is .*in the order"):
            served.swap([*served.patches, made / "one.atpatch"])
        served.swap([*served.patches, made / "two.atpatch"])
        assert [p.name for p in served.patches] == ["one.atpatch", "two.atpatch"]


def weighty(folder: Path, external: bool = False) -> Path:
    """A model with weights large enough to be mapped, as raw bytes and as floats one by one."""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        host (float[N, L, 64] x) => (float[N, L, 64] y)
        {
            q = MatMul (x, wq) k = MatMul (x, wk) v = MatMul (x, wv)
            kt = Transpose <perm = [0, 2, 1]> (k)
            s = MatMul (q, kt) p = Softmax <axis = -1> (s)
            y = MatMul (p, v)
        }
    """)
    for name in ("wq", "wk", "wv"):
        array = (rng.standard_normal((64, 64)) / 8).astype(np.float32)
        tensor = onnx.numpy_helper.from_array(array, name)
        if name == "wk" and not external:
            values = array.ravel().tolist()
            tensor = onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, [64, 64], values)
        model.graph.initializer.append(tensor)
    path = folder / "weighty.onnx"
    onnx.save(model, path, save_as_external_data=external, location="weighty.data")
    return path


@pytest.mark.parametrize("kind", ["inside", "external", "link", "shared"])
def test_weights_are_read_where_they_lie(kind: str, tmp_path: Path) -> None:
    path = weighty(tmp_path, external=kind == "external")
    if kind == "link":
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "link.onnx").symlink_to(path)
        path = tmp_path / "elsewhere" / "link.onnx"
    file = ModelFile.open(path)
    light = without_weights(file)
    if kind in ("inside", "shared"):
        stored = light.skeleton.graph.initializer
        assert [t.name for t in stored if t.external_data] == ["wq", "wv"]
        assert light.size < file.size / 2
    feeds = {"x": np.random.default_rng(1).standard_normal((2, 5, 64)).astype(np.float32)}
    api.patch(path, columns=[1], patch_only=tmp_path / "fix.atpatch")
    api.patch(path, columns=[1], output=path.parent / "patched.onnx")
    files = (path, path.parent / "patched.onnx")
    wanted = [Runtime(p, "cpu", threads=1).run(feeds)["y"] for p in files]
    with Session(path, threads=1, ep="cpu", share_weights=kind == "shared") as served:
        found = [served.run(feeds)["y"]]
        served.swap([tmp_path / "fix.atpatch"])
        found.append(served.run(feeds)["y"])
    for expected, value in zip(wanted, found, strict=True):
        if kind == "shared":  # weights that are not packed: other rounding
            np.testing.assert_allclose(value, expected, rtol=0, atol=1e-5)
        else:
            np.testing.assert_array_equal(value, expected)


def test_a_model_that_was_replaced_on_disk_is_not_mixed_with_the_old_one(tmp_path: Path) -> None:
    path = weighty(tmp_path)
    with Session(path, threads=1, ep="cpu") as served:
        shutil.copy(path, tmp_path / "new.onnx")
        (tmp_path / "new.onnx").replace(path)
        with pytest.raises(InputError, match="were replaced since"):
            served.swap([])
        assert served.version == 1


def test_flags_per_input_and_site(made: Path) -> None:
    with session(made, "watched.atpatch") as served:
        clean, bad = inputs(), inputs(bad=True)
        mixed = {name: np.concatenate([clean[name], bad[name]]) for name in clean}
        flags = served.flags(mixed)
        assert flags.inputs.tolist() == [False] * 3 + [True] * 3
        assert set(flags.columns) == {"attention.0", "attention.1"}
        assert np.flatnonzero(flags.columns["attention.0"][3:].any(axis=0)).tolist() == [LOUD]
        assert flags.sites["attention.0"] == 3
        assert flags.part(0, 3).sites == {"attention.0": 0, "attention.1": 0}
        served.swap([made / "column.atpatch"])
        assert served.flags(clean).columns["attention.0"].tolist() == [[0, 0, 1, 0, 0, 0]] * 3
        served.swap([made / "plain.atpatch"])
        with pytest.raises(RefusedError, match="has no telemetry: make the patch with"):
            served.flags(clean)
        served.swap([])
        with pytest.raises(RefusedError, match="is the original"):
            served.flags(clean)


def test_switch_and_threshold(made: Path) -> None:
    bad = inputs(bad=True)
    with session(made) as original:
        unpatched = original.run(bad)
        with pytest.raises(RefusedError, match=r"no switch to set: make it with .*--toggle"):
            original.set(enabled=False)
    with session(made, "watched.atpatch") as served:
        healed = served.run(bad)
        assert not same(healed, unpatched)
        served.set(enabled=False)
        assert same(served.run(bad), unpatched)
        served.set(enabled=True, threshold=1.0)
        assert same(served.run(bad), unpatched)
        served.set(threshold=0.6)
        assert same(served.run(bad), healed)
        with pytest.raises(InputError, match=r"no threshold of 'layer.9'"):
            served.set(threshold={"layer.9": 1.0})
        with pytest.raises(InputError, match="one for all sites, give a number"):
            served.set(threshold={"attention.0": 1.0})
        with pytest.raises(InputError, match="between 0 and 1"):
            served.set(threshold=float("nan"))
        served.set(enabled=False)
        served.swap([made / "watched.atpatch"])
        assert served.settings == atpatch_onnx.Settings()


def test_a_swap_that_fails_its_check_leaves_the_old_version(made: Path) -> None:
    golden = Golden(inputs(), inputs(bad=True))
    with session(made, "watched.atpatch", golden=golden) as served:
        before = served.sha256
        with pytest.raises(CheckError, match=r"3 of 3 clean golden inputs .* raise the threshold"):
            served.swap([made / "nervous.atpatch"])
        with pytest.raises(CheckError, match=r"0 of 3 golden inputs that are marked bad"):
            served.swap([made / "deaf.atpatch"])
        with pytest.raises(InputError, match="not a usable"):
            served.swap([PatchSource("no.atpatch", b"nothing")])
        with pytest.raises(InputError, match="no swap to roll back"):
            served.rollback()
        assert (served.sha256, served.version) == (before, 1)
        assert served.flags(inputs(bad=True)).inputs.all()
        # Bad inputs are the original's to answer badly, and rounding may be allowed.
        done = served.swap([])
        assert (done.clean, done.bad, done.drained) == (3, 3, True)
        loose = Golden(inputs(), inputs(bad=True), tolerance=100.0, changed=0.0)
        served.swap([made / "nervous.atpatch"], golden=loose)
        served.rollback()
        assert not served.patches
        served.rollback()
        assert served.sha256 == before
    with pytest.raises(CheckError):
        session(made, "deaf.atpatch", golden=golden)


def test_golden_files(made: Path, tmp_path: Path) -> None:
    clean, bad = inputs(), inputs(bad=True)
    save_arrays(tmp_path / "golden.npz", {**clean, **{f"bad/{k}": v for k, v in bad.items()}})
    with session(made, golden=tmp_path / "golden.npz") as served:
        assert served.swap([made / "plain.atpatch"]).bad == 3
    save_arrays(tmp_path / "bad.npz", {f"bad/{k}": v for k, v in bad.items()})
    with pytest.raises(InputError, match="has no clean inputs"):
        session(made, golden=tmp_path / "bad.npz")


def test_no_request_sees_a_mixture_of_versions(made: Path) -> None:
    """Eight threads, fifty swaps: every answer is the one that its version gives."""
    feeds = inputs(bad=True)
    names = {(): "original", ("watched.atpatch",): "watched", ("nervous.atpatch",): "nervous"}
    expected: dict[str, Arrays] = {}
    for patches in names:
        with session(made, *patches) as alone:
            expected[alone.sha256] = alone.run(feeds)
    assert len({value["y"].tobytes() for value in expected.values()}) == 3
    wrong: list[str] = []
    seen: set[str] = set()
    done = threading.Event()

    def load() -> None:
        while not done.is_set():
            answer = served.answer(feeds)
            seen.add(answer.sha256)
            if not same(answer.outputs, expected[answer.sha256]):
                wrong.append(answer.sha256)

    with session(made) as served:
        threads = [threading.Thread(target=load) for _ in range(8)]
        for thread in threads:
            thread.start()
        for number in range(50):
            patches = list(names)[number % 3]
            assert served.swap([made / p for p in patches]).drained
        done.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert seen == set(expected)


def test_a_request_keeps_the_version_it_began_with(made: Path) -> None:
    """An old version that is still answering is not freed; nor when the session is closed."""
    served = session(made, "watched.atpatch")
    with served._leased() as (version, settings):
        done = served.swap([], drain_s=0.01)
        assert not done.drained
        answer = version.answer(inputs(bad=True), settings, None, 3)
        assert answer.version == 1
        assert answer.flags is not None
        assert answer.flags.inputs.all()
    assert version._runtime is None
    served.close()
    with pytest.raises(InputError, match="session is closed"):
        served.run(inputs())
    with pytest.raises(InputError, match="session is closed"):
        served.swap([])


def test_wrong_inputs_are_named(made: Path) -> None:
    with session(made) as served:
        with pytest.raises(InputError, match="failed on inputs"):
            served.run({"q": np.zeros((1, 2), np.float32)})
        served.run(inputs())  # and it serves on


@pytest.mark.slow
def test_memory_of_swaps(tmp_path: Path) -> None:
    """Shared weights: the second session costs little, and a hundred swaps leave nothing behind."""
    rng = np.random.default_rng(0)
    model = attention(17)
    width = 2048  # 16 MiB of weights behind the attention
    model.graph.node.extend(
        [
            onnx.helper.make_node("ReduceMean", ["y"], ["m"], axes=[1, 2, 3], keepdims=0),
            onnx.helper.make_node("Unsqueeze", ["m", "axis"], ["mm"]),
            onnx.helper.make_node("Expand", ["mm", "shape"], ["wide"]),
            onnx.helper.make_node("MatMul", ["wide", "big"], ["z"]),
        ]
    )
    model.graph.initializer.extend(
        [
            onnx.numpy_helper.from_array(rng.standard_normal((width, width), np.float32), "big"),
            onnx.numpy_helper.from_array(np.array([1]), "axis"),
            onnx.numpy_helper.from_array(np.array([1, width]), "shape"),
        ]
    )
    model.graph.output.append(onnx.helper.make_tensor_value_info("z", 1, ["B", width]))
    path = tmp_path / "big.onnx"
    onnx.save(model, path)
    api.patch(path, columns=[1], patch_only=tmp_path / "fix.atpatch")
    with Session(path, threads=1, ep="cpu", share_weights=True) as served:
        served.run(inputs())
        before = private_bytes()
        with Session(path, threads=1, ep="cpu", share_weights=True) as second:
            second.run(inputs())
            assert private_bytes() - before < 8 << 20
        for number in range(100):
            served.swap([tmp_path / "fix.atpatch"] if number % 2 else [])
            served.run(inputs())
            if number == 20:
                before = private_bytes()
        assert private_bytes() - before < 8 << 20


def private_bytes() -> int:
    """Memory of this process that is no file's."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon")) << 10

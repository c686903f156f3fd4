"""Third-party graphs: every site found, nothing else found, and every file as it was afterwards."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import onnx
import pytest

from atpatch_onnx.errors import InputError
from atpatch_onnx.model_file import ModelFile
from atpatch_onnx.passes.locate import locate
from atpatch_onnx.passes.redistribute import Redistribution
from atpatch_onnx.passes.splice import Splice, Treatment
from atpatch_onnx.patching import revert
from atpatch_onnx.runtime import Arrays, Session

from hosts import assert_patch, spliced


def rows(zoo: Path) -> list[dict[str, str]]:
    with (zoo / "sites.csv").open() as file:
        return list(csv.DictReader(file))


def test_every_site_is_found_and_nothing_else(zoo: Path) -> None:
    wrong = []
    for row in rows(zoo):
        found = locate(ModelFile.open(zoo / row["path"]).skeleton)
        fused = sum(other.op not in ("Softmax", "BiasSoftmax") for other in found.refused)
        fused += sum(site.opening is not None for site in found.sites)
        plain = len(found.sites) + len(found.refused) - fused
        none = len(found.others) - len(found.refused)
        counts = (plain, fused, none)
        wanted = ("softmax_attention", "fused_attention", "softmax_not_attention")
        if counts != tuple(int(row[key]) for key in wanted):
            wrong.append((row["path"], counts))
        scopes = [s.scope for s in found.sites] + [o.scope for o in found.refused]
        assert len(scopes) - scopes.count("main") == int(row["sites_in_subgraphs"])
        assert all(other.reason and other.fix for other in found.refused)
    assert not wrong


def test_every_file_with_a_site_is_patched_and_reverts(zoo: Path) -> None:
    patched = 0
    for row in rows(zoo):
        file = ModelFile.open(zoo / row["path"])
        sites = locate(file.skeleton).sites
        if not sites:
            continue
        treatment = Treatment(Redistribution.PRUNE, columns=(0,))
        after, _ = spliced(file, Splice({site.name: treatment for site in sites}))
        content = after.content()
        assert revert(ModelFile.from_bytes(content)).sha256 == file.sha256
        patched += 1
        if _checks(file.path):
            plain = [site for site in sites if site.opening is None]
            difference = assert_patch(file, after, rewired=len(plain))
            assert len(difference.renamed) == len(sites) - len(plain)
        if row["ort_1_31"] in ("run", "loads"):
            Session(content, "cpu", file.folder)
    assert patched >= 150


def _checks(path: Path) -> bool:
    try:
        onnx.checker.check_model(path)
    except Exception:
        return False
    return True


def test_attention_keeps_onnx_s_own_test_vectors(zoo: Path) -> None:
    """As an operator, and expanded into the plain nodes that define it."""
    checked = {True: 0, False: 0}
    for row in rows(zoo):
        path = zoo / row["path"]
        vectors = path.parent.with_name(path.parent.name.removesuffix("_expanded"))
        vectors = vectors / "test_data_set_0"
        if not vectors.is_dir() or row["ort_1_31"] != "run":
            continue
        file = ModelFile.open(path)
        treatment = Treatment(Redistribution.PRUNE, columns=(0,))
        names = {site.name: treatment for site in locate(file.skeleton).sites}
        if not names:
            continue
        after, _ = spliced(file, Splice(names, toggle=True))
        feeds = _vectors(vectors, "input", [v.name for v in file.skeleton.graph.input])
        wanted = _vectors(vectors, "output", [v.name for v in file.skeleton.graph.output])
        session = Session(after.content(), "cpu", file.folder, threads=1)
        off = session.run({**feeds, "atpatch/enabled": np.array(False)}, list(wanted))
        before = Session(path, "cpu", threads=1).run(feeds, list(wanted))
        for name, value in wanted.items():
            assert np.array_equal(before[name], off[name], equal_nan=True)
            tolerance = 2e-3 if value.dtype == np.float16 else 1e-5
            np.testing.assert_allclose(off[name], value, atol=tolerance, rtol=1e-3)
        on = session.run(feeds, list(wanted))
        assert any(not np.array_equal(on[name], off[name]) for name in wanted)
        checked[row["fused_attention"] == "0"] += 1
    assert checked[True] >= 10
    assert checked[False] >= 25


def _vectors(folder: Path, kind: str, names: list[str]) -> Arrays:
    return {
        name: onnx.numpy_helper.to_array(onnx.load_tensor(str(folder / f"{kind}_{index}.pb")))
        for index, name in enumerate(names)
    }


def test_a_model_that_is_none_is_an_input_error(zoo: Path) -> None:
    with pytest.raises(InputError, match="is not an ONNX model"):
        ModelFile.open(zoo / "sites.csv")

"""The command `fit`: from a model and clean data to a detector file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .api import PathLike
from .calibration import Calibration
from .data import load_samples
from .errors import InputError, RefusedError, at_least
from .external_data import check_layout, external_files
from .files import check_output, write_file
from .layout import with_batch_axes
from .model_file import ModelFile
from .passes.locate import locate
from .plan import choose_sites
from .progress import SILENT, Progress
from .runtime import Array, Session, choose_provider
from .zscore_fitting import ZScoreFit


@dataclass(frozen=True)
class FitReport:
    """What `fit` wrote, for which sites, and what its threshold is worth."""

    output: Path
    kind: str
    provider: str
    sites: tuple[str, ...]
    calibration: Calibration


def fit(
    model: PathLike,
    data: PathLike | Mapping[str, Array],
    output: PathLike,
    *,
    kind: str = "zscore",
    fpr: float = 0.01,
    sites: Sequence[str] = (),
    seed: int = 0,
    batch: int = 32,
    ep: str | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> FitReport:
    """Fit a detector for the attention sites of `model` on clean `data` and write it to `output`.

    data: `.npz` or `.npy` with the model's inputs, or arrays by name; one sample an entry of
        axis 0, also where the model has its batch elsewhere.
    fpr: how many clean inputs may be flagged, as a rate, over all sites together.
    seed: which inputs are held out; batch: inputs a run; ep: execution provider, cuda or cpu.
    Raises: InputError, RefusedError. Nothing is written then.
    """
    if kind != "zscore":
        raise InputError(f"--kind {kind}: this version fits zscore")
    at_least(1, batch, "--batch")
    at_least(0, seed, "--seed")
    file = ModelFile.open(model)
    check_layout(file)
    target = Path(output)
    sources = [] if isinstance(data, Mapping) else [Path(data)]
    protected = [file.path, *sources, *external_files(file)]
    check_output(target, protected, force=force, ours=_fitted_for(target, file))
    found = locate(file.skeleton)
    chosen = tuple(choose_sites(found.sites, sites))
    if not chosen:
        what = f"{len(found.refused)} refused sites" if found.refused else "no attention"
        raise RefusedError(
            f"{file.path} has {what} and none that a detector could be fitted for: see "
            "atpatch-onnx inspect"
        )
    provider = choose_provider(ep)
    inputs = with_batch_axes(Session(file.path, provider).inputs, found.sites)
    samples = load_samples(data, inputs)
    source = "the data" if isinstance(data, Mapping) else str(data)
    for name, array in samples.arrays.items():
        if array.dtype.kind == "f" and bool(np.isnan(array).any()):
            raise InputError(
                f"{source} has NaN in the input '{name}': leave those samples out, they have no "
                "attention to learn from"
            )
    tick = progress.start("fitting", 2 * samples.count)
    detector, calibration = ZScoreFit(file, chosen, provider, batch, tick)(samples, fpr, seed)
    write_file(target, detector.SerializeToString())
    return FitReport(target, kind, provider, tuple(s.name for s in chosen), calibration)


def _fitted_for(path: Path, file: ModelFile) -> bool:
    """Whether the file at `path` is a detector that was fitted for this model before."""
    try:
        return (
            path.is_file() and ModelFile.open(path).metadata("atpatch.host.sha256") == file.sha256
        )
    except (InputError, OSError):
        return False

"""The command `fit`: from a model and clean data to a detector file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

from onnx import ModelProto, helper

from ..api import PathLike
from ..data import Samples
from ..debugging_set import DebuggingSet
from ..detector import ABI_VERSION
from ..errors import InputError, RefusedError, at_least
from ..external_data import check_layout, external_files
from ..files import check_output, write_file
from ..layout import with_batch_axes
from ..model_file import ModelFile
from ..passes.expose import is_reachable
from ..passes.graph_view import GraphView
from ..passes.locate import Site, locate
from ..plan import choose_sites
from ..progress import SILENT, Progress
from ..runtime import Array, InputSpec, Session, choose_provider
from ..second_run import SecondRun
from ..signature import DetectorScope
from .acting import Held, acting, better
from .benign import KINDS as BENIGN
from .calibration import Calibration
from .cleansight import CleanSight
from .contrastive import fit_contrastive
from .fixed_columns import fit_columns
from .heads import Heads
from .inputs import bad_inputs, check_enough, clean_inputs, halves, is_fairness, split_bad
from .job import Job, Made, Trained
from .labelling import moved_columns
from .map_cnn import fit_map_cnn
from .odd_text import is_text, odd_texts
from .scores import Recall
from .several import SEVERAL, fit_several
from .statistics import windows_of
from .zscore import fit_zscore

ZSCORE = "zscore"
KINDS = (ZSCORE, "contrastive", "map-cnn", "columns", *SEVERAL)
TRAINED = ("contrastive", "map-cnn")
ROWS_BESIDE_FUSED = 16
"""Query rows that a detector looks at by default where the map is computed for it alone."""
RUNS = {ZSCORE: 3, "contrastive": 4, "map-cnn": 4, "columns": 1} | dict.fromkeys(SEVERAL, 3)
"""About how many runs over the data each kind takes, for the progress bar."""


@dataclass(frozen=True)
class FitReport:
    """What `fit` wrote, for which sites, and what it is worth.

    calibration: of the threshold; None for detectors that flag the same columns of every input.
    recall: on bad inputs that training has not seen; None without a debugging set.
    observed: the sites that a detector of several sites looks at; `sites` are then those where its
        decision is applied.
    record: what its training record says of how it was made.
    strategy, second_run: how it asks to be spliced in, and what strategy `rerun` then has to know.
    """

    output: Path
    kind: str
    provider: str
    sites: tuple[str, ...]
    calibration: Calibration | None
    recall: Recall | None
    observed: tuple[str, ...]
    record: Mapping[str, object]
    strategy: str | None
    second_run: SecondRun | None


def fit(
    model: PathLike,
    data: PathLike | Mapping[str, Array],
    output: PathLike,
    *,
    debug: PathLike | Mapping[str, Array] | None = None,
    kind: str | None = None,
    options: CleanSight | Heads | None = None,
    fpr: float = 0.01,
    benign: str = "column",
    sites: Sequence[str] = (),
    rows: int | None = None,
    every_answer: bool = False,
    seed: int = 0,
    batch: int = 32,
    ep: str | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> FitReport:
    """Fit a detector for the attention sites of `model` on clean `data` and write it to `output`.

    data: `.npz` or `.npy` with the model's inputs, or arrays by name; one sample an entry of
        axis 0, also where the model has its batch elsewhere.
    debug: bad inputs, from `scan` or your own (see `debugging_set`).
    kind: `zscore` (default without bad inputs), `contrastive` (default with them), `map-cnn` (the
        paper's own), or `columns` (default for a fairness debugging set: the protected columns, in
        every input); or a detector that looks at several sites at once: `cleansight`,
        `head-similarity`, and its repair `head-alignment`.
    options: what can be said of these; a `CleanSight` is needed for `cleansight`.
    fpr: how many clean inputs may be flagged, as a rate, over all sites together.
    benign: what flagged columns get: their clean mean, one value a `column` or an entry of the
        `map`, or the `uniform` share.
    rows: look at that many query rows of a map, evenly spread; 0: at all. By default at all, and at
        16 beside fused operators, where a patch computes what is looked at for every input.
    every_answer: flag inputs whatever they are answered. By default a detector that is to be run
        with strategy `rerun`, and whose debugging set says which class the attacker wants, flags
        only inputs that the first run sends there.
    seed: which inputs are held out, and of the training; batch: inputs a run; ep: execution
        provider, cuda or cpu.
    Raises: InputError, RefusedError. Nothing is written then.
    """
    _check_options(kind, fpr, benign, rows, batch, seed)
    file = ModelFile.open(model)
    check_layout(file)
    target = Path(output)
    sources = [Path(given) for given in (data, debug) if isinstance(given, str | Path)]
    used = [file.path, *sources, *external_files(file)]
    check_output(target, used, force=force, ours=_fitted_for(target, file))
    if isinstance(options, CleanSight):  # it looks at some, and acts at all
        named = tuple(s.name for s in _sites(file, sites)) if sites else options.detection
        options, sites = replace(options, detection=named), ()
    chosen = _sites(file, sites)
    provider = choose_provider(ep)
    inputs = with_batch_axes(Session(file.path, provider).inputs, chosen)
    clean = clean_inputs(data, inputs)
    bad = None if debug is None else bad_inputs(debug, inputs)
    kind = kind or _default_kind(bad)
    if every_answer and kind not in TRAINED:
        raise InputError(
            f"--every-answer is about detectors that are trained to stop one attack, not about "
            f"--kind {kind}: leave it out"
        )
    if bad is not None and kind in TRAINED:
        check_enough(bad)
    runs = RUNS[kind] * clean.count + (0 if bad is None else 5 * bad.bad.count)
    if kind == ZSCORE and is_text(inputs):
        runs += 2 * clean.count
    tick = progress.start("fitting", runs)
    rows = None if kind in SEVERAL else _rows(rows, benign, chosen)
    view = GraphView.of(file.skeleton)
    job = Job(file, view, chosen, provider, batch, seed, benign, tick, rows)
    if kind in SEVERAL:
        made = fit_several(kind, job, clean, bad, fpr, options)
    else:
        made = _column_wise(kind, job, clean, bad, fpr, every_answer, inputs)
    write_file(target, _with_metadata(made, job, kind, clean, bad).SerializeToString())
    names = tuple(site.name for site in made.sites)
    observed = tuple(site.name for site in made.observed)
    return FitReport(
        target,
        kind,
        provider,
        names,
        made.calibration,
        made.recall,
        observed,
        made.record,
        made.strategy,
        made.second_run,
    )


def _column_wise(
    kind: str,
    job: Job,
    clean: Samples,
    bad: DebuggingSet | None,
    fpr: float,
    every_answer: bool,
    inputs: Sequence[InputSpec],
) -> Made:
    """A detector that looks at one site at a time."""
    if bad is not None and bad.anomalous is None and bad.clean is not None:
        bad = replace(bad, anomalous=moved_columns(job, bad.bad, bad.clean))
    if kind == "columns":
        # Columns that are always flagged would always be run twice.
        fixed = fit_columns(job, bad)
        return Made(fixed.model, DetectorScope.SITE, fixed.sites, 0.5, fixed.record)
    unseen, seen = halves(job, clean)
    train, judged = (None, None) if bad is None else split_bad(job, bad)
    odd = odd_texts(job.model, inputs, unseen, job.generator()) if kind == ZSCORE else {}
    held = Held(unseen, judged, seen.count, kind in TRAINED and not every_answer, odd)
    windows = windows_of(job, seen)
    made = acting(job, _train(kind, job, seen, train), windows, held, fpr)
    whole = tuple(site for site in job.sites if windows.get(site.name) == 1)
    if train is None or not 0 < len(whole) < len(job.sites):
        return made
    # Sites of one window a sample see the same tokens, so that a second run can prune all of them.
    alone = replace(job, sites=whole)
    try:
        trained = _train(kind, alone, seen, train)
    except InputError:  # the bad inputs over-attend nothing there
        return made
    return better(job, made, acting(alone, trained, windows, held, fpr), held)


def _check_options(
    kind: str | None, fpr: float, benign: str, rows: int | None, batch: int, seed: int
) -> None:
    if kind is not None and kind not in KINDS:
        raise InputError(f"--kind {kind}: choose {', '.join(KINDS)}")
    if benign not in BENIGN:
        raise InputError(f"--benign {benign}: choose {', '.join(BENIGN)}")
    if not 0 < fpr < 1:
        raise InputError(f"--fpr {fpr}: the false-positive budget is a rate between 0 and 1")
    if rows is not None:
        at_least(0, rows, "--rows")
        if rows and benign == "map":
            raise InputError("--rows and --benign map exclude each other: choose --benign column")
    at_least(1, batch, "--batch")
    at_least(0, seed, "--seed")


def _rows(wanted: int | None, benign: str, sites: Sequence[Site]) -> int | None:
    """How many query rows to look at; None: all."""
    if wanted is not None:
        return wanted or None
    fused = any(site.opening is not None for site in sites)
    return ROWS_BESIDE_FUSED if fused and benign != "map" else None


def _sites(file: ModelFile, wanted: Sequence[str]) -> tuple[Site, ...]:
    found = locate(file.skeleton)
    view = GraphView.of(file.skeleton)
    chosen = tuple(choose_sites(found.sites, wanted))
    hidden = [site for site in chosen if not is_reachable(view, site.path)]
    if hidden and (wanted or len(hidden) == len(chosen)):
        raise RefusedError(
            f"the maps of '{hidden[0].name}' cannot be read, because it is in {hidden[0].scope}, "
            "from which nothing leaves: fit the detector on that decoder exported by itself"
        )
    chosen = tuple(site for site in chosen if site not in hidden)
    if not chosen:
        what = f"{len(found.refused)} refused sites" if found.refused else "no attention"
        raise RefusedError(
            f"{file.path} has {what} and none that a detector could be fitted for: see "
            "atpatch-onnx inspect"
        )
    return chosen


def _default_kind(bad: DebuggingSet | None) -> str:
    if bad is None:
        return ZSCORE
    return "columns" if is_fairness(bad) else "contrastive"


def _train(kind: str, job: Job, clean: Samples, bad: DebuggingSet | None) -> Trained:
    if kind == ZSCORE:
        return fit_zscore(job, clean)
    if bad is None:
        raise InputError(
            f"--kind {kind} learns from bad inputs: give --debug debug.npz (from atpatch-onnx "
            "scan), or choose --kind zscore, which needs none"
        )
    try:
        return (fit_contrastive if kind == "contrastive" else fit_map_cnn)(job, clean, bad)
    except ImportError as error:
        raise InputError(
            f"--kind {kind} trains a net and needs {error.name}: pip install "
            "'atpatch-onnx[train]', or choose --kind zscore"
        ) from None


def _with_metadata(
    made: Made, job: Job, kind: str, clean: Samples, bad: DebuggingSet | None
) -> ModelProto:
    """The detector with what it says of itself."""
    record: dict[str, object] = {
        "data_sha256": clean.sha256(),
        "samples": clean.count,
        "seed": job.seed,
        "benign": job.benign,
        "versions": {name: version(name) for name in ("atpatch-onnx", "numpy", "onnx")},
    }
    if bad is not None:
        record["debug"] = {"sha256": bad.bad.sha256(), "samples": bad.bad.count, **bad.about}
    record |= made.record
    record["calibration"] = None if made.calibration is None else asdict(made.calibration)
    record["recall"] = None if made.recall is None else asdict(made.recall)
    several = made.scope is DetectorScope.MODEL
    helper.set_model_props(
        made.model,
        {
            "atpatch.abi": ABI_VERSION,
            "atpatch.kind": kind,
            "atpatch.scope": made.scope.value,
            "atpatch.threshold": repr(made.threshold),
            "atpatch.apply" if several else "atpatch.sites": json.dumps(
                [site.name for site in made.sites]
            ),
            "atpatch.host.sha256": job.model.sha256,
            "atpatch.training": json.dumps(record),
            **({"atpatch.bind": json.dumps(made.bindings)} if made.bindings else {}),
            **({} if made.strategy is None else {"atpatch.strategy": made.strategy}),
            **({} if job.rows is None else {"atpatch.rows": str(job.rows)}),
            **({} if made.second_run is None else {"atpatch.rerun": made.second_run.dumps()}),
        },
    )
    return made.model


def _fitted_for(path: Path, file: ModelFile) -> bool:
    """Whether the file at `path` is a detector that was fitted for this model before."""
    try:
        return (
            path.is_file() and ModelFile.open(path).metadata("atpatch.host.sha256") == file.sha256
        )
    except (InputError, OSError):
        return False

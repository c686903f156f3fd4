"""The Python API: the commands of the command line as functions, with the same names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .certificate import Certificate, Check, certify
from .certificate import verify as verify_files
from .detector import Detector, check_threshold, load_detector
from .edits import AddMetadata
from .errors import CheckError, InputError, RefusedError
from .external_data import check_beside, check_layout, external_files, external_tensors
from .files import Staging, check_output, write_file
from .model_file import ModelFile
from .passes.graph_view import GraphView
from .passes.locate import Other, Site, Sites, locate
from .passes.outcome import Outcome, PassResult, Patched
from .passes.redistribute import Redistribution
from .passes.splice import Splice, Strategy, Treatment
from .patch_file import load_patch, save_patch
from .patching import Patch, Rewritten, record_keys
from .patching import apply as apply_edits
from .patching import revert as revert_file
from .plan import SitePlan, choose_sites, read_plan, write_plan
from .rehearsal import rehearse
from .runtime import choose_provider

PathLike = str | Path
SITES_KEY = "atpatch.sites"
"""Metadata key of the list of patched sites."""


class Progress:
    """Told how far a long step is; this one keeps silent."""

    def start(self, what: str, total: int) -> Callable[[int], object]:
        """Begin the step `what` of `total` units; the result is called with each advance."""
        del what, total
        return lambda _: None


SILENT = Progress()


@dataclass(frozen=True)
class Inspection:
    """A model's attention sites and everything else that looked like one."""

    model: Path
    sha256: str
    opset: int
    nodes: int
    sites: Sites


def inspect(model: PathLike, plan: PathLike | None = None, *, force: bool = False) -> Inspection:
    """Find the attention sites of `model`; write an editable plan file to `plan`.

    Weights are neither read nor needed. Raises: InputError.
    """
    file = ModelFile.open(model)
    sites = locate(file.skeleton)
    found = Inspection(
        file.path, file.sha256(), GraphView.of(file.skeleton).opset, len(file.nodes), sites
    )
    if plan is not None:
        check_output(Path(plan), [file.path, *external_files(file)], force=force)
        write_file(Path(plan), write_plan(sites, file.path, found.sha256).encode())
    return found


@dataclass(frozen=True)
class PatchReport:
    """What `patch` or `apply` did: the files it wrote and its word on every site.

    provider: the execution provider that the strategy was chosen for; empty for `apply`.
    """

    output: Path
    certificate: Path | None
    outcomes: tuple[Outcome, ...] = ()
    refused: tuple[Other, ...] = ()
    warnings: tuple[str, ...] = ()
    provider: str = ""
    sha256: str = ""
    added_bytes: int = 0


def patch(
    model: PathLike,
    detector: PathLike | None = None,
    *,
    output: PathLike | None = None,
    sites: Sequence[str] = (),
    plan: PathLike | None = None,
    columns: Sequence[int] = (),
    redistribute: str | None = None,
    threshold: float | None = None,
    strategy: str | None = None,
    ep: str | None = None,
    telemetry: bool = False,
    toggle: bool = False,
    bind: Mapping[str, str] | None = None,
    patch_only: PathLike | None = None,
    digests: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
) -> PatchReport:
    """Patch the attention sites of `model` and write the patched model and its certificate.

    detector: ONNX file with the detector ABI; or give `columns` that are always flagged.
    output: by default `MODEL.patched.onnx` beside the model.
    sites: names, glob patterns or indices; by default all.
    redistribute: "benign" (default with a detector), "uniform" or "prune" (default for columns).
    strategy: "guard" (an `If`) or "select" (branch-free); by default what is faster on `ep`.
    ep: where the model will run: "cuda" or "cpu"; by default "cuda" where there is one.
    patch_only: write an `.atpatch` file there instead of a patched model.
    digests: read and hash external weights for the certificate.
    Raises: InputError, RefusedError. Nothing is written then.
    """
    if patch_only is not None and output is not None:
        raise InputError("-o and --patch-only exclude each other: give one of them")
    file = ModelFile.open(model)
    check_layout(file)
    sha256 = file.sha256()
    found = locate(file.skeleton)
    options = _Options(detector, tuple(columns), redistribute, threshold)
    plans = read_plan(Path(plan), sha256) if plan is not None else []
    view = GraphView.of(file.skeleton)
    treatments = _treatments(view, found, sites, plans, options, Path(plan or "."))
    detectors = {t.detector.sha256: t.detector for t in treatments.values() if t.detector}
    _check_bindings(bind or {}, detectors.values())
    provider = choose_provider(ep)
    splice = Splice(treatments, _strategy(strategy, provider), telemetry, toggle, bind or {})
    result = splice(view, found.sites)
    if not result.patched:
        raise RefusedError(_nothing_patched(file, found, result))
    for one in detectors.values():
        rehearse(
            one,
            [s for s in found.sites if s.name in treatments and treatments[s.name].detector is one],
        )
    edits = Patch(sha256, (*result.edits, AddMetadata(_free_key(file), _sites_record(result))))
    rewritten = apply_edits(file, edits, sha256)
    sources = [d.path for d in detectors.values()] + ([Path(plan)] if plan else [])
    said = PatchReport(
        Path(),
        None,
        result.outcomes,
        found.refused,
        tuple(_warnings(file, sha256, detectors.values())),
        provider,
    )
    if patch_only is not None:
        target = Path(patch_only)
        protected = [file.path, *external_files(file), *sources]
        check_output(target, protected, force=force, ours=_is_patch_for(target, sha256))
        content = save_patch(edits, file)
        write_file(target, content)
        return replace(said, output=target, added_bytes=len(content))
    about = {
        "sites": [asdict(outcome) for outcome in result.patched],
        "detectors": [
            {"file": d.path.name, "sha256": d.sha256, "kind": d.kind, "training": d.training}
            for d in detectors.values()
        ],
    }
    target = Path(output) if output is not None else file.path.with_suffix(".patched.onnx")
    written = _write(file, rewritten, target, sources, about, sha256, digests, force, progress)
    return replace(
        said,
        output=written.output,
        certificate=written.certificate,
        sha256=written.sha256,
        added_bytes=written.added_bytes,
    )


def apply(
    model: PathLike,
    patch_file: PathLike,
    *,
    output: PathLike,
    digests: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
) -> PatchReport:
    """Apply an `.atpatch` file to the model it was made for. Raises: InputError, RefusedError."""
    file = ModelFile.open(model)
    check_layout(file)
    sha256 = file.sha256()
    rewritten = apply_edits(file, load_patch(patch_file), sha256)
    about = {"patch": Path(patch_file).name}
    return _write(
        file,
        rewritten,
        Path(output),
        [Path(patch_file)],
        about,
        sha256,
        digests,
        force,
        progress,
    )


def revert(model: PathLike, *, output: PathLike, force: bool = False) -> Path:
    """Write the original that `model` was patched from, byte for byte.

    A model that was patched several times goes back to before its first patch.
    Raises: InputError if it carries no patch, CheckError if it was altered.
    """
    file = ModelFile.open(model)
    restored = revert_file(file)
    while record_keys(inner := ModelFile.from_bytes(restored.content(), file.path)):
        restored = revert_file(inner)
    target = Path(output)
    check_beside(file, target)
    ours = _opened(target, lambda there: there.sha256() == restored.sha256())
    check_output(target, [file.path, *external_files(file)], force=force, ours=ours)
    with Staging() as staging:
        staging.add(target, restored.chunks())
    return target


def verify(
    model: PathLike,
    patched: PathLike,
    *,
    certificate: PathLike | None = None,
    digests: bool = False,
    progress: Progress = SILENT,
) -> list[Check]:
    """Recompute the certificate from the two files; compare with the one beside `patched`.

    digests: read and hash external weights too.
    Raises: InputError for files that cannot be read.
    """
    base, result = ModelFile.open(model), ModelFile.open(patched)
    path = Path(certificate) if certificate else certificate_path(result.path)
    claimed = None
    if certificate is not None or path.exists():
        try:
            claimed = json.loads(path.read_text())
        except (OSError, ValueError):
            claimed = None
        if not isinstance(claimed, dict):
            raise InputError(
                f"{path} is not a readable certificate: give the one that patch wrote, with "
                "--certificate"
            )
    return verify_files(base, result, claimed, _hashing(base, digests, progress))


def certificate_path(patched: Path) -> Path:
    """Where the certificate of a patched model lies."""
    return patched.with_name(f"{patched.stem}.certificate.json")


def patched_sites(model: ModelFile) -> list[dict[str, Any]]:
    """The patched sites that a patched model names: site, flagged value, redistribution, ...

    Raises: CheckError if that list was altered.
    """
    keys = (SITES_KEY, f"{SITES_KEY}.")
    held = [p.value for p in model.skeleton.metadata_props if p.key.startswith(keys)]
    try:
        entries = [entry for value in held for entry in json.loads(value)]
        if all(isinstance(e["site"], str) and isinstance(e["flagged"], str) for e in entries):
            return entries
    except (ValueError, TypeError, KeyError):
        pass
    raise CheckError(
        f"the list of patched sites in {model.path} was altered: take a fresh copy of the file"
    )


def _strategy(wanted: str | None, provider: str) -> Strategy:
    """`select` for CUDA, where an `If` costs a synchronisation, `guard` for CPU."""
    if wanted is not None:
        try:
            return Strategy(wanted)
        except ValueError:
            raise InputError(f"--strategy {wanted}: choose guard or select") from None
    return Strategy.SELECT if provider == "cuda" else Strategy.GUARD


@dataclass(frozen=True)
class _Options:
    """What the command line says for every site, unless the plan says otherwise."""

    detector: PathLike | None
    columns: tuple[int, ...]
    redistribute: str | None
    threshold: float | None


def _treatments(
    view: GraphView,
    found: Sites,
    wanted: Sequence[str],
    plans: list[SitePlan],
    options: _Options,
    plan_path: Path,
) -> dict[str, Treatment]:
    if options.detector and options.columns:
        raise InputError("--detector and --columns exclude each other: give one of them")
    if options.columns and options.threshold is not None:
        raise InputError("--threshold belongs to --detector: --columns are always flagged")
    if options.threshold is not None:
        check_threshold(options.threshold, "--threshold")
    detectors: dict[Path, Detector] = {}
    by_name = {entry.name: entry for entry in plans}
    unknown = set(by_name) - {site.name for site in found.sites}
    if unknown:
        raise InputError(
            f"the plan {plan_path} names the site '{sorted(unknown)[0]}', which the "
            "model does not have: write a new one with inspect --plan"
        )
    treatments = {}
    for site in choose_sites(found.sites, wanted):
        entry = by_name.get(site.name, SitePlan(site.name, patch=not plans))
        if entry.patch:
            treatments[site.name] = _treatment(view, site, entry, options, plan_path, detectors)
    return treatments


def _treatment(
    view: GraphView,
    site: Site,
    entry: SitePlan,
    options: _Options,
    plan_path: Path,
    detectors: dict[Path, Detector],
) -> Treatment:
    columns = entry.columns or (() if entry.detector else options.columns)
    detector = None
    if not columns:
        path = plan_path.parent / entry.detector if entry.detector else options.detector
        if path is None:
            raise InputError(
                f"no detector for site '{site.name}': give --detector det.onnx (make one with "
                "atpatch-onnx fit), or --columns for columns that are known"
            )
        path = Path(path)
        if path not in detectors:
            detectors[path] = load_detector(path, view.opset, options.threshold)
        detector = detectors[path]
    name = entry.redistribute or options.redistribute or ("prune" if columns else "benign")
    try:
        mode = Redistribution(name)
    except ValueError:
        raise InputError(f"--redistribute {name}: choose benign, uniform or prune") from None
    if mode is Redistribution.BENIGN and columns:
        raise InputError(
            "--redistribute benign needs a detector that knows the benign attention: with "
            "--columns choose prune or uniform"
        )
    threshold = entry.threshold if entry.threshold is not None else options.threshold
    if entry.threshold is not None:
        check_threshold(entry.threshold, f"the plan {plan_path}: site '{site.name}': threshold")
    _check_columns(columns)
    return Treatment(mode, detector, columns, threshold, entry.heads)


def _nothing_patched(file: ModelFile, found: Sites, result: PassResult) -> str:
    if found.sites:
        reasons = {getattr(o, "reason", "") for o in result.outcomes if not isinstance(o, Patched)}
        return (
            f"none of the {len(found.sites)} attention sites of {file.path} is to be patched "
            f"({'; '.join(sorted(reasons))}): choose others with --sites or in the plan"
        )
    if found.refused:
        first = found.refused[0]
        return (
            f"{file.path} has no attention that can be patched: {len(found.refused)} refused, "
            f"the first, {first.op} '{first.node}', because {first.reason}: {first.fix}"
        )
    return (
        f"{file.path} has no attention in it: run atpatch-onnx inspect to see what each "
        "softmax is; give a transformer"
    )


def _free_key(file: ModelFile) -> str:
    count = len(record_keys(file))
    return f"{SITES_KEY}.{count + 1}" if count else SITES_KEY


def _sites_record(result: PassResult) -> str:
    return json.dumps([asdict(outcome) for outcome in result.patched], separators=(",", ":"))


def _hashing(file: ModelFile, digests: bool, progress: Progress) -> Callable[[int], object] | None:
    tensors = external_tensors(file) if digests else []
    if not tensors:
        return None
    return progress.start("reading external weights", check_layout(file))


def _write(
    file: ModelFile,
    rewritten: Rewritten,
    target: Path,
    sources: list[Path],
    about: dict[str, Any],
    sha256: str,
    digests: bool,
    force: bool,
    progress: Progress,
) -> PatchReport:
    """Write the patched model and its certificate, together."""
    check_beside(file, target)
    certificate = certificate_path(target)
    protected = [file.path, *external_files(file), *sources]
    ours = _opened(target, lambda there: _patched_from(there) == sha256)
    check_output(target, protected, force=force, ours=ours)
    check_output(certificate, protected, force=force, ours=ours)
    with Staging() as staging:
        staged = staging.add(target, rewritten.chunks())
        result = replace(ModelFile.open(staged), path=target)
        proof: Certificate = certify(
            file, result, about, sha256, external=_hashing(file, digests, progress)
        )
        staging.add(certificate, [json.dumps(proof.as_dict(), indent=1).encode()])
    return PatchReport(
        target,
        certificate,
        sha256=proof.result.sha256,
        added_bytes=rewritten.size - file.size,
    )


def _opened(path: Path, holds: Callable[[ModelFile], bool]) -> bool:
    """Whether there is a model at `path` of which something holds."""
    try:
        return path.is_file() and holds(ModelFile.open(path))
    except (InputError, OSError):
        return False


def _patched_from(model: ModelFile) -> str | None:
    """The digest of what a patched model was made from, as it says itself."""
    keys = record_keys(model)
    try:
        return json.loads(model.metadata(keys[-1]) or "")["base_sha256"] if keys else None
    except (ValueError, KeyError, TypeError):
        return None


def _is_patch_for(path: Path, sha256: str) -> bool:
    try:
        return path.is_file() and load_patch(path).base_sha256 == sha256
    except (InputError, OSError):
        return False


def _check_bindings(bindings: Mapping[str, str], detectors: Iterable[Detector]) -> None:
    known = {name for detector in detectors for name in detector.extra_inputs}
    unknown = sorted(set(bindings) - known)
    if unknown:
        listed = ", ".join(sorted(known)) or "none besides attention and layer"
        raise InputError(
            f"--bind {unknown[0]}=...: no detector has such an input (found: {listed})"
        )


def _check_columns(columns: Sequence[int]) -> None:
    if any(abs(column) >= 2**31 for column in columns):
        raise InputError(f"--columns {max(columns, key=abs)}: no map has so many columns")


def _warnings(file: ModelFile, sha256: str, detectors: Iterable[Detector]) -> Iterator[str]:
    for detector in detectors:
        if detector.host_sha256 not in (None, sha256):
            yield (
                f"{detector.path} was fitted for another model than {file.path}: its statistics "
                "and threshold may not hold here; fit it again"
            )

"""The Python API: commands of the command line as functions, with the same names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .certificate import Check, certify
from .certificate import verify as verify_files
from .debugging_set import load_debugging_set
from .errors import AtpatchError, InputError, RefusedError
from .explain import Explained, explain
from .external_data import check_beside, check_layout, external_files, external_tensors
from .files import Staging, check_output, write_file
from .layout import with_batch_axes
from .model_file import ModelFile
from .passes.align import Align
from .passes.graph_view import GraphView
from .passes.locate import Other, Sites, locate
from .passes.outcome import Outcome
from .passes.rerun import PREFIX as RERUN
from .passes.splice import Splice, Strategy
from .patch_file import load_patch, save_patch
from .patching import (
    Patch,
    Rewritten,
    about_edit,
    base_sha256,
    check_order,
    original,
)
from .patching import apply as apply_edits
from .plan import read_plan, write_plan
from .progress import SILENT, Progress, Tick
from .rehearsal import rehearse
from .runtime import Array, Session, choose_provider
from .site_search import SiteSearch, search_sites
from .strategies import choose_strategy, pruning
from .treatments import Options, check_bindings, choose_treatments, repairs_of
from .wording import about as about_result
from .wording import nothing_patched, warnings

PathLike = str | Path
AUTO = "auto"
"""Instead of names of sites: search for the smallest set that heals a debugging set."""


@dataclass(frozen=True)
class Inspection:
    """A model's attention sites and everything else that looked like one.

    explained: how each site would be treated, in their order.
    """

    model: Path
    sha256: str
    opset: int
    nodes: int
    sites: Sites
    explained: tuple[Explained, ...]


def inspect(model: PathLike, plan: PathLike | None = None, *, force: bool = False) -> Inspection:
    """Find the attention sites of `model`; write an editable plan file to `plan`.

    Weights are neither read nor needed. Raises: InputError.
    """
    file = ModelFile.open(model)
    sites = locate(file.skeleton)
    view = GraphView.of(file.skeleton)
    explained = tuple(explain(view, site) for site in sites.sites)
    if plan is not None:
        check_output(Path(plan), [file.path, *external_files(file)], force=force)
        write_file(Path(plan), write_plan(sites, file.path, file.sha256).encode())
    return Inspection(file.path, file.sha256, view.opset, len(file.nodes), sites, explained)


@dataclass(frozen=True)
class PatchReport:
    """What `patch` or `apply` did: the files it wrote and its word on every site.

    certificate: None where only a patch was written.
    provider: the execution provider that the strategy was chosen for; empty for `apply`.
    search, plan: how the sites were chosen with `sites="auto"`, and the plan file that records it.
    """

    output: Path
    certificate: Path | None
    added_bytes: int
    outcomes: tuple[Outcome, ...] = ()
    refused: tuple[Other, ...] = ()
    warnings: tuple[str, ...] = ()
    provider: str = ""
    search: SiteSearch | None = None
    plan: Path | None = None


def patch(
    model: PathLike,
    detector: PathLike | None = None,
    *,
    output: PathLike | None = None,
    sites: str | Sequence[str | int] = (),
    debug: PathLike | Mapping[str, Array] | None = None,
    plan: PathLike | None = None,
    columns: int | Sequence[int] = (),
    redistribute: str | None = None,
    threshold: float | None = None,
    strategy: str | None = None,
    ep: str | None = None,
    telemetry: bool = False,
    toggle: bool = False,
    bind: Mapping[str, str] | None = None,
    remember: bool = False,
    patch_only: PathLike | None = None,
    digests: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
) -> PatchReport:
    """Patch the attention sites of `model` and write the patched model and its certificate.

    detector: ONNX file with the detector ABI; or give `columns` that are always flagged.
    output: by default `MODEL.patched.onnx` beside the model.
    sites: names, glob patterns or indices; by default all; "auto" searches for the smallest set
        that still heals the debugging set `debug`, and records the search in a plan file.
    redistribute: "benign" (default where the detector knows it), "uniform" or "prune" (default
        for columns).
    strategy: "guard" (an `If`), "select" (branch-free) or "rerun" (decide first, then run again
        with the flagged columns pruned at every site); by default what the detector asks for, where
        the model allows it, else what is faster on `ep`.
    ep: where the model will run: "cuda" or "cpu"; by default "cuda" where there is one.
    remember: add an input and an output that carry flagged columns from prefill to decoding; a
        model that only decodes needs neither `detector` nor `columns` then.
    patch_only: write an `.atpatch` file there instead of a patched model.
    digests: read and hash external weights for the certificate.
    Raises: InputError, RefusedError. Nothing is written then.
    """
    if patch_only is not None and output is not None:
        raise InputError("-o and --patch-only exclude each other: give one of them")
    file = ModelFile.open(model)
    check_layout(file)
    found = locate(file.skeleton)
    view = GraphView.of(file.skeleton)
    sites = sites.split(",") if isinstance(sites, str) else sites
    auto = list(sites) == [AUTO]
    if auto != (debug is not None):
        raise InputError("--sites auto and --debug belong together: give both, or name the sites")
    columns = [columns] if isinstance(columns, int) else columns
    path = None if detector is None else Path(detector)
    plan = None if plan is None else Path(plan)
    plans = [] if plan is None else read_plan(plan, file.sha256)
    options = Options(view.opset, path, tuple(columns), redistribute, threshold, remember)
    treatments = choose_treatments(found, () if auto else sites, plans, plan, options)
    detectors = {t.detector.sha256: t.detector for t in treatments.values() if t.detector}
    check_bindings(bind or {}, detectors.values())
    provider = choose_provider(ep)
    asked = {redistribute, *(entry.redistribute for entry in plans if entry.patch)} - {None}
    how = choose_strategy(
        strategy, provider, file.sha256, view, found, treatments, asked, remember=remember
    )
    if how is Strategy.RERUN:
        treatments = pruning(treatments, asked)
    splice = Splice(treatments, how, telemetry, toggle, bind or {}, remember)
    decided = {"--redistribute": redistribute, "--threshold": threshold, "--strategy": strategy}
    switches = {"--toggle": toggle, "--remember": remember, "--sites auto": auto}
    repairs = repairs_of(treatments, {**decided, **switches})
    align = Align(repairs, bind or {})
    result = (align if repairs else splice)(view, found.sites)
    if not result.patched:
        raise RefusedError(nothing_patched(file, found, result))
    for one in detectors.values():
        users = {name for name, treatment in treatments.items() if treatment.detector is one}
        rehearse(one, [site for site in found.sites if site.name in users])
    protected = [d.path for d in detectors.values()] + ([plan] if plan else [])
    protected += [Path(debug)] if isinstance(debug, str | Path) else []
    target = file.path.with_suffix(".patched.onnx") if output is None else Path(output)
    target = target if patch_only is None else Path(patch_only)
    search, written = None, target.with_suffix(".plan.toml")
    if debug is not None:
        check_output(written, [file.path, *protected], force=force, ours=_is_plan(written, file))
        # Sites that are only pruned in a second run are not to be chosen from.
        candidates = [o.site for o in result.patched if not o.flagged.startswith(RERUN)]
        search = _search(file, view, found, splice, candidates, debug, provider, progress)
        splice = _at(splice, search.chosen)
        result = splice(view, found.sites)
    about = about_edit(file, about_result(result, detectors.values()))
    edits = Patch(file.sha256, (*result.edits, about))
    if patch_only is not None:
        report = _write_patch(file, edits, target, protected, force)
    else:
        hashing = _hashing(file, digests, progress)
        report = _write_model(apply_edits(file, edits), target, protected, hashing, force)
    if search is not None:
        chosen = {name: treatments[name] for name in search.chosen}
        text = write_plan(
            found, file.path, file.sha256, chosen, [f"strategy: {how}", *search.notes()]
        )
        write_file(written, text.encode())
    return replace(
        report,
        search=search,
        plan=None if search is None else written,
        outcomes=result.outcomes,
        refused=found.refused,
        warnings=tuple(warnings(file, view, found, result, detectors.values(), telemetry)),
        provider=provider,
    )


def apply(
    model: PathLike,
    patch_file: PathLike,
    *,
    output: PathLike,
    require_signature: PathLike | None = None,
    digests: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
) -> PatchReport:
    """Apply an `.atpatch` file to the model it was made for.

    require_signature: refuse unless the model, its external weights and the patch are signed by
        this key; see `signing.require_signature`.
    Raises: InputError, RefusedError.
    """
    if require_signature is not None:
        from .signing import require_signature as check_signed

        check_signed([model, patch_file], require_signature)
    file = ModelFile.open(model)
    check_layout(file)
    rewritten = apply_edits(file, load_patch(patch_file))
    hashing = _hashing(file, digests, progress)
    return _write_model(rewritten, Path(output), [Path(patch_file)], hashing, force)


def revert(model: PathLike, *, output: PathLike, force: bool = False) -> Path:
    """Write the original that `model` was patched from, byte for byte.

    A model that was patched several times goes back to before its first patch.
    Raises: InputError if it carries no patch, CheckError if it was altered.
    """
    file = ModelFile.open(model)
    restored = original(file)
    target = Path(output)
    check_beside(file, target)
    same = _opened(target, lambda there: there.sha256 == restored.sha256)
    check_output(target, [file.path, *external_files(file)], force=force, ours=same)
    with Staging() as staging:
        staging.add(target, restored.chunks())
    return target


def verify(
    model: PathLike | None = None,
    patched: PathLike | None = None,
    *,
    certificate: PathLike | None = None,
    signature: PathLike | None = None,
    key: PathLike | None = None,
    digests: bool = False,
    progress: Progress = SILENT,
) -> list[Check]:
    """Recompute the certificate from the two files; compare with the one beside `patched`.

    signature, key: check a signature, by default the one beside the models, and that nothing in its
        folder is altered, missing or unsigned; see `trust.Trust.of`. Without models, only that.
    digests: read and hash external weights too.
    Raises: InputError for files that cannot be read.
    """
    checks: list[Check] = []
    if signature is not None or key is not None:
        from .signing import check_signature

        checks.append(check_signature(key, [p for p in (model, patched) if p], signature))
    if model is None and checks:
        return checks
    if model is None or patched is None:
        raise InputError("verify takes MODEL and PATCHED, or --signature and --key, or all of them")
    base, result = ModelFile.open(model), ModelFile.open(patched)
    check_order(base, result)
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
    return checks + verify_files(base, result, claimed, _hashing(base, digests, progress))


def certificate_path(patched: Path) -> Path:
    """Where the certificate of a patched model lies."""
    return patched.with_name(f"{patched.stem}.certificate.json")


def _search(
    file: ModelFile,
    view: GraphView,
    found: Sites,
    splice: Splice,
    candidates: list[str],
    debug: PathLike | Mapping[str, Array],
    provider: str,
    progress: Progress,
) -> SiteSearch:
    """Search for the smallest set of sites that heals the debugging set."""
    inputs = with_batch_axes(Session(file.path, provider).inputs, found.sites)
    bad = load_debugging_set(debug, inputs)

    def patched(names: Sequence[str]) -> ModelFile:
        edits = _at(splice, names)(view, found.sites).edits
        content = apply_edits(file, Patch(file.sha256, edits)).content()
        return ModelFile.from_bytes(content, file.path)

    tick = progress.start("searching sites", 2 * len(candidates))
    return search_sites(file, candidates, patched, bad, provider, tick)


def _at(splice: Splice, names: Sequence[str]) -> Splice:
    """The splice at some of its sites."""
    return replace(splice, treatments={name: splice.treatments[name] for name in names})


def _is_plan(path: Path, file: ModelFile) -> bool:
    try:
        return path.is_file() and bool(read_plan(path, file.sha256))
    except AtpatchError:
        return False


def _hashing(file: ModelFile, digests: bool, progress: Progress) -> Tick | None:
    """What to tell while external weights are hashed; None if they are not to be."""
    if not digests or not external_tensors(file):
        return None
    return progress.start("reading external weights", check_layout(file))


def _write_patch(
    file: ModelFile, edits: Patch, target: Path, protected: list[Path], force: bool
) -> PatchReport:
    """Write a patch file, after trying whether it applies."""
    apply_edits(file, edits)
    ours = _is_patch_for(target, file.sha256)
    check_output(target, [file.path, *external_files(file), *protected], force=force, ours=ours)
    content = save_patch(edits, file)
    write_file(target, content)
    return PatchReport(target, None, len(content))


def _write_model(
    rewritten: Rewritten, target: Path, protected: list[Path], hashing: Tick | None, force: bool
) -> PatchReport:
    """Write a patched model and its certificate, together."""
    file = rewritten.source
    check_beside(file, target)
    certificate = certificate_path(target)
    ours = _opened(target, lambda there: base_sha256(there) == file.sha256)
    for path in (target, certificate):
        check_output(path, [file.path, *external_files(file), *protected], force=force, ours=ours)
    with Staging() as staging:
        staged = staging.add(target, rewritten.chunks())
        result = replace(ModelFile.open(staged), path=target)
        proof = certify(file, result, hashing)
        staging.add(certificate, [json.dumps(proof.as_dict(), indent=1).encode()])
    return PatchReport(target, certificate, rewritten.size - file.size)


def _opened(path: Path, holds: Callable[[ModelFile], bool]) -> bool:
    """Whether there is a model at `path` of which something holds."""
    try:
        return path.is_file() and holds(ModelFile.open(path))
    except (InputError, OSError):
        return False


def _is_patch_for(path: Path, sha256: str) -> bool:
    try:
        return path.is_file() and load_patch(path).base_sha256 == sha256
    except (InputError, OSError):
        return False

"""What `patch` says: why nothing was patched, what the patch says of itself, and warnings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict

from .detector import Detector
from .model_file import ModelFile
from .passes.expose import is_reachable
from .passes.graph_view import GraphView
from .passes.locate import Sites
from .passes.outcome import PassResult, Skipped
from .passes.splice import Strategy
from .patching import about_patches


def nothing_patched(file: ModelFile, found: Sites, result: PassResult) -> str:
    """Why, and what to do about it."""
    earlier = [site for each in about_patches(file) for site in each["sites"]]
    if any(site.get("strategy") == Strategy.RERUN.value for site in earlier):
        return (
            f"{file.path} carries a patch that runs the model again, which another one cannot be "
            "put on top of: revert it, and patch the original with both"
        )
    if found.sites:
        reasons = sorted({o.reason for o in result.outcomes if isinstance(o, Skipped)})
        return (
            f"none of the {len(found.sites)} attention sites of {file.path} is to be patched "
            f"({'; '.join(reasons)}): choose others with --sites or in the plan"
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


def about(result: PassResult, detectors: Iterable[Detector]) -> dict[str, list[dict[str, object]]]:
    """What a patch says of itself, in the patched model and in its certificate."""
    return {
        "sites": [asdict(outcome) for outcome in result.patched],
        "detectors": [
            {"file": d.path.name, "sha256": d.sha256, "kind": d.kind, "training": d.training}
            for d in detectors
        ],
    }


def warnings(
    file: ModelFile,
    view: GraphView,
    found: Sites,
    result: PassResult,
    detectors: Iterable[Detector],
    telemetry: bool,
) -> Iterator[str]:
    """What is to be known of a patch, though it can be made."""
    patched = {outcome.site for outcome in result.patched}
    silent = [s for s in found.sites if s.name in patched and not is_reachable(view, s.path)]
    if telemetry and silent:
        yield (
            f"no telemetry for {len(silent)} sites, '{silent[0].name}' in {silent[0].scope} among "
            "them: nothing leaves a loop"
        )
    for detector in detectors:
        if detector.host_sha256 not in (None, file.sha256):
            yield (
                f"{detector.path} was fitted for another model than {file.path}: its statistics "
                "and threshold may not hold here; fit it again"
            )

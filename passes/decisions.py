"""What detectors of scope `model` say: each is placed once, its decision applied at many sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..detector import Detector
from ..edits import Edit
from ..errors import InputError, RefusedError
from ..second_run import Answer, SecondRun
from ..signature import DetectorScope
from .fragment import Constants
from .graph_view import GraphView
from .inline import Inliner
from .locate import Site
from .observe import Observation, observed_sites, place


def is_several(detector: Detector | None) -> bool:
    """Whether a detector looks at several sites at once."""
    return detector is not None and detector.scope is DetectorScope.MODEL


@dataclass(frozen=True)
class Asked:
    """What detectors ask of a second run.

    detecting: the sites that are looked at; applied: the names of those where columns are changed,
    None: all over the same keys; answer: what inputs must be answered to be flagged.
    """

    detecting: tuple[Site, ...]
    applied: tuple[str, ...] | None = None
    answer: Answer | None = None


def asked_of(
    detectors: Mapping[str, Detector | None], sites: Sequence[Site], *, remember: bool
) -> Asked:
    """What is asked by the detectors of the sites that are patched, None: static columns.

    remember: flags are carried from run to run, so that they cannot wait for the answer.
    Raises: RefusedError where they do not ask for the same.
    """
    known = {d.sha256 if d else "": d for d in detectors.values()}
    several = [d for d in known.values() if d is not None and is_several(d)]
    if several:
        if len(known) > 1:
            raise RefusedError(
                "--strategy rerun takes one detector that looks at several sites, and no other "
                "beside it: patch with one, or choose --strategy guard"
            )
        return Asked(tuple(observed_sites(several[0], sites)), tuple(detectors))
    requests = {None if d is None else d.second_run for d in known.values()}
    if len(requests) > 1:
        raise RefusedError(
            "--strategy rerun: the detectors ask for different second runs (atpatch.rerun): patch "
            "with one of them, or choose --strategy guard"
        )
    request = (requests.pop() if requests else None) or SecondRun()
    return Asked(
        tuple(site for site in sites if site.name in detectors),
        request.sites or None,
        None if remember else request.answer,
    )


class Decisions:
    """The decisions of detectors that look at several of `sites`.

    rerun: whether all is decided before anything is changed.
    """

    def __init__(
        self,
        view: GraphView,
        constants: Constants,
        inliner: Inliner,
        sites: Sequence[Site],
        *,
        rerun: bool,
    ) -> None:
        self.view, self.constants, self.inliner = view, constants, inliner
        self.sites, self.rerun = sites, rerun
        self._found: dict[str, Observation] = {}

    def at(self, site: Site, detector: Detector) -> tuple[list[Edit], str, str | None]:
        """What is to be added, and the anomaly and benign attention of a site.

        Raises: RefusedError where it is decided behind the site, which has been left by then.
        """
        edits: list[Edit] = []
        if detector.sha256 not in self._found:
            number = f"-{len(self._found)}" if self._found else ""
            prefix = self.constants.prefix.replace("shared", "model") + number
            placed = place(self.view, self.constants, self.inliner, detector, self.sites, prefix)
            self._found[detector.sha256] = placed
            edits += placed.edits
        found = self._found[detector.sha256]
        if site.path:
            raise RefusedError(
                f"the detector {detector.path} looks at several sites at once and cannot be "
                f"applied at '{site.name}' in {site.scope}: leave it out with --sites"
            )
        if site.before < found.last.before and not self.rerun:
            raise RefusedError(
                f"the detector {detector.path} is applied at '{site.name}', but decides only at "
                f"'{found.last.name}', which comes later: choose --strategy rerun, which decides "
                "first, or leave the site out with --sites"
            )
        made = found.outputs
        anomaly = made.get(f"anomaly.{site.name}", made.get("anomaly"))
        if anomaly is None:
            raise InputError(
                f"the detector {detector.path} names '{site.name}' in atpatch.apply, and has no "
                f"output anomaly or anomaly.{site.name}: give it one"
            )
        return edits, anomaly, made.get(f"benign.{site.name}", made.get("benign"))

    def before(self, site: Site, detector: Detector | None) -> int:
        """The node before which it is known what is flagged at a site."""
        if detector is None or not is_several(detector):
            return site.before
        return self._found[detector.sha256].last.before

"""What detectors of scope `model` say: each is placed once, its decision applied at many sites."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..detector import Detector, second_run_of
from ..edits import Edit
from ..errors import InputError, RefusedError
from ..signature import DetectorScope
from .fragment import Constants
from .graph_view import GraphView
from .inline import Inliner
from .locate import Site
from .observe import Observation, observed_sites, place


def is_several(detector: Detector | None) -> bool:
    """Whether a detector looks at several sites at once."""
    return detector is not None and detector.scope is DetectorScope.MODEL


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

    def looked_at(
        self, flagged: Sequence[str], detectors: Iterable[Detector | None]
    ) -> tuple[list[Site], list[str] | None]:
        """The sites that detectors look at, and those where they change something; None: all.

        flagged: the sites that are patched, with their detectors.
        Raises: RefusedError where a detector of several sites is not the only one.
        """
        detectors = list(detectors)
        known = {d.sha256 if d else "": d for d in detectors}
        several = [d for d in known.values() if d is not None and is_several(d)]
        if not several:
            asked = second_run_of(detectors)
            applied = list(asked.sites) if asked is not None and asked.sites else None
            return [site for site in self.sites if site.name in flagged], applied
        if len(known) > 1:
            raise RefusedError(
                "--strategy rerun takes one detector that looks at several sites, and no other "
                "beside it: patch with one, or choose --strategy guard"
            )
        return observed_sites(several[0], self.sites), list(flagged)

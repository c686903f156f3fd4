"""A plan: what to do at which site, in a file that a person can read and edit."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .errors import InputError, RefusedError, reason
from .passes.locate import Site, Sites
from .passes.splice import Treatment


@dataclass(frozen=True)
class SitePlan:
    """What a plan says of one site; None: as the command line or the detector says."""

    name: str
    patch: bool = True
    detector: str | None = None
    threshold: float | None = None
    redistribute: str | None = None
    columns: tuple[int, ...] = ()


_KINDS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "patch": (bool,),
    "detector": (str,),
    "threshold": (int, float),
    "redistribute": (str,),
    "columns": (list,),
}


def write_plan(
    sites: Sites,
    model: Path,
    sha256: str,
    chosen: Mapping[str, Treatment] | None = None,
    notes: Iterable[str] = (),
) -> str:
    """The text of a plan that patches every site, or those chosen as they are treated.

    notes: what is to be known of it, as comments.
    """
    import tomlkit

    document = tomlkit.document()
    document.add(tomlkit.comment("What `atpatch-onnx patch --plan` does at each attention site."))
    document.add(tomlkit.comment("A site may also have: detector = 'det.onnx', threshold = 0.5,"))
    document.add(tomlkit.comment("redistribute = 'benign' | 'uniform' | 'prune', columns = [9]."))
    for note in notes:
        document.add(tomlkit.comment(note))
    document.add("model", tomlkit.item(model.name))
    document.add("sha256", tomlkit.item(sha256))
    listed = tomlkit.aot()
    for site in sites.sites:
        table = tomlkit.table()
        table.add("name", site.name)
        table["name"].comment(_described(site))
        table.add("patch", chosen is None or site.name in chosen)
        if chosen is not None and site.name in chosen:
            treatment = chosen[site.name]
            table.add("redistribute", treatment.redistribution.value)
            if treatment.columns:
                table.add("columns", list(treatment.columns))
            elif (threshold := _threshold(treatment)) is not None:
                table.add("threshold", threshold)
        listed.append(table)
    document.add("site", listed)
    for other in sites.refused:
        document.add(tomlkit.comment(f"refused: {other.op} '{other.node}': {other.reason}"))
    return tomlkit.dumps(document)


def _threshold(treatment: Treatment) -> float | None:
    """What a plan says of it: a detector that has two keeps them, whatever the strategy."""
    asked = None if treatment.detector is None else treatment.detector.second_run
    both = asked is not None and asked.answer is not None
    return treatment.threshold if both else treatment.effective_threshold


def _described(site: Site) -> str:
    heads = "" if site.facts.heads is None else f", {site.facts.heads} heads"
    kinds = {"causal": site.facts.causal, "cross attention": site.facts.cross}
    return site.form + heads + "".join(f", {kind}" for kind, is_so in kinds.items() if is_so)


def read_plan(path: Path, sha256: str) -> list[SitePlan]:
    """The sites of a plan. Raises: InputError for a faulty file, RefusedError for another model."""
    try:
        with path.open("rb") as file:
            document = tomllib.load(file)
    except OSError as error:
        raise InputError(f"cannot read the plan {path}: {reason(error)}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"the plan {path} is not valid TOML: {error}") from None
    if document.get("sha256") != sha256:
        raise RefusedError(
            f"the plan {path} is for a model with SHA-256 {str(document.get('sha256'))[:12]}..., "
            "not for this one: write a new one with inspect --plan"
        )
    entries = document.get("site", [])
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and "name" in e for e in entries
    ):
        raise InputError(f"the plan {path} needs a list of [[site]] tables, each with a name")
    plans = [_site_plan(path, entry) for entry in entries]
    twice = next(
        (p.name for i, p in enumerate(plans) if p.name in {q.name for q in plans[:i]}), None
    )
    if twice is not None:
        raise InputError(f"the plan {path} has site '{twice}' twice: keep one of its tables")
    return plans


def _site_plan(path: Path, entry: dict[str, Any]) -> SitePlan:
    unknown = set(entry) - set(_KINDS)
    if unknown:
        raise InputError(
            f"the plan {path} sets '{sorted(unknown)[0]}' for site '{entry['name']}', which is not "
            f"known: choose from {', '.join(_KINDS)}"
        )
    for key, kinds in _KINDS.items():
        wrong = key in entry and (
            not isinstance(entry[key], kinds)
            or (isinstance(entry[key], bool) and bool not in kinds)
            or (list in kinds and any(type(item) is not int for item in entry[key]))
        )
        if wrong:
            raise InputError(
                f"the plan {path} sets {key} = {entry[key]!r} for site '{entry['name']}', which "
                "has the wrong type"
            )
    values = {key: entry[key] for key in _KINDS if key in entry}
    if "columns" in values:
        values["columns"] = tuple(values["columns"])
    return SitePlan(**values)


def choose_sites(sites: Sequence[Site], wanted: Sequence[str | int]) -> list[Site]:
    """The sites that `wanted` names: by name, glob pattern or index. Raises: InputError."""
    if not wanted:
        return list(sites)
    chosen: dict[str, Site] = {}
    for word in map(str, wanted):
        found = [s for s in sites if fnmatchcase(s.name, word) or str(s.index) == word]
        if not found:
            names = ", ".join(s.name for s in sites[:6]) + (", ..." if len(sites) > 6 else "")
            raise InputError(
                f"no site is called '{word}': the model has {len(sites)}, by name or index 0 to "
                f"{len(sites) - 1}: {names}"
            )
        chosen.update((site.name, site) for site in found)
    return sorted(chosen.values(), key=lambda site: site.index)

"""JUnit XML, which CI systems show: one test case for each gate.

Source of the form: the schema of Jenkins' xunit plugin, junit-10.xsd, of which only what every
reader knows is written.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from .errors import AtpatchError, CheckError
from .files import check_output, write_file
from .gating import Gate, Gated, Limits, gate

SUITE = "atpatch-onnx diff"
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML cannot hold; names of outputs may."""


def gate_to(
    output: Path | None,
    model: Path,
    patched: Path,
    inputs: Path | None,
    limits: Limits,
    **options: Any,
) -> Gated:
    """`gating.gate`, with its result written to `output` as JUnit XML, if that is given.

    A patched model that does not match its original at all is an error in the document too.
    Raises: as `gate`.
    """
    if output is None:
        return gate(model, patched, inputs, limits, **options)
    sources = [model, patched] + ([inputs] if inputs else [])
    check_output(output, sources, force=False, ours=is_junit(output))
    about = {"model": str(model), "patched": str(patched), "inputs": str(inputs or "")}
    start = time.perf_counter()
    try:
        found = gate(model, patched, inputs, limits, **options)
    except CheckError as error:
        content = junit_xml((), about, time.perf_counter() - start, error)
        write_file(output, content)
        raise
    told = {"provider": found.comparison.provider or "", "count": str(found.comparison.inputs)}
    write_file(output, junit_xml(found.gates, about | told, time.perf_counter() - start))
    return found


def junit_xml(
    gates: Sequence[Gate],
    properties: Mapping[str, str],
    seconds: float = 0.0,
    error: AtpatchError | None = None,
) -> bytes:
    """The document. `error`: why there was nothing to judge; it becomes a case of its own.

    properties: what is told of the run; seconds: how long it took.
    """
    counts: dict[str, str] = {
        "tests": str(len(gates) + (error is not None)),
        "failures": str(sum(not entry.passed for entry in gates)),
        "errors": str(int(error is not None)),
    }
    root = ElementTree.Element("testsuites", {"name": SUITE, **counts})
    ran = {
        "skipped": "0",
        "time": f"{seconds:.3f}",
        "timestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S"),
    }
    suite = ElementTree.SubElement(root, "testsuite", {"name": SUITE, **counts, **ran})
    told = ElementTree.SubElement(suite, "properties")
    for name, value in properties.items():
        ElementTree.SubElement(told, "property", name=name, value=_clean(value))
    for entry in gates:
        case = _case(suite, entry.name, entry.output or "model")
        if not entry.passed:
            failure = ElementTree.SubElement(
                case, "failure", message=_clean(entry.message), type=entry.name
            )
            failure.text = f"found {entry.found!r}, limit {entry.limit!r}"
        else:
            ElementTree.SubElement(case, "system-out").text = _clean(entry.message)
    if error is not None:
        case = _case(suite, "comparable", "model")
        kind = type(error).__name__
        ElementTree.SubElement(case, "error", message=_clean(str(error)), type=kind)
    ElementTree.indent(root)
    content: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return content + b"\n"


def is_junit(path: Path) -> bool:
    """Whether the file at `path` was written here, and so may be replaced."""
    try:
        return ElementTree.parse(path).getroot().get("name") == SUITE
    except (OSError, ElementTree.ParseError):
        return False


def _case(suite: ElementTree.Element, gate: str, subject: str) -> ElementTree.Element:
    name = gate if subject == "model" else f"{gate} {_clean(subject)}"
    return ElementTree.SubElement(
        suite, "testcase", classname=f"atpatch.{gate}", name=name, time="0.000"
    )


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)

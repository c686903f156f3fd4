"""The command `report`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..api import PathLike
from ..errors import InputError, reason
from ..files import check_output, write_file
from ..progress import SILENT, Progress
from .findings import Labels

MADE_BY = '<meta name="generator" content="atpatch-onnx report">'


@dataclass(frozen=True)
class ReportWritten:
    """What `report` decided, and the page that says why.

    recommendation: good (deploy), open (not enough evidence) or bad (do not deploy).
    answers: question, status and text of each of its grounds.
    """

    output: Path
    size_bytes: int
    recommendation: str
    headline: str
    reason: str
    answers: tuple[tuple[str, str, str], ...]


def report(
    model: PathLike,
    patched: PathLike,
    output: PathLike,
    *,
    clean: PathLike,
    bad: PathLike | None = None,
    test: PathLike | None = None,
    protected: Sequence[str] = (),
    target: int | None = None,
    features: Sequence[str] = (),
    classes: Sequence[str] = (),
    vocabulary: PathLike | None = None,
    kind: str | None = None,
    scores: str | None = None,
    batch: int = 32,
    runs: int = 30,
    ep: str | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> ReportWritten:
    """Write one self-contained HTML page from which a person can decide about `patched`.

    clean: inputs that are in order; bad: inputs that are not, a debugging set or your own;
    test: clean inputs with `labels`, on which rates are measured; by default `clean`.
    protected, target, scores: as in `evaluate`. kind: of the inputs, image, text or tabular.
    features, classes: names of the columns of a table and of classes; vocabulary: of tokens, a
    file with one a line or a `tokenizer.json`.

    Raises: InputError for unusable files or where the [report] extra is missing, CheckError if
    `patched` is not `model` with a patch, RefusedError.
    """
    try:
        from .collect import Sources, collect
        from .page import render
        from .verdict import judge
    except ImportError as error:
        raise InputError(
            f"reports need the package {error.name}: pip install 'atpatch-onnx[report]'"
        ) from None
    target_file = Path(output)
    sources = Sources(Path(clean), *(None if p is None else Path(p) for p in (bad, test)))
    read = [Path(model), Path(patched), *sources.paths()]
    read += [] if vocabulary is None else [Path(vocabulary)]
    check_output(target_file, read, force=force, ours=_is_report(target_file))
    words = {} if vocabulary is None else load_vocabulary(Path(vocabulary))
    found = collect(
        Path(model),
        Path(patched),
        sources,
        labels=Labels(tuple(features), tuple(classes), words),
        protected=protected,
        target=target,
        kind=kind,
        scores=scores,
        batch=batch,
        runs=runs,
        ep=ep,
        progress=progress,
    )
    verdict = judge(found)
    content = render(found, verdict).encode()
    write_file(target_file, content)
    return ReportWritten(
        target_file,
        len(content),
        verdict.status.value,
        verdict.headline,
        verdict.reason,
        tuple((a.question, a.status.value, a.text) for a in verdict.answers),
    )


def load_vocabulary(path: Path) -> dict[int, str]:
    """Tokens by id, from a list of lines (`vocab.txt`) or a `tokenizer.json`.

    Raises: InputError for a file that is neither.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read the vocabulary {path}: {reason(error)}") from None
    except UnicodeDecodeError:
        text = ""
    if text.startswith("{"):
        try:
            held = json.loads(text)["model"]["vocab"]
            if not isinstance(held, dict):  # a list of tokens with their scores
                held = {entry[0]: number for number, entry in enumerate(held)}
            found = {int(number): str(token) for token, number in held.items()}
        except (ValueError, KeyError, TypeError, IndexError):
            found = {}
    else:
        found = dict(enumerate(text.splitlines()))
    if not found:
        raise InputError(
            f"{path} is no vocabulary: give a vocab.txt with one token a line, or a tokenizer.json"
        )
    return found


def _is_report(path: Path) -> bool:
    """Whether a report lies there, which can be made again."""
    try:
        with path.open(encoding="utf-8") as file:
            return MADE_BY in file.read(2000)
    except (OSError, UnicodeDecodeError):
        return False

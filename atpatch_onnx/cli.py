"""The command line: each command is a function of the Python API and a way to show its result."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from . import __version__, api, show
from .errors import AtpatchError, CheckError, InputError, one_sentence
from .progress import Progress, Tick

app = typer.Typer(
    name="atpatch-onnx",
    help="Hot-patch exported ONNX transformers by redistributing attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
INTERRUPTED = 130
# A pipe has no width: rows stay whole there, so that names can be searched and copied.
out = Console(width=None if sys.stdout.isatty() else 240)
err = Console(stderr=True)

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="The original .onnx file.")]
PatchedModel = Annotated[Path, typer.Argument(metavar="PATCHED", help="The patched .onnx file.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Force = Annotated[bool, typer.Option("--force", help="Replace existing files.")]
Digests = Annotated[bool, typer.Option("--digests", help="Read and hash external weights too.")]
Ep = Annotated[
    str | None, typer.Option(help="Execution provider: cuda or cpu; by default cuda where it is.")
]
SiteNames = Annotated[
    list[str] | None,
    typer.Option("--sites", help="Sites by name, glob or index; comma-separated or repeated."),
]


class Bars(Progress):
    """Progress bars on the error stream, where a person is looking."""

    def __init__(self) -> None:
        from rich.progress import Progress as RichProgress

        self.bars = RichProgress(console=err, transient=True, disable=not err.is_terminal)

    def start(self, what: str, total: int) -> Tick:
        """Begin a bar."""
        task = self.bars.add_task(what, total=total)
        return lambda count: self.bars.advance(task, count)


@contextmanager
def _bars() -> Iterator[Bars]:
    bars = Bars()
    with bars.bars:
        yield bars


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"atpatch-onnx {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Hot-patch exported ONNX transformers by redistributing attention."""


@app.command()
def inspect(
    model: Model,
    plan: Annotated[Path | None, typer.Option(help="Write an editable plan there.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Find the attention sites, and say of every other softmax or fused op why it is none."""
    found = api.inspect(model, plan, force=force)
    _print(as_json, show.inspection_json(found), lambda: show.inspection(out, found, plan))


@app.command()
def scan(
    model: Model,
    data: Annotated[
        Path, typer.Option(help="Clean inputs, .npz, keys = input names; labels optional.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The debugging set to write.")],
    kind: Annotated[str | None, typer.Option(help="Of the inputs: image, text or tabular.")] = None,
    target: Annotated[int | None, typer.Option(help="Search this class only.")] = None,
    protected: Annotated[
        list[str] | None,
        typer.Option(help="Find what sways the model instead: N (a column), INPUT:N or INPUT."),
    ] = None,
    budget: Annotated[float, typer.Option(help="Seconds; a second run goes on.")] = 600.0,
    seed: Annotated[int, typer.Option(help="Of the search and of what is held out.")] = 0,
    scores: Annotated[
        str | None, typer.Option(help="The output that holds the class scores [N, C].")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Inputs a run; by default what suits the device.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of ONNX Runtime; 0: its choice.")] = 0,
    ep: Ep = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Search for a trigger toward each class, and say whether the model is backdoored."""
    if protected:
        _scan_protected(
            model,
            data,
            output,
            _words(protected),
            kind,
            target,
            as_json,
            scores=scores,
            batch=batch,
            threads=threads,
            ep=ep,
            force=force,
        )
        return
    from .scanning import scan as run
    from .scanning import state_path
    from .show_scan import scanned

    try:
        with _bars() as progress:
            report = run(
                model,
                data,
                output,
                kind=kind,
                target=target,
                budget=budget,
                seed=seed,
                scores=scores,
                batch=batch,
                threads=threads,
                ep=ep,
                force=force,
                progress=progress,
            )
    except KeyboardInterrupt:
        kept = state_path(output)
        if not kept.exists():
            raise
        _say(f"interrupted; the search so far is in {kept}, from which the same command goes on")
        sys.exit(INTERRUPTED)
    _print(as_json, _plain(report), lambda: scanned(out, report))


@app.command()
def fit(
    model: Model,
    data: Annotated[Path, typer.Option(help="Clean inputs, .npz or .npy, keys = input names.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The detector to write.")],
    debug: Annotated[
        Path | None,
        typer.Option("--debug", "--bad", help="Bad inputs: from scan, or your own."),
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="zscore, contrastive, map-cnn or columns.")
    ] = None,
    benign: Annotated[
        str, typer.Option(help="What flagged columns get: column, map or uniform.")
    ] = "column",
    fpr: Annotated[float, typer.Option(help="False-positive budget per clean input.")] = 0.01,
    sites: SiteNames = None,
    rows: Annotated[
        int | None,
        typer.Option(help="Look at that many query rows of a map: cheap beside a fused operator."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Splits the data.")] = 0,
    batch: Annotated[int, typer.Option(help="Inputs a run.")] = 32,
    ep: Ep = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Fit a detector on clean inputs, calibrated on some of them held out."""
    from .fitting import fit as run

    with _bars() as progress:
        report = run(
            model,
            data,
            output,
            debug=debug,
            kind=kind,
            fpr=fpr,
            benign=benign,
            sites=_words(sites),
            rows=rows,
            seed=seed,
            batch=batch,
            ep=ep,
            force=force,
            progress=progress,
        )
    _print(as_json, _plain(report), lambda: show.fitted(out, report))


@app.command()
def patch(
    model: Model,
    detector: Annotated[Path | None, typer.Option(help="Detector to splice in.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="By default MODEL.patched.onnx.")
    ] = None,
    sites: Annotated[
        list[str] | None,
        typer.Option("--sites", help="Sites by name, glob or index; auto: the fewest that heal."),
    ] = None,
    debug: Annotated[
        Path | None, typer.Option(help="Bad inputs that --sites auto must heal.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Plan file from inspect --plan.")] = None,
    columns: Annotated[
        str | None, typer.Option(help="Columns that are always flagged, e.g. 9 or 3,4,-1.")
    ] = None,
    redistribute: Annotated[
        str | None, typer.Option(help="What flagged columns get: benign, uniform or prune.")
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="Override the detector's.")] = None,
    strategy: Annotated[
        str | None,
        typer.Option(help="guard (If), select (branch-free) or rerun (decide first)."),
    ] = None,
    telemetry: Annotated[bool, typer.Option(help="Add outputs: flagged columns per site.")] = False,
    toggle: Annotated[
        bool, typer.Option(help="Add overridable inputs: atpatch/enabled, atpatch/threshold.")
    ] = False,
    bind: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE: a detector input reads a model value.")
    ] = None,
    remember: Annotated[
        bool,
        typer.Option(help="Carry flagged columns from prefill to decoding: one input, one output."),
    ] = False,
    patch_only: Annotated[
        Path | None, typer.Option(help="Write only an .atpatch file, to apply elsewhere.")
    ] = None,
    ep: Ep = None,
    digests: Digests = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Splice a detector and a redistribution into the model; its weights stay as they are."""
    with _bars() as progress:
        report = api.patch(
            model,
            detector,
            output=output,
            sites=_words(sites),
            debug=debug,
            plan=plan,
            columns=_integers(columns),
            redistribute=redistribute,
            threshold=threshold,
            strategy=strategy,
            ep=ep,
            telemetry=telemetry,
            toggle=toggle,
            bind=_bindings(bind),
            remember=remember,
            patch_only=patch_only,
            digests=digests,
            force=force,
            progress=progress,
        )
    _print(as_json, _plain(report), lambda: show.patched(out, report))


@app.command()
def apply(
    model: Model,
    patch_file: Annotated[Path, typer.Argument(metavar="FIX.ATPATCH")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The patched model to write.")],
    digests: Digests = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Apply an .atpatch file to the model that it was made for."""
    with _bars() as progress:
        report = api.apply(
            model, patch_file, output=output, digests=digests, force=force, progress=progress
        )
    _print(as_json, _plain(report), lambda: show.patched(out, report))


@app.command()
def revert(
    patched: PatchedModel,
    output: Annotated[Path, typer.Option("-o", "--output", help="The original, to write.")],
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Get the original file back, byte for byte, from the patched one alone."""
    report = api.revert(patched, output=output, force=force)
    _print(as_json, {"output": str(report)}, lambda: show.reverted(out, report))


@app.command()
def diff(
    model: Model,
    patched: PatchedModel,
    inputs: Annotated[Path | None, typer.Option(help="Inputs to compare outputs on.")] = None,
    batch: Annotated[int, typer.Option(help="Inputs a run.")] = 32,
    ep: Ep = None,
    as_json: Json = False,
) -> None:
    """Compare graphs and outputs, and count what is flagged; fails if a clean input moved."""
    from .diffing import diff as run

    with _bars() as progress:
        found = run(model, patched, inputs, ep=ep, batch=batch, progress=progress)
    _print(as_json, _plain(found), lambda: show.comparison(out, found))
    if found.identity is False:
        raise _ReportedError("an input in which nothing was flagged has other outputs than before")


@app.command()
def verify(
    model: Model,
    patched: PatchedModel,
    certificate: Annotated[
        Path | None, typer.Option(help="By default the one beside the patched model.")
    ] = None,
    digests: Digests = False,
    as_json: Json = False,
) -> None:
    """Recompute the certificate from the two files alone."""
    with _bars() as progress:
        checks = api.verify(
            model, patched, certificate=certificate, digests=digests, progress=progress
        )
    passed = all(check.passed for check in checks)
    document = {"passed": passed, "checks": _plain(checks)}
    _print(as_json, document, lambda: show.verified(out, checks))
    if not passed:
        raise _ReportedError(next(check.detail for check in checks if not check.passed))


@app.command()
def evaluate(
    model: Model,
    patched: PatchedModel,
    data: Annotated[Path, typer.Option(help="Held-out clean inputs with labels, .npz.")],
    triggered: Annotated[
        Path | None, typer.Option(help="Inputs with the trigger, and their true labels, .npz.")
    ] = None,
    protected: Annotated[
        list[str] | None,
        typer.Option(help="Attributes to flip: N (a column), INPUT:N or INPUT; or repeated."),
    ] = None,
    target: Annotated[int | None, typer.Option(help="The class that the attacker wants.")] = None,
    scores: Annotated[
        str | None, typer.Option(help="The output that holds the class scores [N, C].")
    ] = None,
    batch: Annotated[int, typer.Option(help="Inputs a run.")] = 32,
    ep: Ep = None,
    as_json: Json = False,
) -> None:
    """Measure accuracy, attack success, unfairness and what is flagged, before and after."""
    from .evaluating import evaluate as run
    from .show_evaluation import evaluation

    with _bars() as progress:
        found = run(
            model,
            patched,
            data,
            triggered=triggered,
            protected=_words(protected),
            target=target,
            scores=scores,
            batch=batch,
            ep=ep,
            progress=progress,
        )
    _print(as_json, _plain(found), lambda: evaluation(out, found))


@app.command()
def bench(
    model: Model,
    patched: PatchedModel,
    inputs: Annotated[Path | None, typer.Option(help="Inputs to run; by default random.")] = None,
    batch: Annotated[int, typer.Option(help="Samples a run.")] = 1,
    length: Annotated[int, typer.Option(help="Size of other free dimensions.")] = 128,
    runs: Annotated[int, typer.Option(help="Timed pairs of runs.")] = 30,
    warmup: Annotated[int, typer.Option(help="Pairs of runs before that.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads of ONNX Runtime; 0: its choice.")] = 0,
    ep: Ep = None,
    as_json: Json = False,
) -> None:
    """Time the patched model against the original, in pairs of runs."""
    from .benchmark import bench as run

    with _bars() as progress:
        timing = run(
            model,
            patched,
            inputs=inputs,
            ep=ep,
            batch=batch,
            length=length,
            runs=runs,
            warmup=warmup,
            threads=threads,
            progress=progress,
        )
    _print(as_json, _plain(timing), lambda: show.timing(out, timing))


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for what the demo makes.")
    ] = Path("atpatch-demo"),
    seed: Annotated[int, typer.Option(help="Of the victim's training.")] = 0,
    ep: Ep = None,
    as_json: Json = False,
) -> None:
    """Train a backdoored model, export it, patch it, prove it: all in a quarter of a minute."""
    from .demonstration import demo as run

    with _bars() as progress:
        report = run(output, seed=seed, ep=ep, progress=progress)
    _print(as_json, _plain(report), lambda: show.demonstration(out, report))


def _scan_protected(
    model: Path,
    data: Path,
    output: Path,
    protected: list[str],
    kind: str | None,
    target: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    from .scanning_protected import scan_protected
    from .show_scan import scanned_protected

    if target is not None or kind not in (None, "tabular"):
        wrong = f"--kind {kind}" if target is None else f"--target {target}"
        raise InputError(f"{wrong} does not go with --protected: leave one of them out")
    with _bars() as progress:
        report = scan_protected(model, data, output, protected, progress=progress, **options)
    _print(as_json, _plain(report), lambda: scanned_protected(out, report))


def _print(as_json: bool, document: Any, text: Callable[[], None]) -> None:
    if as_json:
        sys.stdout.write(json.dumps(document, indent=1) + "\n")
    else:
        text()


def _plain(value: Any) -> Any:
    """`value` as what JSON knows; a dataclass that is one of several kinds says which."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        held = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        kind = type(value).__name__
        return {"outcome": kind.lower(), **held} if kind in ("Patched", "Skipped") else held
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _words(values: list[str] | None) -> list[str]:
    return [word.strip() for value in values or [] for word in value.split(",") if word.strip()]


def _integers(value: str | None) -> list[int]:
    try:
        return [int(word) for word in _words([value] if value else None)]
    except ValueError:
        raise InputError(f"--columns {value}: give key positions, e.g. 9 or 3,4,-1") from None


def _bindings(values: list[str] | None) -> dict[str, str]:
    pairs = [value.partition("=") for value in values or []]
    if any(not name or not sign or not target for name, sign, target in pairs):
        raise InputError("--bind takes NAME=VALUE: a detector input and a value of the model")
    return {name: target for name, _, target in pairs}


class _ReportedError(CheckError):
    """A check failed whose result has been printed already."""


def main() -> None:
    """Run the command line; every error a user can cause is one sentence and an exit code."""
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # typer has swallowed the exception
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except AtpatchError as error:
        _fail(error, error.exit_code)
    except (
        typer.TyperException
    ) as error:  # usage: an unknown option, a missing argument, a wrong type
        _fail(InputError(_usage(error)), 2)
    except (KeyboardInterrupt, typer.Abort):
        _say("interrupted; nothing was written")
        sys.exit(INTERRUPTED)


def _usage(error: typer.TyperException) -> str:
    """What is wrong with the command line, with the value that is wrong."""
    message = one_sentence(error.format_message()).rstrip(".")
    options = getattr(getattr(error, "param", None), "opts", [])
    given = [sys.argv[i + 1] for i, word in enumerate(sys.argv[:-1]) if word in options]
    return f"{message}: found '{given[-1]}'" if given and given[-1] not in message else message


def _fail(error: AtpatchError, code: int) -> NoReturn:
    if "--json" in sys.argv and not isinstance(error, _ReportedError):
        problem = {"error": {"kind": type(error).__name__, "message": str(error)}}
        sys.stdout.write(json.dumps(problem, indent=1) + "\n")
    _say(f"error: {error}")
    sys.exit(code)


def _say(text: str) -> None:
    """One line to the error stream, as it is: names in it are not markup."""
    err.print(text, soft_wrap=True, markup=False, highlight=False, emoji=False)

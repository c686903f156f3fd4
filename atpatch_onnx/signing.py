"""Signatures over a release: model, patch, detector, certificate and external weights in one.

OpenSSF `model-signing` makes and checks them: a Sigstore bundle with a DSSE envelope around an
in-toto statement that lists every file with its SHA-256. Here it is decided what has to be in the
list, and that what is used is in it.

Source: https://github.com/sigstore/model-transparency (predicate `model_signing/signature/v1.0`).
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .certificate import Check
from .errors import AtpatchError, InputError, RefusedError, first_line
from .files import check_output, write_file
from .release_set import check_consistent, companions, weights_of
from .trust import KEYLESS, Trust, module, read, signer

PathLike = str | Path
SIGNATURE = "model.sig"
"""Name of a signature, in the folder whose files it is for; the default of model-signing too."""


@dataclass(frozen=True)
class Signed:
    """A signature and the files that it is for, relative to `folder`; SHA-256 by name."""

    signature: Path
    folder: Path
    files: dict[str, str]


def sign(
    paths: Sequence[PathLike],
    *,
    key: PathLike | None = None,
    certificate: PathLike | None = None,
    chain: Sequence[PathLike] = (),
    password: str | None = None,
    keyless: bool = False,
    identity_token: str | None = None,
    signature: PathLike | None = None,
    force: bool = False,
) -> Signed:
    """Sign a folder with everything in it, or files of one folder.

    Of files, their external weights and the certificates beside them are signed with them.

    key: PEM file with a private key (elliptic curve); password: what it is encrypted with.
    certificate, chain: PEM files: the certificate of the key, and those between it and an
        authority.
    keyless: by an identity, through Sigstore (needs a network); identity_token: an OpenID token, by
        default that of the environment or of a browser.
    signature: by default `model.sig` in the folder; elsewhere only above the files.
    Raises: InputError; RefusedError for a patch or certificate of another model.
    """
    if (key is not None) + keyless != 1 or (certificate is not None and key is None):
        raise InputError(
            "sign with one of: a private key (--key), a private key and its certificate (--key, "
            "--certificate), or an identity (--keyless)"
        )
    given = None if signature is None else Path(signature)
    folder, files = _gathered([Path(path) for path in paths], given and given.parent)
    target = given or folder / SIGNATURE
    files = [path for path in files if not (target.exists() and path.samefile(target))]
    if not files:
        raise InputError(f"{folder} has no files to sign: give a model, a patch or their folder")
    used = [Path(p) for p in (key, certificate, *chain) if p is not None]
    inside = next((p for p in used if any(_same(p, file) for file in files)), None)
    if inside is not None:
        raise InputError(f"{inside} would be signed with the model: keep keys in another folder")
    check_output(target, [*files, *used], force=force)
    check_consistent(folder, files)
    config = signer(key, certificate, chain, password, identity_token)
    content = _signed(config, folder, files, _rest(folder, files, target))
    write_file(target, content)
    return Signed(target, folder, _listed(content, target))


def require_signature(
    paths: Sequence[PathLike], key: PathLike, *, signature: PathLike | None = None
) -> list[Signed]:
    """Refuse to go on unless every file of `paths` is signed by `key` and unaltered.

    External weights of models count as given. All other files that the same signature is for must
    be there and unaltered too, and patches and certificates among them belong to the models among
    them. For a folder, there may be no file in it that is not signed.

    key: see `trust.Trust.of`.
    signature: by default `model.sig` in the folder of each file, or in the nearest above it.
    Returns the signatures. Raises: RefusedError, InputError.
    """
    trust = Trust.of(key)
    needed = [Path(path) for path in paths]
    found: dict[Path, list[Path]] = {}
    for path in needed:
        if not path.exists():
            raise InputError(f"{path} does not exist: give the file or folder that was signed")
        place = Path(signature) if signature is not None else _signature_of(path)
        found.setdefault(place, []).append(path)
    return [_verified(place, members, trust) for place, members in found.items()]


def check_signature(
    key: PathLike | None, paths: Sequence[PathLike], signature: PathLike | None
) -> Check:
    """Whether a signature, by default that of `paths`, is by `key`, for them and for its folder.

    Raises: InputError where the key is missing, or neither a signature nor files are given.
    """
    if key is None:
        raise InputError("--signature needs --key: the public key or certificate of who signed")
    if signature is None and not paths:
        raise InputError("--key needs --signature FILE, or MODEL and PATCHED")
    try:
        place = _signature_of(Path(paths[0])) if signature is None else Path(signature)
        found = require_signature([place.parent, *paths], key, signature=place)
    except RefusedError as error:
        return Check("signature", False, str(error))
    count = sum(len(signed.files) for signed in found)
    return Check("signature", True, f"{count} files are as {key} signed them, and no others there")


def _verified(signature: Path, needed: list[Path], trust: Trust) -> Signed:
    """Check one signature and that it is for what is needed."""
    folder = signature.parent
    content = read(signature, "the signature")
    strict = any(path.is_dir() for path in needed)
    config = trust.verifier().set_ignore_unsigned_files(not strict)
    # Its default passes over what git keeps, which can hold weights as well as any other file.
    hashing = module("hashing").Config()
    config.set_hashing_config(
        hashing.set_ignored_paths(paths=[signature.name] if strict else [], ignore_git_paths=False)
    )
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        # What is checked is what is read below, whoever writes to the folder meanwhile.
        copy = Path(scratch) / SIGNATURE
        copy.write_bytes(content)
        try:
            config.verify(folder, copy)
        except Exception as error:  # model-signing, cryptography, OpenSSL and Sigstore raise theirs
            raise RefusedError(_why(signature, trust, error)) from None
    signed = Signed(signature, folder, _listed(content, signature))
    for path in (path for path in needed if not path.is_dir()):
        if _relative(path, folder) not in signed.files:
            raise RefusedError(
                f"{path} is not among the files that {signature} is for: sign it, or use the "
                "signed one"
            )
    members = [folder / name for name in signed.files]
    for member in members:
        for weights in weights_of(member):
            if _relative(weights, folder) not in signed.files:
                raise RefusedError(
                    f"{weights}, which {member} reads, is not among the files that {signature} is "
                    "for: sign the model again with its weights"
                )
    check_consistent(folder, members)
    return signed


def _why(signature: Path, trust: Trust, error: Exception) -> str:
    """One sentence about what is wrong with a signature."""
    text = " ".join(str(error).split()) or type(error).__name__
    who = f"{KEYLESS}{trust.identity}" if trust.key is None else str(trust.key)
    if "Signature mismatch" in text or "Cannot use" in text:
        what = text.removeprefix("Signature mismatch: ").strip("[]\"' ").rstrip(".")
        # The library prints raw digests of each.
        altered = re.findall(r"Hash mismatch for '(.+?)':", what.replace("\\'", "'"))
        if altered:
            what = f"altered: {', '.join(altered)}"
        return (
            f"{signature} does not hold for its folder ({what[:300]}): take a fresh copy of what "
            "was signed, or sign it again"
        )
    return (
        f"{signature} is not a signature of {who} ({first_line(error)}): check the key, and take a "
        "fresh copy of the signature"
    )


def _signature_of(path: Path) -> Path:
    """The nearest signature: in the folder of `path`, or above it. Raises: RefusedError."""
    start = path if path.is_dir() else path.parent
    for folder in (start, *start.absolute().parents):
        if (folder / SIGNATURE).is_file():
            return folder / SIGNATURE
    raise RefusedError(
        f"{path} is not signed: there is no {SIGNATURE} beside it or above; sign it with "
        "atpatch-onnx sign, or leave --require-signature out"
    )


def _gathered(paths: Sequence[Path], given: Path | None) -> tuple[Path, list[Path]]:
    """What to sign: the folder, and the files in it. Raises: InputError."""
    missing = next((path for path in paths if not path.exists()), None)
    if missing is not None or not paths:
        raise InputError(f"{missing or 'nothing'} cannot be signed: give a folder, or files of one")
    if len(paths) == 1 and paths[0].is_dir():
        if given is not None and not _same(given, paths[0]):
            raise InputError(f"--signature: the signature of {paths[0]} lies in that folder")
        return paths[0], list(_files_of(paths))
    if any(path.is_dir() for path in paths):
        raise InputError("sign takes one folder, or files of one folder: give only one of these")
    folder = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    shown = given or next((path.parent for path in paths if _same(path.parent, folder)), folder)
    files = [companion for path in paths for companion in companions(path)]
    outside = next((path for path in files if _relative(path, shown) is None), None)
    if outside is not None:
        raise InputError(f"{outside} lies outside of {shown}: sign the folder that holds both")
    return shown, [shown / str(_relative(path, shown)) for path in dict.fromkeys(files)]


def _files_of(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        yield from sorted(p for p in path.rglob("*") if not p.is_dir()) if path.is_dir() else [path]


def _rest(folder: Path, files: list[Path], target: Path) -> list[Path]:
    """What else lies in the folder: it is named in the signature as not signed."""
    signed = set(files)
    above = {parent for path in files for parent in path.parents}

    def walk(place: Path) -> Iterator[Path]:
        for entry in sorted(place.iterdir()):
            if entry in above and not entry.is_symlink():
                yield from walk(entry)
            elif entry not in signed and entry != target:
                yield entry

    return [entry.relative_to(folder) for entry in walk(folder)]


def _signed(config: Any, folder: Path, files: list[Path], rest: list[Path]) -> bytes:
    """The signature over `files`; `rest` is named in it as left out."""
    base = module("hashing").Config

    class Chosen(base):  # type: ignore[misc, valid-type]
        """Hashes the files that were chosen, instead of all that lie in the folder."""

        def hash(self, model_path: Any, *, files_to_hash: Any = None) -> Any:
            del files_to_hash
            return super().hash(model_path, files_to_hash=files)

    hashing = Chosen().set_ignored_paths(paths=rest, ignore_git_paths=False)
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        target = Path(scratch) / SIGNATURE
        try:
            config.set_hashing_config(hashing).sign(folder, target)
        except AtpatchError:
            raise
        except Exception as error:  # files that are links; Sigstore without a network
            raise InputError(
                f"cannot sign {folder}: {first_line(error)}: give real files, and for --keyless a "
                "network and an identity"
            ) from None
        return target.read_bytes()


def _listed(content: bytes, signature: Path) -> dict[str, str]:
    """The files and digests of a signature that has been checked. Raises: RefusedError."""
    try:
        envelope = json.loads(content)["dsseEnvelope"]
        predicate = json.loads(base64.b64decode(envelope["payload"]))["predicate"]
        if predicate["serialization"]["method"] != "files":
            raise ValueError("it is over shards of files")
        return {entry["name"]: entry["digest"] for entry in predicate["resources"]}
    except (ValueError, KeyError, TypeError) as error:
        raise RefusedError(
            f"{signature} does not list files ({first_line(error)}): sign with atpatch-onnx sign"
        ) from None


def signed_files(signature: Path) -> dict[str, str]:
    """What a signature lists, whoever made it. Raises: RefusedError, InputError."""
    return _listed(read(signature, "the signature"), signature)


def _relative(path: Path, folder: Path) -> str | None:
    """The name of a file in a signature of `folder`: by where it is reached, links not followed."""
    place = path.parent.resolve() / path.name
    root = folder.resolve()
    return place.relative_to(root).as_posix() if place.is_relative_to(root) else None


def _same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)

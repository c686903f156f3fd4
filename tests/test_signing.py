"""Signatures: nothing that is unsigned, altered, missing, foreign or stale gets past them."""

from __future__ import annotations

import datetime
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atpatch_onnx import InputError, RefusedError, api, cli, require_signature, sign
from atpatch_onnx.signing import SIGNATURE, check_signature
from atpatch_onnx.trust import Trust

from releases import WEIGHTS, make_release

hashing = pytest.importorskip("model_signing.hashing", reason="needs the [sign] extra")
signing = pytest.importorskip("model_signing.signing", reason="needs the [sign] extra")
x509 = pytest.importorskip("cryptography.x509")
from cryptography.hazmat.primitives import hashes, serialization  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec  # noqa: E402

FILES = ("model.onnx", "model.patched.onnx", "model.patched.certificate.json", "det.onnx")
SIGNED = (*FILES, "fix.atpatch", WEIGHTS)
MANY = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def save_key(path: Path, curve: ec.EllipticCurve, password: str = "") -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(curve)
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    secret: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password:
        secret = serialization.BestAvailableEncryption(password.encode())
    path.write_bytes(key.private_bytes(pem, pkcs8, secret))
    public = serialization.PublicFormat.SubjectPublicKeyInfo
    path.with_suffix(".pub").write_bytes(key.public_key().public_bytes(pem, public))
    return key


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`mine.pem`, `mine.pub`, and another's."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("mine", "other"):
        save_key(folder / f"{name}.pem", ec.SECP256R1())
    return folder


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory, keys: Path) -> Path:
    """A signed release; tests that alter it put it back."""
    folder = make_release(tmp_path_factory.mktemp("release") / "digits")
    found = sign([folder], key=keys / "mine.pem")
    assert set(found.files) == set(SIGNED)
    return folder


@pytest.fixture
def release(signed: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(signed, tmp_path / "copy"))


def used(folder: Path) -> list[Path]:
    """What `apply` reads."""
    return [folder / "model.onnx", folder / "fix.atpatch"]


def refuses(paths: list[Path], key: Path, match: str | None = None) -> None:
    with pytest.raises(RefusedError, match=match):
        require_signature(paths, key)


def test_what_was_signed_passes(signed: Path, keys: Path) -> None:
    for paths in ([signed], used(signed), [signed / name for name in SIGNED]):
        (found,) = require_signature(paths, keys / "mine.pub")
        assert set(found.files) == set(SIGNED)


@MANY
@given(st.sampled_from(SIGNED), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_any_altered_byte_is_refused(
    signed: Path, keys: Path, name: str, where: float, flip: int
) -> None:
    path = signed / name
    content = path.read_bytes()
    offset = int(where * len(content))
    altered = content[:offset] + bytes([content[offset] ^ flip]) + content[offset + 1 :]
    try:
        path.write_bytes(altered)
        told = rf"does not hold for its folder \(altered: {re.escape(name)}\)"
        refuses(used(signed), keys / "mine.pub", told)
        refuses([signed], keys / "mine.pub", told)
    finally:
        path.write_bytes(content)
    require_signature([signed], keys / "mine.pub")


@settings(MANY, max_examples=40)
@given(st.sampled_from(SIGNED), st.integers(-3, 3).filter(bool))
def test_a_shorter_or_longer_file_is_refused(
    signed: Path, keys: Path, name: str, size: int
) -> None:
    path = signed / name
    content = path.read_bytes()
    try:
        path.write_bytes(content + bytes(size) if size > 0 else content[:size])
        refuses(used(signed), keys / "mine.pub")
    finally:
        path.write_bytes(content)


@settings(MANY, max_examples=50)
@given(st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_an_altered_signature_never_says_something_else(
    signed: Path, keys: Path, where: float, flip: int
) -> None:
    """A byte that Base64 or JSON does not care about may pass; what is signed stays the same."""
    path = signed / SIGNATURE
    content = bytearray(path.read_bytes())
    listed = require_signature([signed], keys / "mine.pub")[0].files
    kept = bytes(content)
    content[int(where * len(content))] ^= flip
    try:
        path.write_bytes(content)
        try:
            (found,) = require_signature([signed], keys / "mine.pub")
        except RefusedError:
            return
        assert found.files == listed
    finally:
        path.write_bytes(kept)


@settings(MANY, max_examples=30)
@given(st.sampled_from(SIGNED))
def test_a_missing_file_is_refused(signed: Path, keys: Path, name: str) -> None:
    away = signed.parent / "away"
    (signed / name).rename(away)
    try:
        refuses([signed], keys / "mine.pub")
        if (signed / name) not in used(signed):
            refuses(used(signed), keys / "mine.pub", "does not hold")
    finally:
        away.rename(signed / name)


@pytest.mark.parametrize(
    "name", ["more.onnx", ".hidden", ".gitignore", ".git/config", "weights/more.data", "a/b/c"]
)
def test_an_extra_file_is_refused(release: Path, keys: Path, name: str) -> None:
    (release / name).parent.mkdir(parents=True, exist_ok=True)
    (release / name).write_bytes(b"x")
    refuses([release], keys / "mine.pub", "Extra files")
    refuses([release / name], keys / "mine.pub")


def test_a_file_that_the_signature_is_not_for_is_refused(release: Path, keys: Path) -> None:
    api.apply(*used(release), output=release / "out.onnx")
    require_signature(used(release), keys / "mine.pub")
    refuses([release / "out.onnx"], keys / "mine.pub", "is not among the files")


def test_a_link_in_place_of_a_file_is_refused(release: Path, keys: Path) -> None:
    for name in ("fix.atpatch", WEIGHTS):
        moved = release.parent / Path(name).name
        (release / name).rename(moved)
        (release / name).symlink_to(moved)
        refuses(used(release), keys / "mine.pub")
        (release / name).unlink()
        moved.rename(release / name)


def test_files_that_changed_places_are_refused(release: Path, keys: Path) -> None:
    for one, other in (("model.onnx", "model.patched.onnx"), ("det.onnx", "fix.atpatch")):
        a, b = (release / one).read_bytes(), (release / other).read_bytes()
        (release / one).write_bytes(b)
        (release / other).write_bytes(a)
        refuses(used(release), keys / "mine.pub")
        (release / one).write_bytes(a)
        (release / other).write_bytes(b)


def test_without_a_signature_nothing_passes(release: Path, keys: Path) -> None:
    (release / SIGNATURE).unlink()
    refuses(used(release), keys / "mine.pub", "is not signed")
    (release / SIGNATURE).write_text("{}")
    refuses(used(release), keys / "mine.pub")


def test_another_key_is_refused(release: Path, keys: Path) -> None:
    refuses(used(release), keys / "other.pub", "is not a signature of")
    sign([release], key=keys / "other.pem", force=True)
    refuses(used(release), keys / "mine.pub", "is not a signature of")


def test_external_weights_must_be_signed_too(release: Path, keys: Path) -> None:
    """Signed by hand with model-signing, without the weights that the model reads."""
    ignored = hashing.Config().set_ignored_paths(paths=[SIGNATURE, "weights"])
    signer = signing.Config().use_elliptic_key_signer(private_key=keys / "mine.pem")
    signer.set_hashing_config(ignored).sign(release, release / SIGNATURE)
    refuses(used(release), keys / "mine.pub", "ext.data")
    refuses([release], keys / "mine.pub", "ext.data")


def test_of_files_their_weights_and_certificates_are_signed(release: Path, keys: Path) -> None:
    (release / SIGNATURE).unlink()
    (release / "notes.txt").write_text("not part of it")
    found = sign([release / "model.patched.onnx", release / "fix.atpatch"], key=keys / "mine.pem")
    wanted = {"model.patched.onnx", "model.patched.certificate.json", "fix.atpatch", WEIGHTS}
    assert set(found.files) == wanted
    require_signature([release / "fix.atpatch"], keys / "mine.pub")
    require_signature([release], keys / "mine.pub")  # what lay there is named as not signed
    refuses([release / "model.onnx"], keys / "mine.pub", "is not among the files")
    (release / "new.txt").write_text("x")
    refuses([release], keys / "mine.pub", "Extra files")


def test_a_stale_patch_is_refused(release: Path, keys: Path, tmp_path: Path) -> None:
    """An older patch by the same person: by digest, and where the whole set is signed anew."""
    other = make_release(tmp_path / "other", external=False)
    model = onnx.load(other / "model.onnx")
    model.producer_name = "retrained"
    onnx.save(model, other / "model.onnx")
    refuses(used(release), keys / "other.pub")
    with pytest.raises(RefusedError, match="stale"):
        sign([other / "model.onnx", other / "fix.atpatch"], key=keys / "mine.pem")
    shutil.copy(other / "fix.atpatch", release / "fix.atpatch")
    refuses(used(release), keys / "mine.pub", "does not hold")
    with pytest.raises(RefusedError, match="stale"):
        sign([release], key=keys / "mine.pem", force=True)
    _sign_by_hand(release, keys)
    refuses(used(release), keys / "mine.pub", "stale")


def test_a_stale_certificate_is_refused(release: Path, keys: Path) -> None:
    path = release / "model.patched.certificate.json"
    claimed = json.loads(path.read_text())
    claimed["result"]["sha256"] = "0" * 64
    path.write_text(json.dumps(claimed))
    with pytest.raises(RefusedError, match="not the certificate"):
        sign([release], key=keys / "mine.pem", force=True)
    _sign_by_hand(release, keys)
    refuses(used(release), keys / "mine.pub", "not the certificate")


def _sign_by_hand(folder: Path, keys: Path) -> None:
    signer = signing.Config().use_elliptic_key_signer(private_key=keys / "mine.pem")
    ignored = hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)
    signer.set_hashing_config(ignored).sign(folder, folder / SIGNATURE)


def test_apply_writes_nothing_from_altered_files(release: Path, keys: Path) -> None:
    public = keys / "mine.pub"
    weights = bytearray((release / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (release / WEIGHTS).write_bytes(weights)
    with pytest.raises(RefusedError):
        api.apply(*used(release), output=release / "out.onnx", require_signature=public)
    assert not (release / "out.onnx").exists()
    weights[-1] ^= 1
    (release / WEIGHTS).write_bytes(weights)
    api.apply(*used(release), output=release / "out.onnx", require_signature=public)
    found, wanted = release / "out.onnx", release / "model.patched.onnx"
    assert found.read_bytes() == wanted.read_bytes()


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1()])
def test_other_curves_and_passwords(release: Path, tmp_path: Path, curve: ec.EllipticCurve) -> None:
    save_key(tmp_path / "own.pem", curve, "secret")
    with pytest.raises(InputError, match="password"):
        sign([release], key=tmp_path / "own.pem", force=True)
    with pytest.raises(InputError, match="password"):
        sign([release], key=tmp_path / "own.pem", password="wrong", force=True)
    sign([release], key=tmp_path / "own.pem", password="secret", force=True)
    require_signature([release], tmp_path / "own.pub")


def test_a_certificate_is_believed_by_its_authority(release: Path, tmp_path: Path) -> None:
    for name in ("root", "leaf", "stranger"):
        save_key(tmp_path / f"{name}.pem", ec.SECP256R1())
    for issuer, subject in (("root", "root"), ("root", "leaf"), ("stranger", "stranger")):
        _certify(tmp_path, issuer, subject)
    leaf = {"key": tmp_path / "leaf.pem", "certificate": tmp_path / "leaf.crt"}
    sign([release], **leaf, force=True)  # type: ignore[arg-type]
    require_signature([release], tmp_path / "root.crt")
    refuses([release], tmp_path / "stranger.crt")
    refuses([release], tmp_path / "leaf.pub")
    with pytest.raises(InputError):
        sign([release], key=tmp_path / "root.pem", certificate=tmp_path / "leaf.crt", force=True)


def _certify(folder: Path, issuer: str, subject: str) -> None:
    def name(text: str) -> Any:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    own, signing = (
        serialization.load_pem_private_key((folder / f"{who}.pem").read_bytes(), None)
        for who in (subject, issuer)
    )
    now = datetime.datetime.now(datetime.UTC)
    root = issuer == subject
    usage = [n == "digital_signature" or (root and n == "key_cert_sign") for n in _USAGES]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name(issuer))
        .public_key(own.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=root, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**dict(zip(_USAGES, usage, strict=True))), critical=True)
        .sign(signing, hashes.SHA256())
    )
    content = certificate.public_bytes(serialization.Encoding.PEM)
    (folder / f"{subject}.crt").write_bytes(content)


_USAGES = (
    "digital_signature content_commitment key_encipherment data_encipherment key_agreement "
    "key_cert_sign crl_sign encipher_only decipher_only"
).split()


@pytest.mark.parametrize(
    ("key", "match"),
    [
        ("mine.pem", "private key"),
        ("nothing.pub", "cannot read the key"),
        ("text.pub", "no public key"),
        ("rsa.pub", "no public key"),
    ],
)
def test_keys_that_cannot_be_used(signed: Path, keys: Path, key: str, match: str) -> None:
    from cryptography.hazmat.primitives.asymmetric import rsa

    (keys / "text.pub").write_text("hello")
    public = rsa.generate_private_key(65537, 2048).public_key()
    pem, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    (keys / "rsa.pub").write_bytes(public.public_bytes(pem, form))
    with pytest.raises(InputError, match=match):
        require_signature([signed], keys / key)


def test_an_identity_is_read() -> None:
    trust = Trust.of("keyless:me@example.org,https://accounts.google.com")
    assert (trust.identity, trust.issuer) == ("me@example.org", "https://accounts.google.com")
    with pytest.raises(InputError, match="IDENTITY,ISSUER"):
        Trust.of("keyless:me@example.org")


def test_sigstore_out_of_reach(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network: one sentence, and the signature that was there stays."""
    verifying = pytest.importorskip("model_signing.verifying")
    kept = (release / SIGNATURE).read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(signing.Config, "use_sigstore_signer", fail)
    monkeypatch.setattr(verifying.Config, "use_sigstore_verifier", fail)
    with pytest.raises(InputError, match="check the network"):
        sign([release], keyless=True, force=True)
    with pytest.raises(InputError, match="check the network"):
        require_signature([release], "keyless:me@example.org,https://accounts.google.com")
    assert (release / SIGNATURE).read_bytes() == kept


def test_what_cannot_be_signed(release: Path, keys: Path, tmp_path: Path) -> None:
    key = keys / "mine.pem"
    for paths, match in (
        ([], "cannot be signed"),
        ([tmp_path / "none"], "cannot be signed"),
        ([release, release / "model.onnx"], "one folder"),
        ([tmp_path / "empty"], "no files"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=match):
            sign(paths, key=key, force=True)
    with pytest.raises(InputError, match="--force"):
        sign([release], key=key)
    with pytest.raises(InputError, match="sign with one of"):
        sign([release])
    with pytest.raises(InputError, match="sign with one of"):
        sign([release], key=key, keyless=True)
    (release / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="exists already"):
        sign([release / "det.onnx"], key=key, signature=release / "notes.txt")
    shutil.copy(key, release / "key.pem")
    with pytest.raises(InputError, match="another folder"):
        sign([release], key=release / "key.pem", force=True)


def test_a_missing_library_is_said_with_its_extra(
    signed: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(sys.modules):
        if name.startswith(("OpenSSL", "model_signing")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "OpenSSL", None)
    with pytest.raises(InputError, match=r"atpatch-onnx\[sign\]"):
        require_signature([signed], keys / "mine.pub")


def test_verify_checks_the_signature_with_the_certificate(release: Path, keys: Path) -> None:
    model, patched = release / "model.onnx", release / "model.patched.onnx"
    key = keys / "mine.pub"
    checks = api.verify(model, patched, key=key)
    assert checks[0].name == "signature"
    assert all(check.passed for check in checks)
    (release / "extra").write_text("x")
    assert not api.verify(signature=release / SIGNATURE, key=key)[0].passed
    for options in ({"signature": release / SIGNATURE}, {"key": key}):
        with pytest.raises(InputError):
            api.verify(**options)  # type: ignore[arg-type]
    with pytest.raises(InputError):
        check_signature(None, [], release / SIGNATURE)


@pytest.fixture
def shell(
    release: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[object]:
    monkeypatch.chdir(release.parent)

    def call(line: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["atpatch-onnx", *line.split()])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed = capsys.readouterr()
        return int(stopped.value.code or 0), printed.out + printed.err

    return call  # type: ignore[return-value]


def test_the_command_line(
    shell: object, release: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(shell)
    public = keys / "mine.pub"
    gate = f"apply copy/model.onnx copy/fix.atpatch -o copy/out.onnx --require-signature {public}"
    monkeypatch.setenv("SECRET", "secret")
    save_key(release.parent / "own.pem", ec.SECP256R1(), "secret")
    code, text = shell("sign copy --key own.pem --password-env SECRET --json --force")
    assert code == 0
    assert set(json.loads(text)["files"]) == set(SIGNED)
    assert shell(gate)[0] == 3
    assert shell("sign copy --force --key own.pem --password-env NOTHING")[0] == 2
    assert shell(f"sign copy --force --key {keys / 'mine.pem'}")[0] == 0
    code, text = shell(f"verify --signature copy/model.sig --key {public}")
    assert (code, "passed" in text) == (0, True)
    assert shell(gate)[0] == 0
    code, text = shell(f"verify --signature copy/model.sig --key {public}")
    assert (code, "out.onnx" in text) == (1, True)
    assert shell("verify")[0] == 2


@pytest.mark.slow
def test_model_signing_itself_checks_what_was_signed(signed: Path, keys: Path) -> None:
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(signed)]
    command += ["--signature", str(signed / SIGNATURE), "--public_key", str(keys / "mine.pub")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

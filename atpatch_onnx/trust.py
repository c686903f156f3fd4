"""Who signs and who is believed: keys, certificates of authorities, identities.

The cryptography is that of OpenSSF `model-signing`, which needs pyOpenSSL without saying so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import InputError, first_line, reason

PathLike = str | Path

KEYLESS = "keyless:"
"""Begins an identity where a key could stand."""


@dataclass(frozen=True)
class Trust:
    """Who is believed: the holder of a key, whom an authority certified, or an identity.

    key: PEM file with a public key (elliptic curve), or with certificates of authorities.
    identity, issuer: of a keyless signature: an e-mail address or workflow, and who vouches for it.
    """

    key: Path | None = None
    identity: str = ""
    issuer: str = ""

    @classmethod
    def of(cls, text: PathLike) -> Trust:
        """From what users give: a PEM file, or `keyless:IDENTITY,ISSUER`. Raises: InputError."""
        if str(text).startswith(KEYLESS):
            identity, _, issuer = str(text).removeprefix(KEYLESS).partition(",")
            if not identity or not issuer:
                raise InputError(
                    f"{text}: give keyless:IDENTITY,ISSUER, e.g. "
                    "keyless:me@example.org,https://accounts.google.com"
                )
            return cls(identity=identity, issuer=issuer)
        return cls(key=Path(text))

    def verifier(self) -> Any:
        """A `model_signing` configuration that believes this. Raises: InputError."""
        config = module("verifying").Config()
        if self.key is None:
            try:
                return config.use_sigstore_verifier(identity=self.identity, oidc_issuer=self.issuer)
            except Exception as error:  # Sigstore and its HTTP client have no common base
                raise _no_sigstore(error) from None
        content = read(self.key, "the key")
        try:
            if b"BEGIN CERTIFICATE" in content:
                return config.use_certificate_verifier(certificate_chain=[self.key])
            if b"PRIVATE KEY" in content:
                raise InputError(
                    f"{self.key} is a private key, which signs: give its public key "
                    f"(openssl ec -in {self.key} -pubout -out {self.key.stem}.pub)"
                )
            return config.use_elliptic_key_verifier(public_key=self.key)
        except InputError:
            raise
        except Exception as error:  # cryptography and OpenSSL have no common base
            raise InputError(
                f"{self.key} is no public key or certificate that can be used "
                f"({first_line(error)}): give a PEM file with a key on P-256, P-384 or P-521"
            ) from None


def signer(
    key: PathLike | None,
    certificate: PathLike | None,
    chain: Sequence[PathLike],
    password: str | None,
    identity_token: str | None,
) -> Any:
    """A `model_signing` configuration that signs; without a key, as an identity.

    The arguments are those of `signing.sign`. Raises: InputError.
    """
    config = module("signing").Config()
    for path in (key, certificate, *chain):
        if path is not None:
            read(Path(path), "the key or certificate")
    if key is None:
        ambient = identity_token is None
        try:
            return config.use_sigstore_signer(
                identity_token=identity_token, use_ambient_credentials=ambient
            )
        except Exception as error:  # Sigstore and its HTTP client have no common base
            raise _no_sigstore(error) from None
    try:
        if certificate is not None:
            # It cannot read a chain of none.
            links = list(chain) or [certificate]
            return config.use_certificate_signer(
                private_key=key, signing_certificate=certificate, certificate_chain=links
            )
        # It hands the password on as it is, and cryptography wants bytes.
        secret: Any = None if password is None else password.encode()
        return config.use_elliptic_key_signer(private_key=key, password=secret)
    except Exception as error:  # cryptography and OpenSSL have no common base
        raise InputError(
            f"cannot sign with {key}: {first_line(error)}: give a private key on "
            "P-256, P-384 or P-521 in PEM (openssl ecparam -name prime256v1 -genkey -noout), its "
            "password with --password-env, and the certificate of that key"
        ) from None


def _no_sigstore(error: Exception) -> InputError:
    return InputError(
        f"keyless signatures need Sigstore's servers ({first_line(error)}): check the network, or "
        "use a key"
    )


def read(path: Path, what: str) -> bytes:
    """The content of a file; `what` it is, for people. Raises: InputError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {what} {path}: {reason(error)}") from None


def module(name: str) -> ModuleType:
    """A module of model-signing. Raises: InputError where the extra is missing."""
    try:
        return import_module(f"model_signing.{name}")
    except ImportError as error:
        raise InputError(
            f"signatures need {error.name}: pip install 'atpatch-onnx[sign]'"
        ) from None

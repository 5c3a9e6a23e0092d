"""Pseudonyms: HMAC-SHA256 under a secret, so that nobody without it can test whether a known name is in the set."""

import hmac
import os
import secrets
from pathlib import Path

from tracekin.config import UserError

DIGITS = 32  # 128 bits: no collision among any number of images


def pseudonym(secret: bytes, kind: str, name: str) -> str:
    """Hexadecimal HMAC-SHA256 of ``name``; ``kind`` keeps images, groups and recipes apart."""
    return hmac.digest(secret, f"tracekin/{kind}\0{name}".encode(), "sha256").hex()[:DIGITS]


def read_secret(path: Path | None) -> bytes:
    """The secret in ``path``; by default the user's own, made at first use with mode 600.

    Raises:
        UserError: the file is missing, unreadable or shorter than 16 bytes.
    """
    if path is None:
        path = default_secret()
        _make(path)
    try:
        secret = path.read_bytes().strip()
    except OSError as error:
        raise UserError(f"cannot read the secret {path}: {error.strerror}; name a file with --secret FILE.") from None
    if len(secret) < 16:
        raise UserError(f"the secret {path} has {len(secret)} bytes; accepted are 16 or more random ones.")
    return secret


def default_secret() -> Path:
    """``tracekin/secret`` in the user's configuration folder."""
    configuration = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(configuration) / "tracekin" / "secret"


def _make(path: Path) -> None:
    if path.exists():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"secret.{os.getpid()}")
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32) + "\n")
        try:
            os.link(temporary, path)  # fails where another process was first: its secret stands
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    except OSError as error:
        raise UserError(f"cannot make the secret {path}: {error.strerror}; name a file with --secret FILE.") from None

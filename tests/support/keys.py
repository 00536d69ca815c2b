"""EC key pairs for signed packages, made by openssl as an operator would make them."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class KeyPair:
    private: Path
    public: Path


def make_keys(folder: Path, name: str) -> KeyPair:
    """A P-256 pair: `NAME.pem` and `NAME.pub`."""
    pair = KeyPair(private=folder / f"{name}.pem", public=folder / f"{name}.pub")
    make = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(pair.private)]
    subprocess.run(make, check=True, capture_output=True, timeout=120)
    derive = ["openssl", "ec", "-in", str(pair.private), "-pubout", "-out", str(pair.public)]
    subprocess.run(derive, check=True, capture_output=True, timeout=120)
    return pair


def sign(package: Path, key: Path) -> None:
    """Signs a folder into its `model.sig`."""
    from model_signing import signing

    signing.Config().use_elliptic_key_signer(private_key=key).sign(package, package / "model.sig")

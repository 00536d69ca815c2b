"""Trust: signatures, and the policy for code in a package.

Owns the decision whether a package may run. It is made on the staged files before any of them gets its final name,
and can be made again from the same files at any time. Flow: signature → loader and its options (`mlmodel.py`,
`genai_files.py`, `transformers_options.py`) → which files are code → one of four rules:

1. If `trust.public_keys` is set, one of the keys must have signed the package, under its own name.
2. A package without code may run.
3. A package may run if its only code is a wrapper that this agent ships or has shipped.
4. Other code, pickles included, needs a signature or `trust.allow_unsigned_code`.

It refuses everything else, and names the file and the reason. Heavy libraries are imported only when needed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import stat
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path, PurePosixPath

from edge_agent import named_file
from edge_agent.errors import PolicyError, SettingsError, VerificationError, settings_error
from edge_agent.package import genai_files, mlmodel, requirements, transformers_options
from edge_agent.package.manifest import MANIFEST_NAME, SIGNATURE_NAME, Manifest
from edge_agent.package.mlmodel import CODE_LOADER, TRANSFORMERS_LOADER, MLmodel

WRAPPER = Path(__file__).parents[1] / "wrapper" / "genai_pyfunc.py"
SHIPPED_WRAPPERS: Mapping[str, str] = {
    "f16d85afa884bc6254858159ab65c43431194a1a66321f9c3e714a56daa07c31": "0.1.0",
}
"""sha256 of the wrappers of earlier releases → the first release that shipped it. Packages with these wrappers stay
trusted."""

_CODE_SUFFIXES = frozenset(
    (
        *(".py", ".pyw", ".pyd", ".pyz", ".so", ".dylib", ".dll", ".exe", ".sh"),
        *(".egg", ".whl", ".zip", ".jar", ".pth", ".pt", ".ckpt", ".h5", ".hdf5", ".keras"),
        *(".pkl", ".pickle", ".dill", ".cloudpickle", ".joblib"),
    )
)
"""Names of files that some loader runs or unpickles."""
_BYTECODE_SUFFIXES = frozenset((".pyc", ".pyo"))
_WEIGHT_SUFFIXES = frozenset((".onnx", ".data", ".safetensors", ".gguf"))
"""These files are not inspected: their readers run no code, and their first bytes can be anything."""
_PICKLE_STARTS = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))
_PROGRAM_STARTS = (b"\x7fELF", b"MZ\x90\x00", b"\xca\xfe\xba\xbe", b"\xcf\xfa\xed\xfe", b"#!")
_MAX_SIGNATURE_BYTES = 4 << 20
_MAX_KEY_BYTES = 1 << 20


class Rule(StrEnum):
    """Why a package may run."""

    NO_CODE = "no_code"
    SHIPPED_WRAPPER = "shipped_wrapper"
    SIGNED_CODE = "signed_code"
    UNSIGNED_CODE_ALLOWED = "unsigned_code_allowed"


@dataclass(frozen=True, kw_only=True)
class TrustDecision:
    """Why a package may run, kept in the version's record.

    Attributes:
        rule: one of `Rule`.
        signed_by: sha256 of the file of the configured key that signed every file; empty if none did.
        unsigned_code: the package runs code that nobody signed; the status says so.
        reason: one sentence for a person.
    """

    rule: str
    signed_by: str
    unsigned_code: bool
    reason: str

    @property
    def signed(self) -> bool:
        return bool(self.signed_by)


def decide(
    tree: Path,
    manifest: Manifest,
    *,
    registered_name: str,
    public_keys: Sequence[str] = (),
    allow_unsigned_code: bool = False,
) -> TrustDecision:
    """Applies the whole policy to a package on disk. Its files must already match its manifest.

    Args:
        tree: the package's folder; `manifest.json` and `model.sig` are in it if the package has them.
        registered_name: the registered name under which the version was fetched.
        public_keys: PEM files.

    Raises:
        PolicyError: the package may not run; the message names the file and the reason.
        VerificationError: the signature is wrong.
        SettingsError: a configured key cannot be used.
    """
    if manifest.name != registered_name:
        raise PolicyError(f"the package was made for {manifest.name!r}, not for {registered_name!r}")
    signed_by = check_signature(tree, manifest, public_keys) if public_keys else ""
    model = mlmodel.read(tree)
    paths = {file.path for file in manifest.files}
    for path in sorted(paths):
        if not stat.S_ISREG((tree / path).lstat().st_mode):
            raise PolicyError(f"{path!r} is not a regular file")
    mlmodel.check(model, paths)
    requirements.check(tree, paths)
    genai_files.check(tree, paths)
    if model.loader == TRANSFORMERS_LOADER:
        transformers_options.check(
            tree, paths, model_folder=str(model.flavor("transformers").get("model_binary"))
        )
    code = code_files(tree, manifest, model)
    decision = _rule(tree, model, code, signed_by=signed_by, allow_unsigned_code=allow_unsigned_code)
    if decision.rule == Rule.SHIPPED_WRAPPER:  # other code knows best what it loads
        genai_files.check_graphs(tree, paths)
    return decision


def code_files(tree: Path, manifest: Manifest, model: MLmodel) -> dict[str, str]:
    """The files that are code or may contain code: path → kind of code.

    Raises:
        PolicyError: a file is compiled Python. No rule allows it, since it could run instead of checked source.
    """
    found = {}
    for file in manifest.files:
        path = PurePosixPath(file.path.casefold())
        if "__pycache__" in path.parts or path.suffix in _BYTECODE_SUFFIXES:
            raise PolicyError(f"{file.path!r} is compiled Python, which is never allowed")
        kind = _code_kind(tree / file.path, path)
        if kind is None and model.loader == TRANSFORMERS_LOADER and path.suffix == ".bin":
            kind = "pickled weights"
        if kind:
            found[file.path] = kind
    return found


def still_holds(
    decision: TrustDecision, *, public_keys: Sequence[str] = (), allow_unsigned_code: bool = False
) -> bool:
    """True if a recorded decision is still valid under these settings; otherwise `decide` must be called again."""
    if public_keys and decision.signed_by not in {_fingerprint(key) for key in public_keys}:
        return False
    if decision.rule == Rule.SIGNED_CODE and not public_keys:
        return False
    return allow_unsigned_code or not decision.unsigned_code


def hold(
    decision: TrustDecision, *, public_keys: Sequence[str] = (), allow_unsigned_code: bool = False
) -> None:
    """Checks a recorded decision before a version runs: the settings may have become stricter since.

    Raises:
        PolicyError: the version may no longer run.
    """
    if not still_holds(decision, public_keys=public_keys, allow_unsigned_code=allow_unsigned_code):
        raise PolicyError(
            f"the version was accepted because of {decision.reason!r}, which [trust] no longer allows",
            remedy="publish a signed version, or change [trust] in the settings",
        )


def runs_own_code(decision: TrustDecision) -> bool:
    """True if the package runs code that this agent does not ship. Signed or not, it runs behind walls only."""
    return decision.rule not in (Rule.NO_CODE, Rule.SHIPPED_WRAPPER)


def runs_shipped_wrapper(decision: TrustDecision) -> bool:
    """True if the package's only code is a wrapper that this agent ships or has shipped."""
    return decision.rule == Rule.SHIPPED_WRAPPER


def check_signature(tree: Path, manifest: Manifest, public_keys: Sequence[str]) -> str:
    """Checks the OpenSSF Model Signing signature: one of the keys must have signed every file of the package.

    That includes the manifest, if there is one: it binds the signature to the model's name.

    Returns:
        sha256 of that key's file.

    Raises:
        PolicyError: the package, or a file in it, is not signed.
        VerificationError: the signature matches no configured key, or not these files.
        SettingsError: the extra `signing` is not installed, or a key cannot be read.
    """
    try:
        from model_signing import hashing, verifying  # takes 0.4 s, so only if keys are configured
    except ImportError as error:
        raise SettingsError(
            "trust.public_keys is set, but the library model-signing is not installed",
            remedy="install edge-agent[signing]",
        ) from error
    signature = tree / SIGNATURE_NAME
    if not signature.is_file():
        raise PolicyError("trust.public_keys is set, but the package is not signed")
    signed = _signed_files(signature)
    required = {file.path for file in manifest.files}
    if (tree / MANIFEST_NAME).exists():
        required.add(MANIFEST_NAME)
    if missing := sorted(required - signed):
        raise PolicyError(f"the signature does not cover {missing[0]!r}")
    reasons = []
    # model_signing logs an error for each key that does not match; but here every key is tried in turn.
    logging.getLogger("model_signing").setLevel(logging.CRITICAL)
    for key in public_keys:
        fingerprint = _fingerprint(key)
        # The manifest lists Git's files like all others, so the signature must cover them.
        files = hashing.Config().set_ignored_paths(paths=[signature], ignore_git_paths=False)
        config = verifying.Config().use_elliptic_key_verifier(public_key=key).set_hashing_config(files)
        try:
            config.verify(tree, signature)
            return fingerprint
        except Exception as error:  # noqa: BLE001 - on hostile input the library may raise anything
            reasons.append(f"{Path(key).name}: {error}"[:200])
    raise VerificationError(f"the package's signature matches no configured key ({'; '.join(reasons)})")


def claimed_signer(signature: bytes, public_keys: Sequence[str]) -> str:
    """The configured key that a signature names as its own, without a look at what it signs: nothing is shown by it.

    Returns:
        sha256 of that key's file; empty where it names none of them. `check_signature` refuses it then, or it is from a
        signer that names none.

    Raises:
        SettingsError: a key cannot be read.
    """
    try:
        hint = json.loads(signature)["verificationMaterial"]["publicKey"]["hint"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return next((_fingerprint(key) for key in public_keys if _hint(key) == hint), "")


def _hint(key: str) -> str:
    """How OpenSSF Model Signing names a key: sha256 of its PEM in the form that the library writes."""
    try:
        from cryptography.hazmat.primitives import serialization

        public = serialization.load_pem_public_key(named_file.read(Path(key), _MAX_KEY_BYTES))
    except (ImportError, OSError, ValueError):
        return ""  # check_signature says what is wrong with it
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()


def _rule(
    tree: Path, model: MLmodel, code: dict[str, str], *, signed_by: str, allow_unsigned_code: bool
) -> TrustDecision:
    by_whom = "signed by a configured key" if signed_by else "not signed"
    if not code and model.loader == TRANSFORMERS_LOADER:
        return TrustDecision(
            rule=Rule.NO_CODE, signed_by=signed_by, unsigned_code=False, reason=f"no code in it; {by_whom}"
        )
    only_wrapper = (
        model.loader == CODE_LOADER and set(code) == {model.code_file} and model.pyfunc.get("code") is None
    )
    if only_wrapper and is_shipped(tree / model.code_file):
        return TrustDecision(
            rule=Rule.SHIPPED_WRAPPER,
            signed_by=signed_by,
            unsigned_code=False,
            reason=f"its only code is this agent's own wrapper; {by_whom}",
        )
    if not code:
        raise PolicyError(f"the package has no code for its loader {model.loader!r}")
    what = ", ".join(f"{path} ({kind})" for path, kind in sorted(code.items())[:3])
    if signed_by:
        return TrustDecision(
            rule=Rule.SIGNED_CODE,
            signed_by=signed_by,
            unsigned_code=False,
            reason=f"other code, signed: {what}",
        )
    if allow_unsigned_code:
        return TrustDecision(
            rule=Rule.UNSIGNED_CODE_ALLOWED,
            signed_by="",
            unsigned_code=True,
            reason=f"other code, allowed by trust.allow_unsigned_code: {what}",
        )
    raise PolicyError(
        f"the package contains code that nobody signed: {what}",
        remedy="sign it and set trust.public_keys, or set trust.allow_unsigned_code = true",
    )


def _fingerprint(key: str) -> str:
    try:
        return hashlib.sha256(named_file.read(Path(key), _MAX_KEY_BYTES)).hexdigest()
    except OSError as error:
        raise settings_error(f"trust.public_keys: {key} cannot be read: {error.strerror}", error) from error


def is_shipped(path: Path) -> bool:
    """True if a code file is this agent's wrapper, of this or an earlier release, byte for byte."""
    with path.open("rb") as stream:  # of any size: a package may call anything its code
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest in SHIPPED_WRAPPERS:
        return True
    try:
        return digest == hashlib.sha256(WRAPPER.read_bytes()).hexdigest()
    except FileNotFoundError:
        return False


def _code_kind(file: Path, path: PurePosixPath) -> str | None:
    """The kind of code in a file, by its name or first bytes, or None. `path` is in lower case."""
    suffixes = {f".{part}" for part in path.name.split(".")[1:]}
    if code := suffixes & _CODE_SUFFIXES:
        return f"a {min(code)} file"
    if path.suffix in _WEIGHT_SUFFIXES:
        return None
    with file.open("rb") as stream:
        start = stream.read(8)
    if start.startswith(_PROGRAM_STARTS):
        return "a program"
    if start.startswith(_PICKLE_STARTS):
        return "a pickle"
    if start.startswith(b"PK") and zipfile.is_zipfile(file):
        return "an archive"
    return None


def _signed_files(signature: Path) -> set[str]:
    """The file names in the signature's statement. Trust them only after the signature is verified.

    Source: OpenSSF Model Signing v1.0, in-toto statement in a DSSE envelope, `predicate.resources[].name`.
    """
    if signature.stat().st_size > _MAX_SIGNATURE_BYTES:
        raise PolicyError(f"{SIGNATURE_NAME} has more than {_MAX_SIGNATURE_BYTES} bytes")
    try:
        envelope = json.loads(signature.read_bytes())["dsseEnvelope"]
        statement = json.loads(base64.b64decode(envelope["payload"], validate=True))
        predicate = statement["predicate"]
        if predicate["serialization"]["method"] != "files":
            raise ValueError("shards")
        return {str(resource["name"]) for resource in predicate["resources"]}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise VerificationError(f"{SIGNATURE_NAME} is not an OpenSSF Model Signing signature") from error

"""What looks like a secret in a file's content, whatever the file is called.

Forms that issuers publish so that they can be found, not guesses by entropy. Tensors are not
looked at; the header of a safetensors file is.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from compressor.errors import InputError

FORMS = {
    "a Hub access token": ("hf_ api_org_", r"\b(?:hf|api_org)_(?:oauth_|jwt_)?[A-Za-z0-9]{20,}"),
    "a private key": (
        "-----begin",
        r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----"
        r"(?:\s|\\[rn]|[A-Za-z0-9-]{1,20}: ?[^\n]{1,80}){1,9}[A-Za-z0-9+/=]{16}",
    ),
    "an AWS access key": ("akia asia", r"\b(?:AKIA|ASIA)[A-Z2-7]{16}\b"),
    "an AWS secret key": (
        "secret_access_key secretaccesskey",
        r"(?i:secret_?access_?key)\W{1,6}[A-Za-z0-9/+]{40}\b",
    ),
    "a GitHub token": (
        "ghp_ gho_ ghu_ ghs_ ghr_ github_pat_",
        r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})",
    ),
    "a GitLab token": ("glpat-", r"\bglpat-[\w-]{20,}"),
    "an API key (sk-)": ("sk-", r"\bsk-(?:[a-z]{2,10}[0-9]{0,3}-)?[A-Za-z0-9_-]{32,}"),
    "a Google API key": ("aiza", r"\bAIza[\w-]{35}"),
    "a Google access token": ("ya29.", r"\bya29\.[\w-]{20,}"),
    "a Slack token": ("xox", r"\bxox[abeoprs]-[\w-]{10,}"),
    "a package registry's token": (
        "npm_ pypi-",
        r"\b(?:npm_[A-Za-z0-9]{36}|pypi-AgE[\w-]{40,})",
    ),
    "a payment key": ("k_live_", r"\b[rs]k_live_[A-Za-z0-9]{16,}"),
    "an API key": (
        "nvapi- gsk_ r8_ dapi dop_v1_ sg.",
        r"\b(?:nvapi-[\w-]{40,}|gsk_[A-Za-z0-9]{40,}|r8_[A-Za-z0-9]{30,}"
        r"|dapi[0-9a-f]{32}|dop_v1_[0-9a-f]{64}|SG\.[\w-]{16,}\.[\w-]{16,})(?![\w-])",
    ),
    "a signed token (JWT)": ("eyj", r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{16,}"),
    "a Weights & Biases key": ("wandb_api_key", r"(?i:wandb_api_key)\W{1,6}[0-9a-f]{40}\b"),
    "a storage account key": ("accountkey=", r"\bAccountKey=[A-Za-z0-9+/]{40,}"),
    "a password in an address": (
        "://",
        r"://[^\s/:@\"'<>{}$]{1,64}:[^\s/:@\"'<>{}$*]{3,128}@[\w.-]+",
    ),
}
"""What it is → strings of which one is in it, in lower case, and its form."""
KNOWN = [
    (kind, [mark.encode() for mark in marks.split()], re.compile(form.encode()))
    for kind, (marks, form) in FORMS.items()
]
CHUNK = 1 << 22
OVERLAP = 4096
"""Bytes of a chunk that are looked at again with the next one."""


def find_secret(path: Path) -> str | None:
    """What kind of secret a file seems to hold, or None."""
    for data in _text(path):
        # Text in UTF-16 is the same with zeros in between.
        for form in (data, data.replace(b"\0", b"")) if b"\0" in data else (data,):
            lowered = form.lower()
            for kind, marks, known in KNOWN:
                # Most files hold none of the marks, and finding that out is fast.
                if any(mark in lowered for mark in marks) and known.search(form):
                    return kind
    return None


def _text(path: Path) -> Iterator[bytes]:
    """A file piece by piece; of a safetensors file its header."""
    with path.open("rb") as handle:
        left = None
        if path.suffix == ".safetensors":
            left = int.from_bytes(handle.read(8), "little")
        before = b""
        while data := handle.read(CHUNK if left is None else min(CHUNK, left)):
            if left is not None:
                left -= len(data)
            yield before + data
            before = data[-OVERLAP:]


def leaks(folder: Path, names: Iterable[str]) -> Iterator[InputError]:
    """An error for each of a folder's files that seems to hold a secret; files that are not there
    are left out."""
    for name in names:
        kind = find_secret(folder / name) if (folder / name).is_file() else None
        if kind is not None:
            yield InputError(
                f"{name} holds what looks like {kind}",
                hint="take it out, and revoke it if it was ever shared; nothing was uploaded",
            )

"""Calls to the Hub that are repeated while the network or the Hub fail, and what ends them."""

import time
from collections.abc import Callable
from typing import TypeVar

from compressor.errors import CompressError, InputError, MachineError

TRIES = 5
PASSING = (408, 409, 412, 422, 425, 429)
"""Answers that another try may turn into a good one, beside those of a failing server; 412 says
that somebody else has committed, 422 is what
a store says to bytes that arrived with another hash."""


Result = TypeVar("Result")


def patiently(what: str, attempt: Callable[[], Result], *, tries: int = TRIES) -> Result:
    """The result of an attempt that is repeated while the network or the Hub fail."""
    for number in range(tries):
        try:
            return attempt()
        except CompressError:
            raise
        except Exception as error:
            final = _verdict(what, error)
            if final is not None:
                raise final from error
            if number == tries - 1:
                raise MachineError(
                    f"the Hub kept failing at {what}: {_first_line(error)}",
                    hint="the same command continues; what has arrived is not sent again",
                ) from error
            time.sleep(2**number)
    raise AssertionError("unreachable")


def _verdict(what: str, error: Exception) -> CompressError | None:
    """The error that ends an upload, or None where another try may do."""
    from huggingface_hub import errors

    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        # The client says which file it was about, and keeps what happened behind that.
        return _verdict(what, error.__cause__)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return InputError("HF_HUB_OFFLINE is set", hint="unset it to upload")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return InputError(
            f"the Hub does not let this user write {what}: {_first_line(error)}",
            hint="hf auth login with a token that may write",
        )
    if status is not None:
        if status >= 500 or status in PASSING:
            return None
        return MachineError(f"the Hub refused {what}: {_first_line(error)}")
    if isinstance(error, errors.HFValidationError):
        return InputError(f"{what}: {_first_line(error)}", hint="a repository is user/name")
    if isinstance(error, (OSError, ValueError, RuntimeError)):
        # Xet's client, which is not Python, has no errors of its own but for these.
        return None
    if type(error).__module__.partition(".")[0] in NETWORK_PACKAGES:
        return None
    raise error


NETWORK_PACKAGES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
"""Whose errors the Hub's client lets through, by version."""


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

"""What can be wrong with a sample's bytes, by reason; and patience with what may pass."""

import time
from collections.abc import Callable
from typing import Literal, TypeVar

T = TypeVar("T")

Reason = Literal["missing", "truncated", "checksum", "malformed", "undecodable", "timeout", "unreachable"]
"""missing: no such shard; truncated: it ends early; checksum: its bytes are not those that were packed; malformed: no
sample of the shard contract; undecodable: no JPEG or PNG that decodes; timeout: no answer in time; unreachable: any
other error of the file system, the network or the server."""

PAUSES = (0.2, 1.0, 4.0)
"""Seconds between two attempts."""


class Fault(Exception):  # noqa: N818
    """A sample or shard that cannot be had."""

    def __init__(self, reason: Reason, detail: str, passing: bool = False) -> None:
        """``passing``: another attempt may succeed."""
        super().__init__(reason, detail, passing)
        self.reason, self.detail, self.passing = reason, detail, passing

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def patiently(call: Callable[[], T], pauses: tuple[float, ...] = PAUSES) -> T:
    """``call()``, again after each of ``pauses`` (seconds) while it raises a passing Fault.

    Raises:
        Fault: the first that is not passing, or the last.
    """
    for pause in pauses:
        try:
            return call()
        except Fault as fault:
            if not fault.passing:
                raise
        time.sleep(pause)
    return call()

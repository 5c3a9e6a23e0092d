"""The one error that users see, and which of their texts can be shown and written at all."""

import unicodedata

LONGEST = 2000
"""Characters of a message; of a longer one the middle is left out: it begins with where, and ends with what to do."""


class UserError(ValueError):
    """A mistake that the user can mend: what, where, accepted values, what to do. The command exits with 2.

    The message is one line of characters that print, whatever the names and values in it are: they come from files and
    command lines, and are shown on terminals.
    """

    def __init__(self, message: str) -> None:
        shown = message if message.isprintable() else "".join(map(_escaped, message))
        if len(shown) > LONGEST:
            shown = f"{shown[: LONGEST - 505]} ... {shown[-500:]}"
        super().__init__(shown)


def _escaped(sign: str) -> str:
    return sign if sign.isprintable() else sign.encode("unicode_escape").decode()


def require(condition: bool, key: str, value: object, accepted: str) -> None:
    """Raise a UserError that names ``key`` and what it accepts, unless the condition holds."""
    if not condition:
        raise UserError(f"{key}={value} is out of range: accepted is {accepted}.")


def holds_control(text: str) -> bool:
    """Whether a text has control characters or halves of characters, which not every file system or terminal takes."""
    return any(unicodedata.category(sign) in ("Cc", "Cs") for sign in text)

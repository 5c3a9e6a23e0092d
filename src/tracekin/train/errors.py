"""How a training ends that is neither done nor a user's mistake. No RuntimeErrors, which may be torch's lost ranks."""


class FencedError(Exception):
    """A newer start of the run holds the run folder."""


class DivergedError(Exception):
    """The training has gone wrong, and trying again would not mend it. Every rank raises it alike."""


class DriftError(Exception):
    """Ranks that must be equal are not: a fault of hardware or of the program. Every rank raises it alike."""

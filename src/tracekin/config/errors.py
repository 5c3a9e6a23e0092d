"""The one error that users see."""


class UserError(ValueError):
    """A mistake that the user can mend: what, where, accepted values, what to do. The command exits with 2."""

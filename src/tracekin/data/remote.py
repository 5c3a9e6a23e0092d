"""Shards that lie elsewhere: s3://, gs://, https:// through fsspec. fsspec is imported at first use."""


def is_remote(location: str) -> bool:
    """Whether a location is a URL rather than a path."""
    return "://" in location


def read_text(url: str) -> str:
    """A small UTF-8 file.

    Raises:
        UserError: it cannot be had, or a package that its protocol needs is missing; says what to do.
    """
    raise NotImplementedError(url)

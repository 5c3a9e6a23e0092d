"""Lists under the user's own names, which lie beside OUT and never inside: rejected images, leaks, the mapping."""

import csv
import io
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import click

from shards.copies import Sample, splits_of
from shards.workfolder import WorkFolder, write_atomically
from tracekin.config import UserError

Rejected = tuple[str, str, str]
"""An image left out: the source's name, the kind of reason, the reason."""


def check_rejected(work: WorkFolder, rejected: Sequence[Rejected], total: int, limit: float) -> None:
    """Refuse a source of which too much is unreadable.

    Raises:
        UserError: more than ``limit * total`` images are.
    """
    if not rejected:
        return
    message = f"{len(rejected)} of {total} images are unreadable, for example {rejected[0][0]}: {rejected[0][2]}"
    path = _beside(work, "rejected")
    if len(rejected) > limit * total:
        list_rejected(work, rejected)
        raise UserError(
            f"{message}; all are listed in {path}. Accepted is a share of {limit:g}: mend them or raise --max-rejected."
        )
    click.echo(f"{message}; packed without them, all are listed in {path}.", err=True)


def list_rejected(work: WorkFolder, rejected: Iterable[Rejected]) -> None:
    """Write ``OUT.rejected.csv``, or remove an older one."""
    _write(work, "rejected", ("image", "reason"), sorted((name, reason) for name, _, reason in rejected))


def list_leaks(work: WorkFolder, groups: Sequence[list[Sample]], copies: Sequence[list[Sample]]) -> None:
    """Write ``OUT.leaks.csv`` and say what it means, or remove an older one; a set of samples is one leak."""
    rows = [
        (kind, number, sample.split, sample.image.source, sample.image.source_group)
        for kind, leaks in (("group", groups), ("image", copies))
        for number, leak in enumerate(leaks, 1)
        for sample in leak
    ]
    _write(work, "leaks", ("leak", "number", "split", "image", "group"), rows)
    if rows:
        between = Counter("/".join(splits_of(leak)) for leak in (*groups, *copies)).most_common(1)[0][0]
        click.echo(
            f"the source's own splits leak: {len(groups)} groups and {len(copies)} images lie in several splits "
            f"(mostly {between}), so scores on them will be too good. They are packed as given and listed in "
            f"{_beside(work, 'leaks')}; mend the source's splits, or remove them and let the packer split by group.",
            err=True,
        )


def check_mapping(mapping: Path, work: WorkFolder) -> None:
    """Refuse a place where the mapping must not be written.

    Raises:
        UserError: it exists, or lies inside OUT or the work folder, or its folder does not exist.
    """
    path = Path(os.path.abspath(mapping))
    if {work.out, work.path} & {path, *path.parents}:
        raise UserError(f"--mapping {mapping} lies inside the packed set: it would travel with it; name another place.")
    if not path.parent.is_dir():
        raise UserError(f"--mapping {mapping}: no such folder {path.parent}.")
    if path.exists() and not _is_ours(path, work):
        raise UserError(f"--mapping {mapping} exists already; name another file or remove it.")


def write_mapping(mapping: Path, samples: Iterable[Sample], work: WorkFolder) -> None:
    """Write who is behind each key, with mode 600."""
    check_mapping(mapping, work)
    path = Path(os.path.abspath(mapping))
    temporary = path.with_name(f".{path.name}.partial")
    temporary.unlink(missing_ok=True)  # a kill left it
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        images = (sample.image for sample in samples)
        rows = sorted((image.source, image.key, image.group, image.source_group) for image in images)
        file.write(
            _csv(
                ("key", "group", "source", "original_group"),
                ((key, group, name, own) for name, key, group, own in rows),
            )
        )
    write_atomically(work.path / "mapping", str(path))  # a kill from here on: the next start may overwrite it
    temporary.replace(path)


def _beside(work: WorkFolder, kind: str) -> Path:
    return work.out.parent / f"{work.out.name}.{kind}.csv"


def _is_ours(path: Path, work: WorkFolder) -> bool:
    try:
        return (work.path / "mapping").read_text(encoding="utf-8") == str(path)
    except OSError:
        return False


def _write(work: WorkFolder, kind: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    path = _beside(work, kind)
    if rows:
        temporary = work.path / path.name
        temporary.write_text(_csv(header, rows), encoding="utf-8")
        temporary.replace(path)
    else:
        path.unlink(missing_ok=True)  # of an earlier packing


def _csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer).writerows([header, *rows])
    return buffer.getvalue()

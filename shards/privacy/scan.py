"""Search a packed set for whatever its source calls images, patients and dates.

The rule. A compressed image matches short strings by chance. An identifier of n characters is searched for in all
bytes, in either case and in several encodings, if chance alone would find one of its length less than ``CHANCE`` times:
bytes scanned x identifiers of that length x 2**letters / 256**n, since a letter matches in two cases. It must have
``LEAST`` characters, and be no run such as 222222 or 456789, which tables of JPEG files hold. Every other identifier is
compared, as whole words, with every text: names, JSON strings, numbers in a sample's JSON, metadata of images.

Pseudonyms and sums are random hexadecimal digits of a fixed width, where 0123456 would be found by chance. So an
identifier of k hexadecimal digits counts inside them only if bytes x identifiers of that length / 16**k is below
``CHANCE``. One that fills a pseudonym (32 digits) always counts, and so does one that zeros fill up to a pseudonym.
"""

import json
import re
import textwrap
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from shards.privacy.contents import CONTRACT, SHARD, Declared, read_contents
from shards.privacy.identifiers import Identifiers, Origin, read_identifiers
from shards.privacy.search import Search
from shards.workers import ordered_map
from tracekin.config import UserError
from tracekin.data.manifest import Manifest

CHANCE = 0.001
LEAST = 6
_HEX = re.compile(r"([0-9a-f]*)(?:\.(?:jpg|png|json))?")  # what a name of pseudonym and extension could hold
_WORD = re.compile(r"[^\W_]+")


class Leak(NamedTuple):
    file: str
    offset: int
    """Of the first place in the file; -1 for the file's name."""
    places: int
    identifier: str
    origin: Origin


@dataclass
class Scan:
    """What was searched for, where and how, and what was found."""

    source: Path
    identifiers: Identifiers
    leaks: list[Leak] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Files that cannot be told."""
    files: int = 0
    bytes: int = 0
    raw: int = 0
    """Identifiers searched for in all bytes; the others that are not declared are compared as words."""
    declared: int = 0
    hexadecimal: int = 0
    """Of ``raw``: not looked for inside pseudonyms and sums."""
    expected: float = 0.0
    """How many matches chance is expected to make."""


@dataclass(frozen=True)
class _Rules:
    """What a worker needs; picklable."""

    search: Search
    words: dict[str, int]
    longest_word: int
    hexadecimal: frozenset[int]
    """Numbers of identifiers that do not count inside pseudonyms and sums."""
    padded: dict[str, int]
    """Identifiers of hexadecimal digits without the zeros around them."""
    declared: Declared


def scan(manifest: Manifest, source: Path, keep: tuple[str, ...] = (), workers: int = 1) -> Scan:
    """Search every file in the manifest's folder for every identifier of the source.

    Args:
        manifest: of a local set.
        source: the folder or zip that it was packed from.
        keep: fields of the source whose values samples may carry.
        workers: processes.

    Raises:
        UserError: what ``read_identifiers`` refuses, or a set that lies inside the source.
    """
    folder = Path(manifest.folder)
    if folder.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{folder} lies inside {source}, whose files would count as the source's; move it elsewhere.")
    identifiers = read_identifiers(source, keep, workers)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    result = Scan(source, identifiers, files=len(files), bytes=sum((folder / name).stat().st_size for name in files))
    words = CONTRACT | {manifest.name, manifest.recipe, *manifest.classes, *keep}
    kept = {name: frozenset(values) for name, values in identifiers.kept.items()}
    rules = _make_rules(result, Declared(words, kept))
    texts = list(identifiers.origins)
    # The rules travel with every chunk of jobs: few chunks.
    found = ordered_map(partial(_scan_file, folder, rules), files, workers, chunk=max(1, -(-len(files) // workers)))
    for name, (hits, problems) in zip(files, found, strict=True):
        result.problems += [f"{name}: {problem}" for problem in problems]
        places = Counter(number for _, number in hits)
        first = {number: offset for offset, number in reversed(hits)}
        result.leaks += [
            Leak(name, offset, places[number], texts[number], identifiers.origins[texts[number]])
            for number, offset in sorted(first.items(), key=lambda item: item[1])
        ]
    return result


def _make_rules(result: Scan, declared: Declared) -> _Rules:
    """Sort the identifiers by how they can be searched for; counts go into ``result``."""
    known = {_fold(word) for word in declared.words}
    numbered = [(n, text) for n, text in enumerate(result.identifiers.origins) if _fold(text) not in known]
    result.declared = len(result.identifiers.origins) - len(numbered)
    weights: Counter[int] = Counter()
    for _, text in numbered:
        weights[len(text)] += 2 ** sum(map(str.isalpha, text))
    chance = {length: result.bytes * weight / 256**length for length, weight in weights.items()}
    raw = [(n, text) for n, text in numbered if len(text) >= LEAST and chance[len(text)] < CHANCE and not _is_run(text)]
    chosen = {n for n, _ in raw}
    result.raw, result.expected = len(raw), sum(chance[length] for length in {len(text) for _, text in raw})
    words: dict[str, int] = {}
    for n, text in numbered:
        if n not in chosen:
            words.setdefault(_fold(text), n)
    hexadecimal, padded = _hexadecimal(numbered, result.bytes)
    result.hexadecimal = len(hexadecimal & chosen)
    needles: dict[bytes, int] = {}
    for n, text in raw:
        for needle in _encodings(text):
            needles.setdefault(needle, n)
    return _Rules(Search(needles), words, max(map(len, words), default=0), hexadecimal, padded, declared)


def _hexadecimal(numbered: Sequence[tuple[int, str]], size: int) -> tuple[frozenset[int], dict[str, int]]:
    """The identifiers that random hexadecimal digits match by chance; all without the zeros around them."""
    digits = {n: len(match[1]) for n, text in numbered if (match := _HEX.fullmatch(text.lower()))}
    counts = Counter(digits.values())
    by_chance = frozenset(n for n, length in digits.items() if size * counts[length] / 16**length >= CHANCE)
    padded = {text.lower().strip("0"): n for n, text in numbered if text.isalnum() and n in digits}
    return by_chance, padded


def _is_run(text: str) -> bool:
    """One character repeated, or each the next or the last one's neighbour: 000000, 456789, fedcba."""
    codes = text.lower().encode("utf-32-le")[::4] if text.isascii() else b""
    steps = {b - a for a, b in pairwise(codes)}
    return len(steps) == 1 and steps <= {-1, 0, 1}


def _encodings(text: str) -> Iterator[bytes]:
    """UTF-8, UTF-16 of both kinds, Latin-1 and JSON's escapes, of the text, its upper and its lower case."""
    forms = {text, text.lower(), text.upper(), unicodedata.normalize("NFD", text)}
    for form in forms if not text.isascii() else {text}:  # ASCII letters are found in either case anyway
        yield form.encode()
        yield json.dumps(form)[1:-1].encode()
        wide = form.encode("utf-16-le")
        if form.isascii():
            yield wide[:-1]  # without the last zero it lies in both kinds
            continue
        yield from (wide, form.encode("utf-16-be"))
        try:
            yield form.encode("latin-1")
        except UnicodeEncodeError:
            continue


def _fold(text: str) -> str:
    """A text as words are compared: case and what surrounds it do not matter."""
    words = list(_WORD.finditer(folded := unicodedata.normalize("NFC", text).casefold()))
    return folded[words[0].start() : words[-1].end()] if words else folded


def _scan_file(folder: Path, rules: _Rules, name: str) -> tuple[list[tuple[int, int]], list[str]]:
    """(offset, number of the identifier) of each place, in order; why bytes could not be told."""
    contents = read_contents(folder / name, rules.declared)
    with (folder / name).open("rb") as file:
        places = rules.search.find_in(file)
    starts = [start for start, _ in contents.proven], [start for start, _, _ in contents.random]
    hits = []
    for start, end, number in places:
        proven, digits = (bisect_right(those, start) - 1 for those in starts)
        if proven >= 0 and end <= contents.proven[proven][1]:
            continue
        if number in rules.hexadecimal and digits >= 0 and end <= contents.random[digits][1]:
            continue
        hits.append((start, end, number))
    found = {(start, number) for start, number in _outermost(hits)}
    found |= {(start, rules.padded[t]) for start, _, text in contents.random if (t := text.strip("0")) in rules.padded}
    known = {number for _, _, number in hits}
    texts = contents.texts if name in CONTRACT or SHARD.fullmatch(name) else [(-1, name), *contents.texts]
    for place, text in texts:
        found |= {(place, number) for number in _in_text(rules, text) if number not in known}
    return sorted(found), contents.problems


def _outermost(hits: list[tuple[int, int, int]]) -> Iterator[tuple[int, int]]:
    """Without those inside others: of a path, a file's name and its stem only the path."""
    last = 0
    for start, end, number in sorted(hits, key=lambda hit: (hit[0], -hit[1])):
        if end > last:
            last = end
            yield start, number


def _in_text(rules: _Rules, text: str) -> Iterator[int]:
    """The identifiers in a text: as words, and those that are searched for in bytes, as a JSON string may hide them."""
    for _, _, number in rules.search.find(text.encode("utf-8", "replace")):
        yield number
    if not rules.words:
        return
    folded = unicodedata.normalize("NFC", text).casefold()
    words = list(_WORD.finditer(folded))
    for index, first in enumerate(words):
        for last in words[index:]:
            if last.end() - first.start() > rules.longest_word:
                break
            if (word := folded[first.start() : last.end()]) in rules.words:
                yield rules.words[word]


def describe(result: Scan) -> Iterator[str]:
    """The summary, in lines of at most 80 columns."""
    origins = result.identifiers.origins
    kinds = Counter(origin.kind for origin in origins.values())
    yield from _wrapped(f"privacy: {len(origins):,} identifiers of {result.source}")
    yield from _wrapped(", ".join(f"{number:,} {kind}" for kind, number in kinds.items()), "  ")
    words = len(origins) - result.raw - result.declared
    yield from _wrapped(
        f"{result.raw:,} searched for in all {result.bytes:,} bytes of {result.files:,} files "
        f"({result.expected:.1g} matches expected by chance); {words:,} too short for that and compared as words with "
        f"names, JSON and texts; {result.declared:,} declared as not identifying",
        "  ",
    )
    if result.hexadecimal:
        yield from _wrapped(f"{result.hexadecimal:,} of hexadecimal digits not looked for in pseudonyms and sums", "  ")
    unread = result.identifiers.unread
    if unread:
        files = ", ".join(unread[:3]) + (", ..." if len(unread) > 3 else "")
        yield from _wrapped(f"only the names known of {len(unread):,} files of the source: {files}", "  ")


def describe_leak(leak: Leak) -> str:
    where = f"byte {leak.offset}" if leak.offset >= 0 else "in its name"
    more = f", and {leak.places - 1} more" if leak.places > 1 else ""
    return f"{leak.file}, {where}{more}: {leak.identifier!r} ({leak.origin.kind}: {leak.origin.detail})"


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text, 80, initial_indent=indent, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )

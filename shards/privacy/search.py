"""Many byte strings looked for at once, ASCII letters in either case: the engine of the privacy scan."""

import string
from collections.abc import Mapping
from functools import cached_property
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

CHUNK = 1 << 22
"""Bytes searched at a time."""
_FOLD = bytes.maketrans(string.ascii_uppercase.encode(), string.ascii_lowercase.encode())
_WINDOW = 8
_HASH_BITS = 24
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing (Knuth, TAOCP 3, section 6.4)


class Search:
    """Finds every place of every needle, one inside another included.

    The first 8 bytes (or as many as the shortest needle has) of each needle set an entry of a hashed table; a window of
    the data whose entry is set is compared with the needles' beginnings, and only equals with whole needles. Picklable:
    the tables are made where they are used.
    """

    def __init__(self, needles: Mapping[bytes, int]) -> None:
        """``needles``: byte strings, none empty, each with its number; of two that differ in case the first counts."""
        self._needles: dict[bytes, int] = {}
        for needle, number in needles.items():
            self._needles.setdefault(needle.translate(_FOLD), number)
        self.longest = max(map(len, self._needles), default=0)

    def find(self, data: bytes) -> list[tuple[int, int, int]]:
        """(first byte, last byte + 1, number) of each place in ``data``, in order."""
        if not self._needles:
            return []
        beginnings, lengths, table = self._tables
        folded = data.translate(_FOLD)
        padded = folded + bytes(2 * _WINDOW)
        found = []
        for shift in range(_WINDOW):
            count = -(-(len(data) - shift) // _WINDOW)
            if count <= 0:
                break
            windows = np.frombuffer(padded, "<u8", count, shift) & self._mask
            places = np.flatnonzero(table[_hashed(windows)])
            nearest = np.searchsorted(beginnings, windows[places]).clip(max=len(beginnings) - 1)
            equal = beginnings[nearest] == windows[places]
            for place, which in zip(places[equal].tolist(), nearest[equal].tolist(), strict=True):
                start = place * _WINDOW + shift
                for length in lengths[which]:
                    end = start + length
                    if end <= len(data) and (number := self._needles.get(folded[start:end])) is not None:
                        found.append((start, end, number))
        return sorted(found)

    def find_in(self, file: BinaryIO) -> list[tuple[int, int, int]]:
        """As ``find`` over a whole file, in bounded memory."""
        found: list[tuple[int, int, int]] = []
        start = 0
        while True:
            file.seek(start)
            piece = file.read(CHUNK + max(0, self.longest - 1))  # a needle across the border belongs to this piece
            found += [(start + a, start + b, number) for a, b, number in self.find(piece) if a < CHUNK]
            if len(piece) <= CHUNK:
                return found
            start += CHUNK

    @cached_property
    def _tables(self) -> tuple[NDArray[np.uint64], list[list[int]], NDArray[np.bool_]]:
        """The needles' beginnings, sorted; the lengths of the needles of each; the hashed table of the beginnings."""
        width = self._width
        lengths: dict[bytes, set[int]] = {}
        for needle in self._needles:
            lengths.setdefault(needle[:width].ljust(_WINDOW, b"\0"), set()).add(len(needle))
        beginnings = np.frombuffer(b"".join(lengths), "<u8")
        order = np.argsort(beginnings)
        by_number = list(lengths.values())
        table = np.zeros(1 << _HASH_BITS, bool)
        table[_hashed(beginnings)] = True
        return beginnings[order], [sorted(by_number[i]) for i in order], table

    @cached_property
    def _width(self) -> int:
        return min(_WINDOW, *map(len, self._needles))

    @property
    def _mask(self) -> np.uint64:
        return np.uint64((1 << 8 * self._width) - 1)

    def __getstate__(self) -> dict[str, object]:
        return {"_needles": self._needles, "longest": self.longest}


def _hashed(windows: NDArray[np.uint64]) -> NDArray[np.int64]:
    return ((windows * _MULTIPLIER) >> np.uint64(64 - _HASH_BITS)).view(np.int64)

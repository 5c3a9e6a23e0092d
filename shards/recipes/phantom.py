"""Phantoms: dermoscopy-like lesions drawn from a seed, so that a fresh machine needs no download.

Five imbalanced classes are told apart by border, inner structure and asymmetry; colours come from one distribution for
all of them, but that vessels blush faintly and irregular lesions are somewhat larger and darker. A lesion's pigment is
a function of its own coordinates, so several images of one lesion show the same structure under another pose, zoom,
light and hair. Colour follows Beer and Lambert: skin * exp(-absorption * pigment). Nuisances are mostly such as the
views of pretraining vary too (position, zoom, light), so that little training suffices to look past them.

Fairness (``benchmarks/phantom_fairness.py --epochs 10``, seed 0, 2,546 images of 64 px, balanced accuracy on test,
chance 0.20): supervised ResNet-18 1.00, kNN on the image area-averaged to 8x8 0.29, kNN on an untrained ResNet-18
0.39. For orientation, one BYOL run of 12 epochs (18,000 images, mild jitter): kNN 0.60.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from shards.recipes.base import Dataset, Record
from shards.source import Source
from tracekin.config import UserError

Array = NDArray[np.float64]
Structure = Callable[[np.random.Generator, Array, Array], Array]

SHARES = {"reticular": 0.40, "globular": 0.25, "starburst": 0.15, "irregular": 0.12, "vascular": 0.08}
IMAGES_PER_LESION = (0.2, 0.3, 0.3, 0.2)  # of 1, 2, 3, 4 images; 2.5 on average
SPLITS = {"train": 0.6, "val": 0.15, "test": 0.25}  # a large test split: its rarest class has about 50 images
MELANIN = np.array([0.55, 0.95, 1.15])  # absorption of red, green, blue
BLOOD = np.array([0.25, 1.15, 0.95])


@dataclass(frozen=True)
class Options:
    lesions: int = 1000
    """Lesions to draw; each has 1 to 4 images, 2.5 on average."""
    size: int = 64
    """Side of the square images, 64 to 256 pixels."""

    def __post_init__(self) -> None:
        if not 64 <= self.size <= 256:
            raise UserError(f"size={self.size} is out of range: accepted is 64 to 256 pixels.")
        if not 50 <= self.lesions <= 1_000_000:
            raise UserError(f"lesions={self.lesions} is out of range: accepted is 50 to 1000000.")


def recipe(source: Source | None, options: Options, seed: int) -> Dataset:
    """The phantom data set; ``source`` must be None."""
    if source is not None:
        raise UserError(f"the recipe phantom draws its images; leave out SOURCE ({source.path}).")
    return Dataset(list(_records(options, seed)), list(SHARES), "multiclass", SPLITS)


def _records(options: Options, seed: int) -> Iterator[Record]:
    rng = np.random.default_rng([seed, 0])
    bounds = np.round(np.cumsum(list(SHARES.values())) * options.lesions)
    labels = np.searchsorted(bounds, np.arange(options.lesions), side="right")
    counts = rng.choice([1, 2, 3, 4], size=options.lesions, p=IMAGES_PER_LESION)
    for lesion, (label, count) in enumerate(zip(labels, counts, strict=True)):
        for view in range(count):
            read = partial(encode, seed, lesion, view, int(label), options.size)
            yield Record(f"{lesion}/{view}", read, int(label), str(lesion))


def encode(seed: int, lesion: int, view: int, label: int, size: int) -> bytes:
    """The JPEG bytes of :func:`draw`."""
    buffer = io.BytesIO()
    draw(seed, lesion, view, label, size).save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()


def draw(seed: int, lesion: int, view: int, label: int, size: int) -> Image.Image:
    """One image, ``size`` x ``size`` RGB, drawn at twice that and reduced. ``view`` counts the images of a lesion."""
    own = np.random.default_rng([seed, 1, lesion])  # what every image of this lesion shares
    shot = np.random.default_rng([seed, 2, lesion, view])  # what belongs to this image alone
    v, u = np.mgrid[-1 : 1 : size * 2j, -1 : 1 : size * 2j]
    skin = np.array([0.95, 0.78, 0.68]) * np.exp(-own.uniform(0, 0.25) * MELANIN)
    absorption = MELANIN * own.uniform(0.95, 1.05, 3)
    x, y = _pose(shot, u, v, own.uniform(0.7, 0.85))
    melanin, blood = _pigment(own, list(SHARES)[label], x, y)
    freckles = 0.05 * _waves(shot, u, v, 6, 2.0)
    density = (melanin + freckles)[..., None] * absorption + blood[..., None] * BLOOD
    image = _light(shot, u, v) * skin * np.exp(-density)
    image += shot.normal(0, 0.02, image.shape)
    canvas = Image.fromarray((np.clip(image, 0, 1) * 255).round().astype(np.uint8))
    _hair(shot, canvas)
    if shot.random() < 0.1:
        _ruler(shot, canvas)
    return canvas.resize((size, size), Image.Resampling.BOX)


def _pose(rng: np.random.Generator, u: Array, v: Array, radius: float) -> tuple[Array, Array]:
    """Image coordinates (-1..1) to lesion coordinates, where the lesion's border lies near radius 1."""
    angle, mirror = rng.uniform(0, 2 * np.pi), rng.choice([-1, 1])
    zoom = radius * np.exp(rng.uniform(-0.25, 0.25))
    u, v = u - rng.uniform(-0.25, 0.25), v - rng.uniform(-0.25, 0.25)
    x = (np.cos(angle) * u + np.sin(angle) * v) / zoom * mirror
    y = (np.cos(angle) * v - np.sin(angle) * u) / zoom * rng.uniform(0.9, 1.1)
    return x, y


def _pigment(rng: np.random.Generator, name: str, x: Array, y: Array) -> tuple[Array, Array]:
    """Density of melanin and of blood at lesion coordinates."""
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    amplitude = 0.16 if name == "irregular" else 0.035
    edge = np.full_like(x, 1.12 if name == "irregular" else 1.0)
    for k in range(1, 8):
        edge += amplitude * rng.normal() / np.sqrt(k) * _cos(k * angle + rng.uniform(0, 2 * np.pi))
    if name == "starburst":
        edge += 0.16 * _rays(rng, angle)
    mask = 1 / (1 + np.exp(-np.clip((edge - radius) / rng.uniform(0.03, 0.07), -30, 30)))
    depth = rng.uniform(0.8, 1.1) * (1.2 if name == "irregular" else 1)
    texture = STRUCTURES[name](rng, x, y)
    blotches = 0.1 * _waves(rng, x, y, 5, 1.5)
    if name == "vascular":
        return mask * depth * (0.8 + blotches), mask * (0.15 + texture)  # a faint blush
    return np.maximum(mask * depth * (0.8 + blotches + texture), 0), np.zeros_like(x)


def _reticular(rng: np.random.Generator, x: Array, y: Array) -> Array:
    """A honeycomb of dark lines: three plane waves at 60 degrees, gently warped."""
    frequency, turn = 2 * np.pi / rng.uniform(0.30, 0.38), rng.uniform(0, np.pi)
    x, y = x + 0.04 * _waves(rng, x, y, 3, 2.0), y + 0.04 * _waves(rng, x, y, 3, 2.0)
    total = np.zeros_like(x)
    for k in range(3):
        angle = turn + k * np.pi / 3
        total += _cos(frequency * (np.cos(angle) * x + np.sin(angle) * y))
    return 0.55 * (1 / (1 + np.exp(2.2 * total)) - 0.45) * 2


def _globular(rng: np.random.Generator, x: Array, y: Array) -> Array:
    """Round dark globules on a jittered lattice."""
    step = rng.uniform(0.36, 0.44)
    total = np.zeros_like(x)
    for i in range(-3, 4):
        for j in range(-3, 4):
            cx, cy = (i + j % 2 / 2) * step + rng.normal(0, 0.05), j * step * 0.87 + rng.normal(0, 0.05)
            width = rng.uniform(0.09, 0.13)
            if np.hypot(cx, cy) > 1.4:
                continue  # outside the border
            total += np.exp(-((((x - cx) ** 2 + (y - cy) ** 2) / width**2) ** 2))
    return 1.1 * (total - 0.3)


def _starburst(rng: np.random.Generator, x: Array, y: Array) -> Array:
    """Radial streaks that grow stronger towards the border."""
    radius = np.hypot(x, y)
    return 0.75 * np.clip(radius - 0.15, 0, 1) * _rays(rng, np.arctan2(y, x)) / 0.7


def _irregular(rng: np.random.Generator, x: Array, y: Array) -> Array:
    """Eccentric dark blotches beside a pale scar, no fine structure."""
    side = rng.uniform(0, 2 * np.pi)
    total = np.zeros_like(x)
    for strength, towards, width in ((0.8, 0.0, 0.30), (0.7, 0.9, 0.24), (-0.75, np.pi, 0.40), (-0.4, 2.2, 0.25)):
        angle, distance = side + towards + rng.normal(0, 0.25), rng.uniform(0.4, 0.65)
        cx, cy = distance * np.cos(angle), distance * np.sin(angle)
        total += strength * np.exp(-((((x - cx) ** 2 + (y - cy) ** 2) / width**2) ** 2))
    return total


def _vascular(rng: np.random.Generator, x: Array, y: Array) -> Array:
    """Winding vessels of even width: the zero lines of a smooth random field."""
    field = _waves(rng, x, y, 7, 5.5)
    slope = np.hypot(*np.gradient(field)) / np.hypot(x[0, 1] - x[0, 0], y[0, 1] - y[0, 0])
    return np.asarray(1.3 * np.exp(-((field / (slope + 1e-3) / 0.055) ** 2)))


STRUCTURES: dict[str, Structure] = {
    "reticular": _reticular,
    "globular": _globular,
    "starburst": _starburst,
    "irregular": _irregular,
    "vascular": _vascular,
}


def _rays(rng: np.random.Generator, angle: Array) -> Array:
    """About twenty uneven rays, -1..1."""
    number = int(rng.integers(17, 23))
    bend = 0.25 * _cos(2 * angle + rng.uniform(0, 2 * np.pi)) + 0.2 * _cos(3 * angle + rng.uniform(0, 2 * np.pi))
    return _cos(number * angle + bend + rng.uniform(0, 2 * np.pi))


def _waves(rng: np.random.Generator, x: Array, y: Array, number: int, frequency: float) -> Array:
    """A smooth random field of unit variance: plane waves of about this angular frequency."""
    total = np.zeros_like(x)
    for angle in rng.uniform(0, 2 * np.pi, number):
        k = frequency * rng.uniform(0.7, 1.3)
        total += _cos(k * (np.cos(angle) * x + np.sin(angle) * y) + rng.uniform(0, 2 * np.pi))
    return np.asarray(total * np.sqrt(2 / number))


def _cos(phase: Array) -> Array:
    return np.asarray(np.cos(phase.astype(np.float32)), np.float64)  # in float64 it takes 30 times as long


def _light(rng: np.random.Generator, u: Array, v: Array) -> Array:
    """White balance, a brightness gradient and a vignette, as a factor [height, width, 3]."""
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.2)
    gradient = 1 + strength * (np.cos(angle) * u + np.sin(angle) * v)
    cx, cy = rng.uniform(-0.15, 0.15, 2)
    vignette = 1 - rng.uniform(0, 0.6) * np.clip(np.hypot(u - cx, v - cy) - rng.uniform(0.8, 1.0), 0, 1)
    balance = rng.uniform(0.84, 1.12) * rng.uniform(0.98, 1.02, 3)
    return np.asarray((gradient * vignette)[..., None] * balance)


def _hair(rng: np.random.Generator, canvas: Image.Image) -> None:
    """Up to three curved hairs, dark or fair."""
    pen, n = ImageDraw.Draw(canvas), canvas.width
    shade = int(rng.integers(15, 90))
    for _ in range(max(0, int(rng.integers(-4, 4)))):
        start, end, bend = rng.uniform(-0.1, 1.1, 2), rng.uniform(-0.1, 1.1, 2), rng.normal(0, 0.15, 2)
        t = np.linspace(0, 1, 24)[:, None]
        points = (start * (1 - t) + end * t + bend * t * (1 - t)) * n
        pen.line([(float(px), float(py)) for px, py in points], (shade, int(shade * 0.8), int(shade * 0.7)), n // 64)


def _ruler(rng: np.random.Generator, canvas: Image.Image) -> None:
    """Millimetre marks along one edge."""
    pen, n = ImageDraw.Draw(canvas), canvas.width
    upright, far = rng.random() < 0.5, rng.random() < 0.5
    for k, at in enumerate(np.arange(0, n, n * rng.uniform(0.05, 0.09))):
        length = n * (0.10 if k % 5 == 0 else 0.06)
        low, high = (n - length, n) if far else (0, length)
        ends = [(low, at), (high, at)] if upright else [(at, low), (at, high)]
        pen.line([(float(px), float(py)) for px, py in ends], (30, 30, 35), max(1, n // 96))

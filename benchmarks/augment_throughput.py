"""Two views of an image on one core: >= 1.5x lightly's BYOLTransform at 64 px and >= 1.0x at 224 px.

    python -m benchmarks.augment_throughput

One process, one thread. Both start from the same decoded images, RGB as of HAM10000 at two sizes (200x150 and 600x450,
drawn here), take BYOL's own parameters and end with two normalised float32 tensors an image. The lower of the ratios at
the two image sizes is the claim's.

- lightly: `BYOLTransform`, its defaults but for the view's size. Its crops are bilinear where ours are bicubic, and its
  blur is Pillow's, three box blurs instead of a Gaussian; both are to its advantage in time.
- photometry: colour, grey, blur and solarisation alone, from the same crops of 8 bits to values 0..1, drawing included.
  `worker` does them view by view (numpy), `batched` as a device would (torch, here on one CPU thread); both give the
  same bits. `kornia` is an AugmentationSequential a view, which draws every image's own parameters. torchvision's v2
  transforms draw one set for the whole batch and are no equal. Batched, every view is blurred by the largest kernel, be
  it with weights of zero, so that no value decides what is run; kornia picks the images of each operation, for which a
  GPU has to be waited for.
- draft: decoding a large JPEG and making both views (preset dermoscopy), where the decoder may shrink the image to
  `least_side`, against decoding it whole; and by how many of 255 grey levels the views then differ. No part of the
  claim, and of no ratio above.
- device, where there is a GPU: views of 224 px a second, from crops in pinned memory to normalised views on the GPU;
  >= 10,000.

Exit code 1: a bound was missed. The machine should do nothing else, for about two minutes.
"""

import io
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import metadata
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from benchmarks.harness import arguments, compare, finish, seconds, summary
from tracekin.data.augment import (
    PRESETS,
    Augmentation,
    crop,
    draw,
    least_side,
    photometry_parameters,
    view,
)
from tracekin.data.photometry import apply_photometry, apply_to_one

BYOL = Augmentation(crop_min=0.08, flip_x=0.5, grey=0.2, blur=(1.0, 0.1), solarise=(0.0, 0.2))
"""Grill et al. 2020, appendix B, which lightly's defaults are too."""
MEAN, STD = (np.array(x, np.float32).reshape(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
BOUNDS = {"64": 1.5, "224": 1.0}
"""At least these, by the view's side: lightly's time over ours."""
DEVICE_BOUND = 10_000
IMAGE_SIZES = ((200, 150), (600, 450))
JPEG_SIZES = ((1024, 768), (2000, 1500))


def lesion(width: int, height: int, seed: int) -> Image.Image:
    """A dark blot with a ragged border on uneven, grainy skin."""
    generator = np.random.default_rng(seed)

    def cloud(cells: int) -> NDArray[np.float32]:
        coarse = Image.fromarray(generator.normal(size=(cells, cells)).astype(np.float32))
        return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))

    y, x = np.mgrid[:height, :width]
    distance = np.hypot(x / width - 0.5, (y / height - 0.5) * height / width) + 0.04 * cloud(9)
    inside = 1 / (1 + np.exp((distance - 0.2) / 0.015))[..., None]
    skin, blot = (np.array(colour) for colour in ((214, 160, 150), (120, 70, 60)))
    pixels = skin + inside * (blot - skin) + (6 * cloud(5) + 5 * cloud(40))[..., None]
    return Image.fromarray((pixels + generator.normal(0, 3, (height, width, 3))).clip(0, 255).astype(np.uint8))


def our_views(images: list[Image.Image], size: int) -> list[Tensor]:
    """Two normalised views of each image, as a loader process makes them."""
    found = []
    for sample, image in enumerate(images):
        for v in (0, 1):
            place = {"seed": 0, "epoch": 0, "sample": sample, "view": v}
            planes = view(image, BYOL, image_size=size, channels=3, **place)
            planes -= MEAN
            planes /= STD
            found.append(torch.from_numpy(planes))
    return found


def lightly_views(size: int) -> Callable[[list[Image.Image]], list[Tensor]]:
    """The same by lightly, whose other defaults are BYOL's."""
    from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform

    transform = BYOLTransform(BYOLView1Transform(input_size=size), BYOLView2Transform(input_size=size))
    return lambda images: [planes for image in images for planes in transform(image)]


def against_lightly(size: int, images: list[Image.Image], pairs: int) -> dict[str, Any]:
    theirs = lightly_views(size)
    found = compare({"ours": lambda: our_views(images, size), "lightly": lambda: theirs(images)}, pairs=pairs)
    views = 2 * len(images)
    return {**found, "views_per_second": {name: views / found[name]["median"] for name in ("ours", "lightly")}}


def our_photometry(crops: NDArray[np.uint8], *, batched: bool) -> Tensor:
    """Colour to solarisation of [2, B, C, S, S], the first views first; as [2B, C, S, S]."""
    made = [
        (pixels, photometry_parameters(pixels, BYOL, draw(seed=0, epoch=0, sample=sample, view=v), v))
        for v, rows in enumerate(crops)
        for sample, pixels in enumerate(rows)
    ]
    if not batched:
        return torch.from_numpy(np.stack([apply_to_one(*one) for one in made]))
    pixels, parameters = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*made, strict=True))
    return apply_photometry(pixels, parameters)


def kornia_photometry(size: int) -> Callable[[NDArray[np.uint8]], Tensor]:
    """The same by kornia, with as many taps as ours."""
    from kornia import augmentation as K

    taps = 2 * min(6, (size // 10 | 1) // 2) + 1

    def one(blur: float, solarise: float) -> Callable[[Tensor], Tensor]:
        sequence = [
            K.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
            K.RandomGrayscale(p=0.2),
            K.RandomGaussianBlur((taps, taps), (0.1, 2.0), border_type="replicate", p=blur),
            *([K.RandomSolarize(0.0, 0.0, p=solarise)] if solarise else []),
        ]
        return K.AugmentationSequential(*sequence, same_on_batch=False)  # type: ignore[no-any-return]

    first, second = (one(BYOL.blur[v], BYOL.solarise[v]) for v in (0, 1))

    def photometry(crops: NDArray[np.uint8]) -> Tensor:
        values = torch.from_numpy(crops).float() / 255
        return torch.cat([first(values[0]), second(values[1])])

    return photometry


def against_kornia(size: int, images: list[Image.Image], pairs: int) -> dict[str, Any]:
    """Seconds of the batched path against kornia's and against a worker's, all from the same crops."""
    crops = np.stack([crops_of(images, size, v) for v in (0, 1)])
    kornia = kornia_photometry(size)
    ways = {
        "worker": lambda: our_photometry(crops, batched=False),
        "batched": lambda: our_photometry(crops, batched=True),
        "kornia": lambda: kornia(crops),
    }
    beside_kornia, beside_worker = (
        compare({name: ways[name] for name in ("batched", other)}, pairs=pairs) for other in ("kornia", "worker")
    )
    views = 2 * len(images)
    return {
        "same_bits": bool(torch.equal(ways["worker"](), ways["batched"]())),
        "views_per_second": {
            **{name: views / beside_kornia[name]["median"] for name in ("batched", "kornia")},
            "worker": views / beside_worker["worker"]["median"],
        },
        "kornia_over_batched": beside_kornia["ratio"],
        "worker_over_batched": beside_worker["ratio"],
    }


def crops_of(images: list[Image.Image], size: int, v: int) -> NDArray[np.uint8]:
    """[B, 3, size, size]."""
    found = []
    for sample, image in enumerate(images):
        u = draw(seed=0, epoch=0, sample=sample, view=v)
        found.append(crop(image, BYOL, image_size=size, channels=3, u=u).astype(np.uint8))
    return np.stack(found)


def with_draft(size: int, jpeg_size: tuple[int, int], count: int, pairs: int) -> dict[str, Any]:
    """Decoding and two views with draft mode against without, and by how many grey levels uncoloured views differ."""
    skin = PRESETS["dermoscopy"]
    least = least_side(skin, size)
    files = [_jpeg(lesion(*jpeg_size, seed)) for seed in range(count)]

    def views(augmentation: Augmentation, draft: bool) -> NDArray[np.float32]:
        found = []
        for sample, file in enumerate(files):
            image = Image.open(io.BytesIO(file))
            if draft:
                image.draft("RGB", (least, least))
            image.load()
            place = {"image_size": size, "channels": 3, "seed": 0, "epoch": 0, "sample": sample}
            found += [view(image, augmentation, view=v, **place) for v in (0, 1)]
        return np.stack(found)

    plain = replace(skin, jitter=0.0)
    difference = 255 * np.abs(views(plain, True) - views(plain, False))
    shrunk = Image.open(io.BytesIO(files[0]))
    shrunk.draft("RGB", (least, least))
    found = compare({"draft": lambda: views(skin, True), "whole": lambda: views(skin, False)}, pairs=pairs)
    return {
        "decoded": list(shrunk.size),
        "gain": found["ratio"],
        "mean_difference": float(difference.mean()),
        "max_difference": float(difference.max()),
    }


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def device_throughput(
    device_name: str = "cuda", size: int = 224, views: int = 512, repeats: int = 20
) -> dict[str, Any]:
    """Views a second of the batched path on a device: transfer of the crops, photometry, normalisation.

    Args:
        device_name: "cuda" or "cpu".
        size: side of the views.
        views: in a batch.
        repeats: timed batches.

    Returns:
        ``views_per_second``, ``seconds`` of a batch, ``bound``, ``holds``.
    """
    device = torch.device(device_name)
    pinned = device.type == "cuda"
    small = [lesion(*IMAGE_SIZES[0], seed) for seed in range(8)]
    crops = np.stack([crops_of(small, size, v) for v in (0, 1)]).reshape(-1, 3, size, size)
    parameters = [
        photometry_parameters(crops[n % len(crops)], BYOL, draw(seed=0, epoch=0, sample=n, view=v), v)
        for n in range(views // 2)
        for v in (0, 1)
    ]
    host = [torch.from_numpy(x) for x in (np.resize(crops, (views, *crops.shape[1:])), np.stack(parameters))]
    host = [tensor.pin_memory() for tensor in host] if pinned else host
    mean, std = (torch.from_numpy(x).to(device) for x in (MEAN, STD))

    def batch() -> Tensor:
        pixels, numbers = (tensor.to(device, non_blocking=True) for tensor in host)
        return apply_photometry(pixels, numbers).sub_(mean).div_(std)

    for _ in range(3):
        batch()
    times = summary([seconds(batch) for _ in range(repeats)])
    rate = views / times["median"]
    return {
        "size": size,
        "batch": views,
        "seconds": times,
        "views_per_second": rate,
        "bound": DEVICE_BOUND,
        "holds": rate >= DEVICE_BOUND,
    }


def measure(images: int, pairs: int) -> dict[str, Any]:
    """Every comparison on the CPU; keys are sides of views, then sizes of images."""
    drawn = {f"{w}x{h}": [lesion(w, h, seed) for seed in range(images)] for w, h in IMAGE_SIZES}
    sizes = [int(size) for size in BOUNDS]
    return {
        "lightly": {
            str(size): {name: against_lightly(size, some, pairs) for name, some in drawn.items()} for size in sizes
        },
        "photometry": {str(size): against_kornia(size, drawn["200x150"], pairs) for size in sizes},
        "draft": {
            str(size): {f"{w}x{h}": with_draft(size, (w, h), max(1, images // 8), pairs) for w, h in JPEG_SIZES}
            for size in sizes
        },
    }


def summarise(found: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured, then what is claimed of it; the ratios last."""
    ratio = {size: min(one["ratio"] for one in by_image.values()) for size, by_image in found["lightly"].items()}
    same_bits = all(one["same_bits"] for one in found["photometry"].values())
    device = found.get("device")
    return {
        **found,
        "same_bits": same_bits,
        "bound": BOUNDS,
        "holds": same_bits
        and all(ratio[size] >= bound for size, bound in BOUNDS.items())
        and (device is None or device["holds"]),
        "ratio": ratio,
    }


def table(found: Mapping[str, Any]) -> list[str]:
    """What is measured, a line each."""
    lines = ["view   image        ours   lightly   ratio    (views a second, one core)"]
    for size, by_image in found["lightly"].items():
        for name, one in by_image.items():
            rate = one["views_per_second"]
            lines.append(f"{size:>4}  {name:>9} {rate['ours']:>8.0f} {rate['lightly']:>9.0f} {one['ratio']:>7.2f}")
    lines.append("view   photometry: worker  batched  kornia   kornia/batched")
    for size, one in found["photometry"].items():
        rate = one["views_per_second"]
        numbers = f"{rate['worker']:>18.0f} {rate['batched']:>8.0f} {rate['kornia']:>7.0f}"
        lines.append(f"{size:>4}  {numbers} {one['kornia_over_batched']:>12.2f}")
    lines.append("view   JPEG        decoded to   gain of draft mode   grey levels: mean, most")
    for size, by_image in found["draft"].items():
        for name, one in by_image.items():
            decoded = "x".join(map(str, one["decoded"]))
            gain = f"{one['gain']:.2f}" if decoded != name else "none"
            difference = f"{one['mean_difference']:>16.2f} {one['max_difference']:.1f}"
            lines.append(f"{size:>4}  {name:>9} {decoded:>14} {gain:>14} {difference}")
    return lines


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(threads=1)
    parser.add_argument("--images", type=int, default=24, help="in a measured call (%(default)s)")
    parser.add_argument("--pairs", type=int, default=9, help="of measured calls (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = measure(options.images, options.pairs)
    if torch.cuda.is_available():
        found["device"] = device_throughput()
    peers = {name: metadata.version(name) for name in ("lightly", "kornia", "pillow")}
    result = {"images": options.images, "peers": peers, **summarise(found)}
    print("\n".join(table(result)))
    shown = ("peers", "device", "same_bits", "bound", "holds", "ratio")
    finish("augment_throughput", result, save=options.save, shown=shown)
    sys.exit(0 if result["holds"] else 1)


if __name__ == "__main__":
    main()

"""Small sources of images for the tests of shards."""

import io
import zipfile
from pathlib import Path

import numpy as np
from click.testing import CliRunner, Result
from PIL import Image

from shards.pack import main

SECRET = "0123456789abcdef0123456789abcdef"


def image_bytes(seed=0, format="JPEG", mode="RGB", size=(24, 20)):
    channels = (3,) if mode == "RGB" else ()
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x010E] = f"Identifier-{seed}"
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, format, exif=exif)
    return buffer.getvalue()


def write_files(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def write_zip(path: Path, files: dict[str, bytes | str]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def class_tree(number=12, classes=("benign", "malignant"), extension="jpg"):
    format = {"jpg": "JPEG", "png": "PNG"}[extension]
    return {
        f"{c}/Name-{c}-{i}.{extension}": image_bytes(100 * k + i, format)
        for k, c in enumerate(classes)
        for i in range(number)
    }


def csv_source(number=12, groups=True):
    rows = [f"Name-{i}.jpg,{'ab'[i % 2]},Patient-{i // 3}" for i in range(number)]
    table = "image,label,group\n" + "\n".join(rows) + "\n"
    return {f"images/Name-{i}.jpg": image_bytes(i) for i in range(number)} | {"labels.csv": table}


def ham_source(lesions=40):
    rows, files = ["lesion_id,image_id,dx,dx_type,age,sex,localization"], {}
    for lesion in range(lesions):
        for view in range(1 + lesion % 3):
            name = f"ISIC_{lesion:04d}{view}"
            rows.append(f"HAM_{lesion:07d},{name},{('nv', 'nv', 'mel', 'bkl')[lesion % 4]},histo,,male,back")
            files[f"part_{view}/{name}.jpg"] = image_bytes(10 * lesion + view)
    return files | {"HAM10000_metadata.csv": "\n".join(rows) + "\n"}


def run_pack(out: Path, source: Path | None, *arguments: str, recipe: str = "folder") -> Result:
    """The packing command in this process, with the tests' secret unless another is given."""
    secret = out.parent / "secret"
    if not secret.exists():
        secret.write_text(SECRET)
    given = ["--secret", str(secret)] if "--secret" not in arguments else []
    workers = ["--workers", "1"] if "--workers" not in arguments else []
    command = [*([str(source)] if source else []), "--recipe", recipe, "--out", str(out), *given, *workers, *arguments]
    return CliRunner().invoke(main, command)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

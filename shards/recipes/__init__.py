"""The registry: one line a recipe. Its module has ``Options`` and ``recipe(source, options, seed)``."""

from shards.recipes import chestxray14, dicom, folder, ham10000, isic2019, medmnist, phantom

RECIPES = {
    "folder": folder,
    "isic2019": isic2019,
    "ham10000": ham10000,
    "chestxray14": chestxray14,
    "medmnist": medmnist,
    "dicom": dicom,
    "phantom": phantom,
}

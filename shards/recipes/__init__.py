"""The registry: one line a recipe. Its module has ``Options`` and ``recipe(source, options, seed)``."""

from shards.recipes import folder, ham10000, phantom

RECIPES = {
    "folder": folder,
    "ham10000": ham10000,
    "phantom": phantom,
}

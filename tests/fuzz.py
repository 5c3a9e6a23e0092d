"""Configs drawn from a schema, sound and broken, the same ones in every run.

New knobs are met by themselves: values are drawn from the types of the dataclasses' fields.
"""

import json
import types
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml

INTEGERS = (0, 1, 2, 3, 4, 8, 12, 16, 64, 512, 65536)
FLOATS = (0.0, 1e-6, 0.07, 0.1, 0.25, 0.5, 0.9, 1.0, 2.5, 50.0)
TEXTS = (
    "a",
    "runs/b c",
    "data/manifest.json",
    "naïve-✓",
    "x=y",
    "on",
    "12:30",
    "~",
    "null",
    "1.10",
    "#",
    "a: b",
    "${x}",
)

VALUES: tuple[Any, ...] = (
    *(None, True, "", " ", "\u202e\u2028", "\x1b[2J\x07", "a\nb", "\0", "é" * 300, "x" * 100_000, "\ud800"),
    *(float("nan"), float("inf"), -float("inf"), 1e308, -1, -0.0, 10**30, -(10**30), 2**63, -(2**63), 0.5, 1.0),
    *([], [[]], [1, 2, 3], ["a", None], [0.1, float("nan")], [{}], {}, {"a": {"b": 1}}, {1: 2}, "1", "0.5", "yes"),
    *(
        "???",
        "${seed}",
        "${oc.env:HOME}",
        "${oc.env:",
        "${",
        "\\${seed}",
        "$",
        "../../etc",
        "/",
        ".",
        "~root",
        "a" * 4097,
    ),
)
"""What fields may be given whatever their type."""
KEYS: tuple[Any, ...] = (
    "",
    " ",
    "a.b",
    "..",
    "\n",
    "\x1b[2J",
    "é",
    "x" * 100_000,
    1,
    1.5,
    True,
    None,
    (1, 2),
    "__class__",
)
"""Names that no field has."""
RAW = (
    "!!python/object/apply:os.system ['touch pwned']",
    "!!python/object/new:subprocess.Popen [[touch, pwned]]",
    "!!python/name:os.system",
    "!unknown x",
    "!!binary aGVsbG8=",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!!int x",
    "!!int ''",
    "!!float x",
    "!!bool x",
    "!!timestamp x",
    "!!null x",
    "!!map 3",
    "!!seq 3",
    "!!str [a]",
    "2001-99-99",
    "2001-01-01",
    "2001-01-01T99:99:99Z",
    "12:30:59",
    "0x",
    "0b2",
    "0o17",
    "1_000",
    "_",
    "9" * 5000,
    "0x" + "f" * 5000,
    "1e999",
    ".nan",
    "-.INF",
    "=",
    "<<",
    "&a [*a]",
    "&a {b: *a}",
    "*nowhere",
    "&a 3",
    "[" * 10_000,
    "[" * 400 + "]" * 400,
    "{a: " * 400 + "1" + "}" * 400,
    "[" * 90 + "]" * 90,
    "{[1]: 2}",
    "{{a: 1}: 2}",
    "? a",
    "- a",
    "|",
    ">-",
    "'",
    '"',
    '"\\x"',
    '"\\ud800"',
    '"\\0"',
    "@a",
    "`a`",
    "%a",
    "a: b: c",
    "{a: 1, a: 2}",
    "[a, b",
    "]",
    "--- 3",
    "...",
)
"""What YAML may make of a value's text, or refuse to."""
LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n"
    for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)
"""Ten lines that stand for 2 * 8**9 values."""


class Given(NamedTuple):
    """What a command line names."""

    file: str
    """The config's file name."""
    content: bytes | None
    """Of the file; None for what is no file."""
    overrides: list[str]


def leaves(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of a schema with their types."""
    for f in fields(schema):
        if isinstance(f.type, type) and is_dataclass(f.type):
            yield from leaves(f.type, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f.type


def sections(schema: type, prefix: str = "") -> Iterator[str]:
    for f in fields(schema):
        if isinstance(f.type, type) and is_dataclass(f.type):
            yield prefix + f.name
            yield from sections(f.type, f"{prefix}{f.name}.")


def value_of(kind: Any, random: Random) -> Any:
    """A value of a field's type, as YAML would hold it."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return random.choice(inner)
    if origin in (Union, types.UnionType):
        return value_of(random.choice(inner), random)
    if origin is tuple and Ellipsis not in inner:
        return [value_of(one, random) for one in inner]
    if origin in (tuple, list):
        return [value_of(inner[0], random) for _ in range(random.randint(0, 3))]
    if origin is dict:
        return {random.choice(TEXTS): value_of(inner[1], random) for _ in range(random.randint(0, 3))}
    simple: dict[Any, Callable[[], Any]] = {
        int: lambda: random.choice(INTEGERS),
        float: lambda: random.choice(FLOATS),
        bool: lambda: random.random() < 0.5,
        str: lambda: random.choice(TEXTS),
        type(None): lambda: None,
        Any: lambda: random.choice((1, 0.5, "a", None, [1, 2])),
    }
    return simple[kind]()


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested sections."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        inside = tree
        for part in path:
            inside = inside.setdefault(part, {})
        inside[last] = value
    return tree


def written(value: Any) -> str:
    """A value as a command line holds it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def sound(schema: type, random: Random, base: dict[str, Any], most: int = 5) -> Given:
    """Some fields with values of their types, in the file or on the command line: sound unless out of range."""
    chosen = dict(random.sample(list(leaves(schema)), random.randint(0, most)))
    values = {key: value_of(kind, random) for key, kind in chosen.items() if key not in base}
    over = [f"{key}={written(values.pop(key))}" for key in list(values) if random.random() < 0.4]
    text = yaml.safe_dump(nested(base | values), sort_keys=False, allow_unicode=True)
    return Given("run.yaml", text.encode(), over)


def broken(schema: type, random: Random, base: dict[str, Any]) -> Given:
    """Something is wrong, or at least odd."""
    return random.choice(BREAKS)(schema, random, base)


def _odd_value(schema: type, random: Random, base: dict[str, Any]) -> Given:
    key, value = random.choice(list(leaves(schema)))[0], random.choice(VALUES)
    return _file(nested(base | {key: value}))


def _odd_override(schema: type, random: Random, base: dict[str, Any]) -> Given:
    key, value = random.choice(list(leaves(schema)))[0], random.choice(VALUES)
    return _over(base, [f"{key}={written(value)}".replace("\0", "")])  # no command line holds a NUL


def _odd_key(schema: type, random: Random, base: dict[str, Any]) -> Given:
    tree = nested(base)
    inside = random.choice([tree, *(value for value in tree.values() if isinstance(value, dict))])
    inside[random.choice(KEYS)] = random.choice((1, None, {}, {"a": 1}))
    return _file(tree)


def _odd_override_key(schema: type, random: Random, base: dict[str, Any]) -> Given:
    key = random.choice([str(key) for key in KEYS] + ["=", "a..b", ".a", "a.", "+seed", "~seed", "seed@x", "data[0]"])
    return _over(base, [f"{key}={random.choice(RAW)}"])


def _typo(schema: type, random: Random, base: dict[str, Any]) -> Given:
    key = random.choice([key for key, _ in leaves(schema)] + list(sections(schema)))
    place = random.randrange(len(key))
    wrong = key[:place] + random.choice("abcxyz_.") + key[place + random.randint(0, 1) :]
    if random.random() < 0.5:
        return _over(base, [f"{wrong}=1"])
    return _file(nested(base) | {wrong: 1})


def _wrong_level(schema: type, random: Random, base: dict[str, Any]) -> Given:
    if (known := list(sections(schema))) and random.random() < 0.5:
        return _over(base, [f"{random.choice(known)}={random.choice(['3', '[1]', '', 'x', 'null'])}"])
    key, tree = random.choice(list(leaves(schema)))[0], nested(base)
    parts = key.split(".")
    inside = tree
    for part in parts[:-1]:
        inside = inside.setdefault(part, {})
    inside[parts[-1]] = random.choice(({"a": 1}, {parts[-1]: {parts[-1]: 1}}, {1: {2: {}}}))
    return _file(tree)


def _raw_value(schema: type, random: Random, base: dict[str, Any]) -> Given:
    key, raw = random.choice(list(leaves(schema)))[0], random.choice(RAW)
    if random.random() < 0.5:
        return _over(base, [f"{key}={raw}"])
    *path, last = key.split(".")
    lines = [f"{'  ' * depth}{part}:" for depth, part in enumerate(path)] + [f"{'  ' * len(path)}{last}: {raw}"]
    return Given("run.yaml", ("\n".join(lines) + "\n").encode(), [f"{k}={written(v)}" for k, v in base.items()])


def _raw_file(schema: type, random: Random, base: dict[str, Any]) -> Given:
    whole = yaml.safe_dump(nested(base)).encode()
    key = next(key for key, _ in leaves(schema) if "." not in key)
    contents = (
        *(raw.encode("utf-8", "surrogatepass") for raw in RAW),
        LAUGHS.encode(),
        f"{LAUGHS}{key}: *j\n".encode(),
        LAUGHS.replace("[", "{<<: [").replace("]", "]}").encode(),
        f"{key}: 1\n{key}: 2\n".encode(),
        whole + whole,
        whole + b"---\n" + whole,
        whole[:-3],
        whole + b"\xff\xfe",
        whole + b"\0",
        whole + b"\t- x: [",
        whole + b"\x85\xc2\x85",
        b"\xef\xbb\xbf" + whole,
        whole.decode().encode("utf-16"),
        whole.decode().encode("utf-32"),
        b"%YAML 9.9\n---\n" + whole,
        b"%TAG ! tag:x,2000:\n---\n" + whole,
        whole.replace(b"\n", b"\r\n"),
        whole.replace(b"\n", b"\r"),
        random.randbytes(300),
        bytes(range(256)),
        b"",
        b"#",
        b"\n" * 10_000,
        b"PK\x03\x04" + random.randbytes(50),
        b"\x7fELF" + bytes(99),
        b"a" * 200_000,
        b": " * 5000,
        b"- " * 5000,
        b"? " * 5000,
        b"x: 1\n" * 100,
        b"".join(b"k%d: 1\n" % n for n in range(500)),
        b"#" * 1_100_000,
    )
    return Given("run.yaml", random.choice(contents), [])


def _flipped(schema: type, random: Random, base: dict[str, Any]) -> Given:
    """A sound file with a few bytes altered."""
    content = bytearray(sound(schema, random, base).content or b"")
    for _ in range(random.randint(1, 4)):
        content[random.randrange(len(content))] = random.choice(b"\0\x1b\xff{}[]:,&*!|>'\"%@`#-?\n\t 0aZ~")
    return Given("run.yaml", bytes(content), [])


def _no_file(schema: type, random: Random, base: dict[str, Any]) -> Given:
    names = (
        "folder",
        "gone.yaml",
        "rum.yaml",
        "run.yaml/x",
        "loop.yaml",
        "x" * 300,
        "a\nb.yaml",
        "\x1b[2J",
        "\udcff.yaml",
        "",
    )
    return Given(random.choice(names), None, [])


def _no_override(schema: type, random: Random, base: dict[str, Any]) -> Given:
    words = ("seed", "", "=", "=1", "a" * 100_000, "\n", "é", "\udcff", "a b", "{seed: 1}")
    return _over(base, [random.choice(words)])


BREAKS = (
    _odd_value,
    _odd_override,
    _odd_key,
    _odd_override_key,
    _typo,
    _wrong_level,
    _raw_value,
    _raw_file,
    _flipped,
    _no_file,
    _no_override,
)


def _over(base: dict[str, Any], overrides: list[str]) -> Given:
    return Given("run.yaml", yaml.safe_dump(nested(base)).encode(), overrides)


def _file(tree: dict[Any, Any]) -> Given:
    """As PyYAML writes it, with escapes for what it cannot show."""
    return Given("run.yaml", yaml.dump(tree, sort_keys=False).encode("utf-8", "surrogatepass"), [])


def place(folder: Path, given: Given) -> None:
    """Put the file where the command looks for it."""
    (folder / "folder").mkdir(exist_ok=True)
    if not (folder / "loop.yaml").is_symlink():
        (folder / "loop.yaml").symlink_to("loop.yaml")
    if given.content is not None:
        (folder / given.file).write_bytes(given.content)

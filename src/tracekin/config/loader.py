"""From the defaults, a YAML file and ``key=value`` overrides to a frozen object; the only importer of omegaconf.

A key that is a word of Python, ``init.from``, is a field with an underscore behind it: ``from_``.
"""

import difflib
import keyword
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tracekin.config import plainyaml
from tracekin.config.errors import UserError, holds_control
from tracekin.config.knobs import Config

T = TypeVar("T")
MERGE_ERRORS = (OmegaConfBaseException, ValueError, TypeError, OverflowError, RecursionError)
TEXTS = (list[str], tuple[str, ...])
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def load(schema: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Build a config: the schema's defaults, then the YAML file, then ``key=value`` overrides.

    Args:
        schema: a frozen dataclass.
        path: YAML file that states its difference from the defaults, or None.
        overrides: ``key=value`` with dots between levels and YAML values, such as ``train.epochs=3``.

    Returns:
        A plain ``schema`` object.

    Raises:
        UserError: missing or unreadable file, unknown key (with a suggestion), wrong type, value out of range.
    """
    merged = _defaults(schema)  # type: ignore[arg-type]  # mypy takes type[T] for no Hashable
    if path is not None:
        merged = _merge(schema, merged, _read_yaml(Path(path)), str(path))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(f"{override!r} is not an override: write key=value, for example train.epochs=3.")
        try:
            parsed: Any = plainyaml.parse(value)
        except ValueError as error:
            raise UserError(f"the value in {override!r} is not YAML: {error}.") from None
        if _is_text(schema, key) and not isinstance(parsed, str | None):
            parsed = value  # YAML takes on for True, 12:30 for 750 and 1.10 for 1.1
        for part in reversed(key.split(".")):
            parsed = {part: parsed}
        merged = _merge(schema, merged, parsed, "the command line")
    try:
        loaded: T = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise UserError(f"{path or 'the configuration'}: {_first_line(error)}.") from None
    for key, value in flat(to_dict(loaded)):
        _check_value(value, f"{path or 'the configuration'}: {key}")
    return loaded


def to_yaml(config: object) -> str:
    """The config as YAML, every key resolved; ``load`` reads it back."""
    # Not by OmegaConf, which takes 30 ms: a sweep writes thousands.
    return yaml.dump(to_dict(config), Dumper=_DUMPER, sort_keys=False, allow_unicode=True)


def to_dict(config: object) -> dict[str, Any]:
    """The config as plain nested dictionaries, lists and scalars."""
    assert is_dataclass(config)
    assert not isinstance(config, type)
    found: dict[str, Any] = _plain(asdict(config))
    return found


def shareable(config: Config, dataset: str) -> dict[str, Any]:
    """``to_dict`` for whoever is not on this machine: no path of it, and the dataset's name for its manifest."""
    found = to_dict(config)
    del found["folder"], found["data"]["cache"]
    found["data"]["manifest"] = dataset
    found["init"]["from"] = config.init.from_ and Path(config.init.from_).name
    return found


def attribute(key: str) -> str:
    """The field of a config's class that holds a key: itself, with an underscore behind a word of Python."""
    return f"{key}_" if keyword.iskeyword(key) else key


def _key(name: str) -> str:
    """The key of a field: what ``attribute`` undoes."""
    return name[:-1] if keyword.iskeyword(name[:-1]) else name


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {_key(str(key)): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


@lru_cache
def _defaults(schema: type) -> Any:
    return OmegaConf.structured(schema)  # takes as long as all the rest; merging copies it


def _check_value(value: Any, where: str) -> None:
    """Refuse what no knob means, and what arrays, files and terminals would choke on later."""
    if isinstance(value, list):
        for inner in value:
            _check_value(inner, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}={value} is not a finite number.")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UserError(f"{where} is out of range: accepted are whole numbers of 64 bits, {-(2**63)} to {2**63 - 1}.")
    elif isinstance(value, str) and holds_control(
        value.replace("\n", "")
    ):  # a profile's lines of shell may be one text
        raise UserError(f"{where}={value!r} holds a control character; remove it.")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = plainyaml.read(path)
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"no such config file: {path}.{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read config file {path}: {error}.") from None
    except ValueError as error:
        raise UserError(f"{path} is not YAML of plain values: {error}.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, not key: value lines.")
    return content


def _merge(schema: type, base: Any, extra: dict[str, Any], where: str) -> Any:
    _check_keys(schema, extra, "", where)
    try:
        extra = _literal(extra)
        try:
            return OmegaConf.merge(base, _attributes(schema, extra))
        except MERGE_ERRORS:
            for leaf in _leaves(extra):  # one by one, so that an error without a key can be given one
                extra = leaf
                base = OmegaConf.merge(base, _attributes(schema, leaf))
            raise
    except MERGE_ERRORS as error:
        full = getattr(error, "full_key", None)
        key = ".".join(map(_key, full.split("."))) if full else _key_of(extra)
        raise UserError(f"{where}: {key}: {_first_line(error)}.") from None


def _literal(value: Any) -> Any:
    """Texts mean what they say: OmegaConf would put other keys and environment variables in place of ``${...}``."""
    if isinstance(value, dict):
        return {key: _literal(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_literal(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _check_keys(schema: type, extra: dict[str, Any], prefix: str, where: str) -> None:
    known = {_key(f.name): f for f in fields(schema)}
    for key, value in extra.items():
        full = f"{prefix}{key}"
        if key not in known:
            every = _all_keys(schema, prefix)
            near = (
                difflib.get_close_matches(full, every, 1, 0.6)
                or [k for k in _all_keys(schema, "") if not prefix and k.split(".")[-1] == key][:1]
            )
            hint = f"did you mean {near[0]}?" if near else f"accepted here: {', '.join(known)}."
            raise UserError(f"{where}: unknown key {full}; {hint}")
        inner = known[key].type
        if isinstance(inner, type) and is_dataclass(inner):
            if not isinstance(value, dict):
                inside = ", ".join(_key(f.name) for f in fields(inner))
                raise UserError(f"{where}: {full} is a section, not a value; accepted in it: {inside}.")
            _check_keys(inner, value, f"{full}.", where)
        elif _is_text(schema, key) and not isinstance(value, str | None):
            raise UserError(f"{where}: YAML reads {full} as {_shown(value)}; put the text in quotes.")
        elif isinstance(value, str) and "${" in value and not _is_text(schema, key):
            raise UserError(f"{where}: {full} is {value!r}; nothing is put in place of ${{...}}: write the value out.")
        elif inner in TEXTS and isinstance(value, list) and not all(isinstance(text, str) for text in value):
            raise UserError(f"{where}: {full} is a list of texts; YAML reads {_shown(value)}. Put each text in quotes.")


def _leaves(tree: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from ({key: leaf} for leaf in _leaves(value))
        else:
            yield {key: value}


def _attributes(schema: type, tree: dict[str, Any]) -> dict[str, Any]:
    """A tree of known keys, each under its field's name."""
    kinds = {f.name: f.type for f in fields(schema)}
    found = {}
    for key, value in tree.items():
        kind = kinds[attribute(key)]
        if isinstance(kind, type) and is_dataclass(kind):
            value = _attributes(kind, value)
        found[attribute(key)] = value
    return found


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested dictionaries."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_text(schema: type, key: str) -> bool:
    """Whether the field of a dotted key is text."""
    first, _, rest = key.partition(".")
    kind = next((f.type for f in fields(schema) if _key(f.name) == first), None)
    if rest:
        return isinstance(kind, type) and is_dataclass(kind) and _is_text(kind, rest)
    return kind in (str, str | None)


def _key_of(leaf: dict[str, Any]) -> str:
    key, value = next(iter(leaf.items()))
    return f"{key}.{_key_of(value)}" if isinstance(value, dict) and value else key


def _all_keys(schema: type, prefix: str) -> list[str]:
    keys = []
    for f in fields(schema):
        keys.append(prefix + _key(f.name))
        if isinstance(f.type, type) and is_dataclass(f.type):
            keys += _all_keys(f.type, f"{prefix}{_key(f.name)}.")
    return keys


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # Python writes out no numbers of thousands of digits
        return type(value).__name__


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[0].rstrip(".")

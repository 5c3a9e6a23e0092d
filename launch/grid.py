"""A sweep: from a grid file to resolved configs, each named after what it computes.

A sweep's folder is FOLDER/sweeps/NAME. It holds the runs, and the plan that the jobs and the table read: sweep.yaml
(every key resolved) and elements.json (name, assignment, run folder and data of each element).
"""

import difflib
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from tracekin.config import SHAPING, Config, EvaluateConfig, UserError, attribute, flat, load, to_dict, to_yaml
from tracekin.files import write_text
from tracekin.train.checks import FREE_KEYS, FREE_SECTIONS

NUM_DIGITS = 8
LONGEST_LABEL = 80
MOST_ELEMENTS = 100_000
"""Runs of a sweep: beyond what a cluster works off, and what a slip of a few more values soon comes to."""
Assignment = dict[str, Any]


@dataclass(frozen=True)
class SweepConfig:
    """A grid of pretraining runs, each evaluated, and one table of all."""

    name: str = ""
    """The sweep's name; empty takes the file's, without .yaml. Its folder is `folder`/sweeps/`name`."""
    folder: str = "runs"
    """Folder of the runs."""
    config: str = ""
    """The YAML file of a pretraining run that every element starts from."""
    overrides: list[str] = field(default_factory=list)
    """key=value for every element, over `config`."""
    grid: dict[str, Any] = field(default_factory=dict)
    """Key of tracekin's Config -> list of its values, such as mining.policy, seed or data.manifest; every
    combination is an element, a run of its own."""
    exclude: list[dict[str, Any]] = field(default_factory=list)
    """Combinations to leave out: an element that agrees with every key of one entry."""
    evaluate: list[str] = field(default_factory=list)
    """key=value for every evaluation (EvaluateConfig)."""
    parallel: int = 0
    """Elements of one array that run at the same time at most; 0 sets no limit. More elements than Slurm's MaxArraySize
    are several arrays, and the evaluations are arrays of their own."""

    def __post_init__(self) -> None:
        if self.parallel < 0:
            raise UserError(f"parallel={self.parallel} is out of range: accepted is 0 (no limit) or more.")


class Element(NamedTuple):
    """One run of a sweep."""

    name: str
    """Readable values of the grid's keys, and the digits of ``digest``."""
    assignment: Assignment
    """Grid key -> value, as the sweep's file has it."""
    config: Config


class Planned(NamedTuple):
    """An element as elements.json keeps it."""

    name: str
    assignment: Assignment
    run: Path
    manifest: str
    """Of the data it trains on."""


def read_sweep(path: str | Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Read and check a sweep's file; ``key=value`` overrides its keys, such as ``grid.seed=[0,1,2]``.

    Raises:
        UserError: missing file, unknown key, a name that is no folder name, no grid or an empty or missing list of
            values in it, wrong settings of the evaluation.
    """
    sweep = load(SweepConfig, path, overrides)
    sweep = replace(
        sweep,
        name=sweep.name or Path(path).stem,
        grid=dict(flat(sweep.grid)),  # sections inside the grid are welcome: mining: {policy: [...]}
        exclude=[dict(flat(entry)) for entry in sweep.exclude],
    )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", sweep.name):
        raise UserError(f"{path}: name={sweep.name!r} is no folder name; use letters, digits, and - _ . inside.")
    if not sweep.config:
        raise UserError(
            f"{path}: config is missing; name the YAML file of a run, for example config: configs/demo.yaml."
        )
    if not sweep.grid:
        raise UserError(f"{path}: grid is empty; give at least one key a list of values, for example seed: [0, 1].")
    for key, values in sweep.grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{path}: grid.{key}={values!r} is no list of values; write for example [{values or 0}].")
    _check_grid_keys(sweep, str(path))
    try:
        load(EvaluateConfig, None, sweep.evaluate)
    except UserError as error:
        raise UserError(f"{path}: evaluate: {_reason(error)}") from None
    return sweep


def sweep_folder(sweep: SweepConfig) -> Path:
    """Folder of the sweep's runs, plan and tables."""
    return Path(sweep.folder) / "sweeps" / sweep.name


def elements(sweep: SweepConfig) -> list[Element]:
    """The sweep's runs, in the order of the grid: its last key varies fastest.

    A run that lies in the sweep's folder already keeps its name, whatever the grid's keys are called by now.

    Raises:
        UserError: no element is left, an exclusion that matches none, an unknown key or a wrong value, a missing base
            config, two elements that compute the same.
    """
    points = _points(sweep)
    configs = _resolve(sweep, points)
    known = _names_by_digest(sweep_folder(sweep))
    found: dict[str, Element] = {}
    for point, config in zip(points, configs, strict=True):
        code = digest(config)
        name = known.get(code) or f"{_label(point)}-{code}"
        if code in found:
            raise UserError(
                f"sweep {sweep.name}: the elements {describe(found[code].assignment)} and {describe(point)} compute the"
                " same; leave one out with exclude, or remove the value from grid."
            )
        found[code] = Element(name, point, replace(config, folder=sweep.folder, name=f"sweeps/{sweep.name}/{name}"))
    return list(found.values())


def digest(config: Config) -> str:
    """Hexadecimal digits of what a run computes: SHA-256 of its config without the keys that do not alter results."""
    kept = {
        key: value for key, value in flat(asdict(config)) if key not in FREE_KEYS and not key.startswith(FREE_SECTIONS)
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:NUM_DIGITS]


def describe(assignment: Mapping[str, Any]) -> str:
    """An assignment on one line: ``mining.policy=none seed=0``."""
    return " ".join(f"{key}={_text(value)}" for key, value in assignment.items())


def write_plan(folder: Path, sweep: SweepConfig, planned: Iterable[Element]) -> None:
    """Write sweep.yaml and elements.json into the sweep's folder, which is made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "name": element.name,
            "assignment": element.assignment,
            "run": str(element.config.run_folder),
            "manifest": element.config.data.manifest,
        }
        for element in planned
    ]
    lines = ",\n".join(json.dumps(row) for row in rows)
    for name, text in (("elements.json", f"[\n{lines}\n]\n"), ("sweep.yaml", to_yaml(sweep))):
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:  # a table older than its plan is out of date
            write_text(path, text)


def read_plan(folder: Path) -> tuple[SweepConfig, list[Planned]]:
    """What ``write_plan`` wrote.

    Raises:
        UserError: the folder holds no plan.
    """
    path = folder / "elements.json"
    if not path.is_file():
        raise UserError(
            f"{folder} is no sweep's folder: it has no elements.json. Make one with python -m launch.sweep."
        )
    rows = json.loads(path.read_text(encoding="utf-8"))
    planned = [Planned(row["name"], row["assignment"], Path(row["run"]), row["manifest"]) for row in rows]
    return load(SweepConfig, folder / "sweep.yaml"), planned


def _check_grid_keys(sweep: SweepConfig, where: str) -> None:
    known = [key for key, _ in flat(to_dict(Config()))]
    for key in [*sweep.grid, *(override.partition("=")[0] for override in sweep.overrides)]:
        if key in ("name", "folder"):
            raise UserError(f"{where}: the sweep names its runs itself; remove {key} from grid or overrides.")
    for key in sweep.grid:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1) or [k for k in known if k.split(".")[-1] == key][:1]
            hint = f"did you mean {near[0]}?" if near else "every key stands in tracekin/config/knobs.py."
            raise UserError(f"{where}: grid has the unknown key {key}; {hint}")
    for entry in sweep.exclude:
        for key in entry:
            if key not in sweep.grid:
                raise UserError(f"{where}: exclude names {key}, which grid does not vary: {', '.join(sweep.grid)}.")


def _points(sweep: SweepConfig) -> list[Assignment]:
    """Every combination of the grid's values that no exclusion matches."""
    if (count := math.prod(map(len, sweep.grid.values()))) > MOST_ELEMENTS:
        raise UserError(
            f"sweep {sweep.name}: grid has {count} elements; accepted are {MOST_ELEMENTS}. Split the sweep."
        )
    every = [dict(zip(sweep.grid, values, strict=True)) for values in itertools.product(*sweep.grid.values())]
    left = every
    for entry in sweep.exclude:
        if not any(_matches(point, entry) for point in every):
            raise UserError(
                f"sweep {sweep.name}: exclude: {describe(entry) or 'an empty entry'} matches no element; correct its"
                " values, which must be those of grid, or remove it."
            )
        left = [point for point in left if not _matches(point, entry)]
    if not left:
        raise UserError(f"sweep {sweep.name}: exclude leaves none of {len(every)} elements; remove an entry.")
    return left


def _matches(point: Assignment, entry: Assignment) -> bool:
    return bool(entry) and all(point[key] == value for key, value in entry.items())


def _resolve(sweep: SweepConfig, points: Sequence[Assignment]) -> list[Config]:
    """The config of each combination, put together from values that are known.

    Loading takes a tenth of a second, so only where a value is met first, to have it checked and converted, and for
    each combination of values that others are derived from.
    """
    load(Config, sweep.config)  # what is wrong with it alone is said without an element
    configs: list[Config] = []
    values: dict[str, Any] = {}  # key=value as written -> the value of the config
    shaped: dict[tuple[str, ...], Config] = {}  # what others are derived from, as written -> a config of it
    for point in points:
        where = f"sweep {sweep.name}, {describe(point)}"
        written = {key: f"{key}={_text(value)}" for key, value in point.items()}
        free = [key for key in point if not key.startswith(SHAPING)]
        shape = tuple(text for key, text in written.items() if key not in free)
        try:
            if shape in shaped and all(written[key] in values or _is_plain(key, point[key]) for key in free):
                exact = {key: values.get(written[key], point[key]) for key in free}
                configs.append(_with_values(shaped[shape], exact))
                continue
            config = load(Config, sweep.config, [*sweep.overrides, *written.values()])
        except UserError as error:
            raise UserError(f"{where}: {_reason(error)}") from None
        configs.append(config)
        shaped.setdefault(shape, config)
        values |= {written[key]: _value_of(config, key) for key in free}
    return configs


def _reason(error: UserError) -> str:
    return str(error).removeprefix("the command line: ")


def _with_values(section: Any, values: Mapping[str, Any]) -> Any:
    """A frozen dataclass with other values of dotted keys; the checks of every section run again."""
    changed: dict[str, Any] = {}
    for key, value in values.items():
        first, _, rest = key.partition(".")
        first = attribute(first)
        if rest:
            changed.setdefault(first, {})[rest] = value
        else:
            changed[first] = value
    for first, inner in changed.items():
        if is_dataclass(getattr(section, first)):
            changed[first] = _with_values(getattr(section, first), inner)
    return replace(section, **changed)


def _value_of(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, attribute(part))
    return value


def _is_plain(key: str, value: Any) -> bool:
    """Whether a value is a text or whole number whose field takes any: nothing to convert, like seeds and manifests."""
    kind: Any = Config
    for part in key.split("."):
        kind = next(f.type for f in fields(kind) if f.name == attribute(part))
    return kind in (int, str) and type(value) is kind


def _names_by_digest(folder: Path) -> dict[str, str]:
    """Names of the runs that lie in a sweep's folder, by the digits at their end."""
    names = [path.name for path in folder.iterdir() if path.is_dir()] if os.path.isdir(folder) else []
    found = (re.fullmatch(rf".*-([0-9a-f]{{{NUM_DIGITS}}})", name) for name in sorted(names))
    return {match[1]: match[0] for match in found if match}


def _label(point: Assignment) -> str:
    label = "-".join(filter(None, itertools.starmap(short, point.items())))
    return label[:LONGEST_LABEL].rstrip("-.") or "run"


def short(key: str, value: Any) -> str:
    """A value's part of a name: a text alone (a path's last part), anything else after the last part of its key."""
    text = _text(value)
    if isinstance(value, str):
        path = Path(value)
        text = path.parent.name if path.name == "manifest.json" and path.parent.name else path.name
    text = re.sub(r"[^A-Za-z0-9._+]+", "-", text).strip("-.")
    if isinstance(value, str):
        return text
    return f"{key.split('.')[-1]}{'' if text[:1].isdigit() else '_'}{text}"


def _text(value: Any) -> str:
    """A value as YAML reads it back: texts that YAML would take for something else in quotes."""
    return json.dumps(value, ensure_ascii=False, default=str) if not isinstance(value, str) else value

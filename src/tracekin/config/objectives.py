"""The objectives: what each brings of its own, and the knobs that belong to some of them only.

No torch here: a login node reads it.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from tracekin.config.errors import UserError, require

if TYPE_CHECKING:
    from tracekin.config.knobs import ModelConfig

SHAPING = ("objective.", "model.", "train.global_batch")
"""How keys begin from which ``resolved`` derives those that were left out."""

ObjectiveName = Literal["byol", "simsiam", "simclr", "moco", "barlow_twins", "vicreg", "wmse"]
"""The self-supervised losses; the registry of tracekin.objective, one file a name."""

FEATURES = {"resnet18": 512, "resnet34": 512, "resnet50": 2048, "resnet101": 2048, "resnet152": 2048}
"""Width of each backbone's features. Papers give the heads of ResNet-50; some widths are multiples of its features."""


@dataclass(frozen=True)
class ObjectiveConfig:
    name: ObjectiveName = "byol"
    """The self-supervised loss: byol, simsiam, simclr, moco, barlow_twins, vicreg or wmse. The keys below belong to the
    objectives that their sentences name; left out, they are the paper's."""
    tau_base: float | None = None
    """byol, moco: the target's EMA decay at step 0; it rises to 1 on a cosine (0.99; BYOL: 0.996 for 1000 epochs)."""
    temperature: float | None = None
    """simclr (0.1), moco (0.2; v3: 1.0): divides the cosines of the softmax."""
    version: Literal[2, 3] | None = None
    """moco: v2 (2) compares with a queue of past keys; v3 adds a predictor and compares with the batch's keys."""
    queue: int | None = None
    """moco v2: images whose keys are negatives, a multiple of train.global_batch (16 batches; the paper's 65,536 are a
    twentieth of ImageNet)."""
    norm: Literal["cross_rank", "shuffled"] | None = None
    """moco v2: batch norm over the batch of all ranks (cross_rank), or over `norm_groups` parts of it, keys in another
    order than queries (shuffled)."""
    norm_groups: int | None = None
    """moco v2 with norm=shuffled: parts of the global batch with their own statistics, a multiple of the ranks (8)."""
    redundancy: float | None = None
    """barlow_twins: weight of the terms off the diagonal (0.005)."""
    invariance: float | None = None
    """vicreg: weight of the distance between the views (25)."""
    variance: float | None = None
    """vicreg: weight of the hinge on the standard deviations (25)."""
    covariance: float | None = None
    """vicreg: weight of the covariances (1)."""
    sub_batch: int | None = None
    """wmse: images that are whitened together, more than model.projection, best twice as many; it divides
    train.global_batch (the largest such number up to 128)."""

    def __post_init__(self) -> None:
        allowed = own(self.name, self.version, self.norm).options
        for key in (key for key in _KEYS if getattr(self, key) is not None and key not in allowed):
            owners = [name for name in get_args(ObjectiveName) if key in _every_option(name)]
            whose = f"it belongs to objective.name={' and '.join(owners)}"
            if self.name in owners:
                whose = f"it does not go with objective.version={self.version or 2}, norm={self.norm or 'cross_rank'}"
            mine = ", ".join(f"objective.{option}" for option in allowed) or "no key"
            raise UserError(
                f"objective.{key}={getattr(self, key)}: {whose}; objective.name={self.name} takes {mine}. Leave it out."
            )
        for key in ("redundancy", "invariance", "variance", "covariance"):
            require((getattr(self, key) or 0) >= 0, f"objective.{key}", getattr(self, key), "0 or more")
        for key in ("norm_groups", "sub_batch", "queue"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"objective.{key}", value, "1 or more")
        require(self.tau_base is None or 0 <= self.tau_base <= 1, "objective.tau_base", self.tau_base, "0 <= x <= 1")
        temperature = self.temperature
        require(temperature is None or temperature > 0, "objective.temperature", temperature, "above 0")

    def option(self, key: str) -> Any:
        """The value of a key that belongs to this objective, in a config that is ``resolved``."""
        value = getattr(self, key)
        assert value is not None, (self.name, key)
        return value


_KEYS = [key for key in ObjectiveConfig.__dataclass_fields__ if key != "name"]


class Own(NamedTuple):
    """What an objective brings: its paper, its widths and its options with their defaults (None: see ``resolved``)."""

    paper: str
    widths: dict[str, int | str]
    """Of ``model``; ``"4x"`` is four times the features."""
    options: dict[str, Any]
    momentum: bool = False
    """A target network follows by EMA."""
    negatives: bool = False
    """Other images are pushed away, so that a mined one can be left out of them (mining.mode=eliminate)."""
    each: bool = False
    """An image's loss depends on no other image but through batch norm: its gradient is its own."""


def own(name: str, version: int | None = None, norm: str | None = None) -> Own:
    """What the objective of a name brings, in a version."""
    if name == "moco":
        return _moco(version or 2, norm or "cross_rank")
    return _OWN[name]


_OWN = {
    "byol": Own(
        "arXiv 2006.07733",
        {"projector_hidden": 4096, "projection": 256, "predictor_hidden": 4096},
        {"tau_base": 0.99},
        momentum=True,
        each=True,
    ),
    "simsiam": Own(
        "arXiv 2011.10566", {"projector_hidden": 2048, "projection": 2048, "predictor_hidden": 512}, {}, each=True
    ),
    "simclr": Own(
        "arXiv 2002.05709", {"projector_hidden": "1x", "projection": 128}, {"temperature": 0.1}, negatives=True
    ),
    "barlow_twins": Own("arXiv 2103.03230", {"projector_hidden": "4x", "projection": "4x"}, {"redundancy": 0.005}),
    "vicreg": Own(
        "arXiv 2105.04906",
        {"projector_hidden": "4x", "projection": "4x"},
        {"invariance": 25.0, "variance": 25.0, "covariance": 1.0},
    ),
    "wmse": Own("arXiv 2007.06346", {"projector_hidden": 1024, "projection": 64}, {"sub_batch": None}),
}


def _moco(version: int, norm: str) -> Own:
    options: dict[str, Any] = {"version": version, "tau_base": 0.99}
    if version == 3:
        widths: dict[str, int | str] = {"projector_hidden": 4096, "projection": 256, "predictor_hidden": 4096}
        return Own("arXiv 2104.02057", widths, options | {"temperature": 1.0}, momentum=True, negatives=True)
    options |= {"temperature": 0.2, "queue": None, "norm": norm}
    if norm == "shuffled":
        options["norm_groups"] = 8
    return Own(
        "arXiv 2003.04297", {"projector_hidden": "1x", "projection": 128}, options, momentum=True, negatives=True
    )


def _every_option(name: str) -> set[str]:
    return {*own(name, 2, "shuffled").options, *own(name, 3).options}


def resolved(
    objective: ObjectiveConfig, model: "ModelConfig", global_batch: int
) -> tuple[ObjectiveConfig, "ModelConfig"]:
    """Both sections with every width and option that was left out filled in.

    Raises:
        UserError: a predictor's width for an objective without one, a queue that the batch does not divide, sub-batches
            that do not divide the batch or are too small for the whitening.
    """
    brought = own(objective.name, objective.version, objective.norm)
    options = dict(brought.options)
    if "queue" in options:
        options["queue"] = 16 * global_batch
    if "sub_batch" in options:
        options["sub_batch"] = max(size for size in range(1, min(128, global_batch) + 1) if global_batch % size == 0)
    objective = replace(objective, **{key: value for key, value in options.items() if getattr(objective, key) is None})
    if model.predictor_hidden and "predictor_hidden" not in brought.widths:
        version = f", version={objective.version}," if objective.version else ""
        raise UserError(
            f"model.predictor_hidden={model.predictor_hidden}: objective.name={objective.name}{version} has no"
            " predictor; leave it out."
        )
    widths = {key: _width(value, model.backbone) for key, value in brought.widths.items()}
    if objective.name in ("barlow_twins", "vicreg"):
        # Correlations of N images are off by 1 / sqrt(N), and there are D^2: the papers have D = 4 N.
        widths["projection"] = min(widths["projection"], 4 * global_batch)
    if objective.name == "wmse":
        # The paper whitens twice as many images as dimensions. Of one dimension whitening leaves signs: no gradient.
        widths["projection"] = max(2, min(widths["projection"], objective.option("sub_batch") // 2))
    model = replace(model, **{key: value for key, value in widths.items() if not getattr(model, key)})  # type: ignore[arg-type]
    if objective.queue is not None and objective.queue % global_batch:
        raise UserError(
            f"objective.queue={objective.queue} is no multiple of train.global_batch={global_batch}, by which it moves"
            f" on; accepted are {global_batch}, {2 * global_batch}, ..., for example {16 * global_batch}."
        )
    if (size := objective.sub_batch) is not None:
        if global_batch % size:
            raise UserError(f"objective.sub_batch={size} does not divide train.global_batch={global_batch}.")
        if size <= model.projection:
            narrower = f"model.projection up to {size - 1}, best {size // 2}, or " if size > 2 else ""
            raise UserError(
                f"objective.sub_batch={size} images cannot be whitened in model.projection={model.projection}"
                f" dimensions: accepted is {narrower}a larger sub_batch that divides"
                f" train.global_batch={global_batch}, or a larger batch."
            )
    return objective, model


def _width(value: int | str, backbone: str) -> int:
    return value if isinstance(value, int) else int(value[:-1]) * FEATURES[backbone]

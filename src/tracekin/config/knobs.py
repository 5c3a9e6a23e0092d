"""Every knob on one page: frozen dataclasses. The sentence under each field is the manual."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tracekin.config.errors import UserError, require
from tracekin.config.objectives import ObjectiveConfig, own, resolved

Policy = Literal[
    "none",
    "tracin",
    "tracin_cosine",
    "tracin_cp",
    "tracin_cp_cosine",
    "ghost",
    "ghost_cosine",
    "agreement",
    "feature",
    "fnc",
    "group",
    "random",
    "oracle",
]
"""What mines the positive; the registry of tracekin.influence.policies, one file a name (`none` mines nothing)."""

LONGEST_PART, LONGEST_PATH = 255, 3500
"""Bytes of a run folder's path; Linux takes 4095, what lies in the folder included."""


@dataclass(frozen=True)
class AugmentConfig:
    preset: Literal["dermoscopy", "xray", "microscopy", "ct"] = "dermoscopy"
    """Modality whose ranges are the defaults of the fields below (tracekin.data.augment.PRESETS)."""
    crop_min: float | None = None
    """Smallest share of the image's area that a random crop keeps, in (0, 1]."""
    jitter: float | None = None
    """Strength of colour jitter: multiplies the preset's ranges (BYOL: 1, of .4, .4, .2, .1), 0 is none."""
    grey: float | None = None
    """Probability of turning a view grey."""
    blur: tuple[float, float] | None = None
    """Probability of a Gaussian blur in the first and the second view (BYOL: 1.0, 0.1)."""
    solarise: tuple[float, float] | None = None
    """Probability of solarisation in the first and the second view (BYOL: 0, 0.2)."""

    def __post_init__(self) -> None:
        if self.crop_min is not None:
            require(0 < self.crop_min <= 1, "data.augment.crop_min", self.crop_min, "0 < x <= 1")
        if self.jitter is not None:
            require(0 <= self.jitter <= 2, "data.augment.jitter", self.jitter, "0 <= x <= 2")
        for key in ("grey", "blur", "solarise"):
            value = getattr(self, key)
            for p in () if value is None else value if isinstance(value, tuple | list) else (value,):
                require(0 <= p <= 1, f"data.augment.{key}", value, "probabilities, 0 <= p <= 1")


@dataclass(frozen=True)
class DataConfig:
    manifest: str = "data/phantom/manifest.json"
    """The manifest.json that shards.pack wrote. Pretraining reads its train split only."""
    image_size: int = 64
    """Side of the square views, pixels."""
    channels: Literal[1, 3] = 3
    """Channels the encoder sees; images are converted."""
    workers: int = 1
    """Loader processes a rank; 0 loads in the rank itself."""
    last_batch: Literal["drop", "wrap"] = "drop"
    """What an epoch does with the images that cannot fill its last global batch: leave them for another epoch, or fill
    the batch up with the first images of the same epoch."""
    shuffle_shards: int = 0
    """Shards whose samples are shuffled together, in an order of shards that changes every epoch; 0 shuffles all
    samples. Choose few (16) for remote shards that do not all fit into the cache."""
    streams: int = 1
    """Parts into which an epoch's shards are dealt; each global batch takes equal shares of all of them. With as many
    as there are nodes, each node reads shards of its own. It must divide train.global_batch."""
    max_bad_fraction: float = 0.01
    """Share of the train split that an epoch may find unreadable; each such image is replaced by another, counted and
    logged with its key. Above it the run stops at the next line of metrics."""
    cache: str = ""
    """Folder of this node's cache of remote shards, shared by its ranks; empty takes one in $TMPDIR or /tmp."""
    cache_gb: float = 50.0
    """Size of the cache in GB; the shards used longest ago make room. One run needs two windows of shuffle_shards."""
    read_ahead: int = 16
    """Batches a loader process looks ahead to fetch remote shards before they are needed."""
    augment_on: Literal["workers", "device"] = "workers"
    """Where colour, blur and solarisation of the views are computed: one by one in the loader processes, or batched on
    the training device (for GPUs; slow on a CPU). Crops are always made by the loaders; both give the same bits."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        require(8 <= self.image_size <= 2048, "data.image_size", self.image_size, "8 to 2048 pixels")
        for key in ("workers", "shuffle_shards", "read_ahead"):
            require(getattr(self, key) >= 0, f"data.{key}", getattr(self, key), "0 or more")
        require(self.streams >= 1, "data.streams", self.streams, "1 or more")
        require(0 <= self.max_bad_fraction <= 1, "data.max_bad_fraction", self.max_bad_fraction, "0 <= x <= 1")
        require(self.cache_gb > 0, "data.cache_gb", self.cache_gb, "above 0")


@dataclass(frozen=True)
class ModelConfig:
    backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = "resnet18"
    """torchvision's ResNet; its classifier is removed, features are those after global pooling."""
    small_stem: bool = False
    """3x3 stride-1 stem without max pooling, for images of about 32 pixels (four times finer, 16 times the work)."""
    projector_hidden: int = 0
    """Width of the projector's hidden layers; 0, here and below, takes the objective's (BYOL: 4096, 256, 4096)."""
    projection: int = 0
    """Width of the projections and predictions that the loss compares."""
    predictor_hidden: int = 0
    """Width of the predictor's hidden layer, for objectives that have one (byol, simsiam, moco v3)."""

    def __post_init__(self) -> None:
        for key in ("projector_hidden", "projection", "predictor_hidden"):
            require(getattr(self, key) >= 0, f"model.{key}", getattr(self, key), "1 or more, or 0 for the objective's")

    @property
    def last_hidden(self) -> int:
        """Width of the last Linear layer's input; the influence factors are this wide."""
        return self.predictor_hidden or self.projector_hidden


@dataclass(frozen=True)
class InitConfig:
    from_: str | None = None
    """Key `init.from`: weights that the backbone starts from. A run's folder, a checkpoint's, what `tracekin export`
    wrote (all but onnx), or torchvision's weights on disk. The heads start fresh. A run that continues
    goes on from its own checkpoint."""


@dataclass(frozen=True)
class MiningConfig:
    policy: Policy = "tracin_cosine"
    """Score that chooses the additional positives; `none` is the plain objective. Files of
    tracekin/influence/policies."""
    mode: Literal["attract", "eliminate"] = "attract"
    """What is done with the mined images: pulled towards the anchor, or, where the objective has negatives (simclr,
    moco), only no longer pushed away (false-negative cancellation)."""
    weight: float = 0.25
    """Weight of the mined term beside the objective's loss (our reading of the paper); 0 mines to no effect."""
    warmup: float = 0.1
    """Share of all steps, from the first, that run without the mined term."""
    exclude_group: bool = True
    """Never mine an image of the anchor's own group (patient, lesion); policy `group` does nothing else."""
    k: int = 1
    """Positives an image, each weighted by its share of their scores."""
    keep: Literal["all", "mutual", "quantile"] = "all"
    """Keep every positive, those that chose the anchor too (a remembered image cannot), or those whose score reaches
    `quantile` of the step's."""
    quantile: float = 0.5
    """With keep=quantile: the share of positives, from the lowest score, that is masked."""
    pool: Literal["rank", "node", "global"] = "global"
    """Which ranks' images are candidates: this rank's own, those of its node, or all."""
    transport: Literal["fp32", "bf16"] = "fp32"
    """Precision in which gradient factors travel, for policies that use them; bf16 halves the bytes and changes some
    choices (README, Mining)."""
    sketch_dim: int = 0
    """Width to which a fixed random projection brings the hidden activations before they travel; 0 sends them whole."""
    ring_above: int = 65536
    """Columns above which hidden activations are not held but travel round a ring of ranks, block by block; the rest,
    4 KiB a column at the default widths, is held in any case."""
    chunk: int = 4096
    """Columns scored at a time; images a rank x chunk bounds the memory beyond the gathered pool."""
    queue: int = 0
    """Images of past steps that stay candidates, with the factors and targets of their step; 0 remembers none."""
    queue_half_life: float = 0.0
    """Steps after which a remembered image's score counts half; 0 gives all ages the same weight."""
    layers: int = 4
    """Policies ghost*: Linear layers of the heads, from the loss backwards, whose gradients are compared."""
    checkpoints: int = 2
    """Policies tracin_cp*: the run's last checkpoints beside the current weights; each costs a forward pass."""
    support_views: int = 0
    """Policy fnc: further augmented views of each image that vote; each costs a view's loading and projection."""
    compare: Policy = "none"
    """Also log how often this policy, one that needs no gradients, chooses the same positive."""

    def __post_init__(self) -> None:
        require(self.weight >= 0, "mining.weight", self.weight, "0 or more")
        require(0 <= self.warmup <= 1, "mining.warmup", self.warmup, "0 <= x <= 1")
        require(0 <= self.quantile <= 1, "mining.quantile", self.quantile, "0 <= x <= 1")
        for key in ("k", "chunk", "layers", "checkpoints"):
            require(getattr(self, key) >= 1, f"mining.{key}", getattr(self, key), "1 or more")
        require(self.layers <= 4, "mining.layers", self.layers, "1 to 4, the Linear layers of the heads")
        for key in ("sketch_dim", "ring_above", "queue", "queue_half_life", "support_views"):
            require(getattr(self, key) >= 0, f"mining.{key}", getattr(self, key), "0 or more")
        if self.queue and self.pool != "global":
            raise UserError(f"mining.queue={self.queue} remembers the global pool; it needs mining.pool=global.")
        if self.queue and self.policy.startswith("tracin_cp"):
            raise UserError(
                f"mining.queue={self.queue} remembers gradients under other checkpoints than those that"
                f" mining.policy={self.policy} sums over; set mining.queue=0."
            )
        if self.support_views and "fnc" not in (self.policy, self.compare):
            raise UserError(
                f"mining.support_views={self.support_views}: only mining.policy=fnc lets them vote; set it to 0."
            )
        if self.compare not in ("none", "feature", "fnc", "random", "oracle", "group"):
            raise UserError(
                f"mining.compare={self.compare} needs gradients; accepted: feature, fnc, group, oracle, random, none."
            )


@dataclass(frozen=True)
class OptimiserConfig:
    name: Literal["sgd", "adamw", "lars"] = "sgd"
    """LARS is for large batches; under AdamW the mined product is gradient similarity, not first-order influence."""
    lr: float | None = None
    """Peak learning rate: per 256 images a step for SGD (default 0.5) and LARS (0.3), as it is for AdamW (0.001)."""
    weight_decay: float = 1e-5
    """Weight decay; never applied to biases and batch norms."""
    momentum: float = 0.9
    """Momentum of SGD and LARS; beta_1 of AdamW."""
    warmup_epochs: float = 1.0
    """Epochs of linear warm-up before the cosine decay to 0."""

    def __post_init__(self) -> None:
        require(self.lr is None or self.lr > 0, "optimiser.lr", self.lr, "above 0")
        require(self.weight_decay >= 0, "optimiser.weight_decay", self.weight_decay, "0 or more")
        require(0 <= self.momentum < 1, "optimiser.momentum", self.momentum, "0 <= x < 1")
        require(self.warmup_epochs >= 0, "optimiser.warmup_epochs", self.warmup_epochs, "0 or more")


@dataclass(frozen=True)
class TrainConfig:
    epochs: int = 100
    """Passes over the train split."""
    global_batch: int = 256
    """Images a step over all ranks, shared equally; `data.last_batch` says what becomes of an epoch's rest."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16 autocasts the backbones and the online heads; weights, reductions and influence stay fp32."""
    zero_stage: Literal[0, 1, 2] = 0
    """DeepSpeed ZeRO: 0 replicates, 1 shards the optimiser state, 2 the gradients too."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl; each line averages the steps since the line before."""
    save_every: int = 0
    """Steps between checkpoints; 0 saves at the end of each epoch alone, where every run saves in any case."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay on disk, and how many of the newest that an epoch's end made."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this stay for ever; 0 none."""
    stop_seconds: float = 20.0
    """Longest time from a signal to the saved checkpoint, the end of a step included. The launcher refuses a cluster
    that kills sooner; a run that takes longer says so."""
    threads: int = 0
    """CPU threads a rank; 0 shares this machine's cores equally among its ranks."""

    def __post_init__(self) -> None:
        for key in ("epochs", "global_batch", "log_every", "keep_checkpoints"):
            require(getattr(self, key) >= 1, f"train.{key}", getattr(self, key), "1 or more")
        for key in ("save_every", "keep_every"):
            require(getattr(self, key) >= 0, f"train.{key}", getattr(self, key), "0 or more steps")
        require(self.stop_seconds > 0, "train.stop_seconds", self.stop_seconds, "above 0")
        require(self.threads >= 0, "train.threads", self.threads, "0 or more")


@dataclass(frozen=True)
class GuardConfig:
    nonfinite: int = 3
    """Steps in a row whose loss may be no finite number before the run ends; each is undone, counted, and its images
    are written to nonfinite.jsonl. 1 ends at the first."""
    collapse: Literal["warn", "stop", "off"] = "warn"
    """What follows when the targets of a line of metrics fall below the bounds below: the networks have collapsed."""
    min_target_std: float = 0.02
    """Bound of target_std, which is 1 for targets spread evenly over the sphere and 0 for equal ones."""
    min_effective_rank: float = 1.5
    """Bound of effective_rank, the number of dimensions that the targets fill."""
    fingerprint_every: int = 100
    """Steps between two comparisons of all ranks' networks, step and images, which also precede every checkpoint."""
    stall_seconds: float = 600.0
    """Longest time that a step, the data it waits for or a checkpoint may take before the run ends with 75 and names
    the rank that the others wait for; 0 waits for ever. The start and its first step have 600 s at least."""

    def __post_init__(self) -> None:
        for key in ("nonfinite", "fingerprint_every"):
            require(getattr(self, key) >= 1, f"guard.{key}", getattr(self, key), "1 or more steps")
        for key in ("min_target_std", "min_effective_rank", "stall_seconds"):
            require(getattr(self, key) >= 0, f"guard.{key}", getattr(self, key), "0 or more")


@dataclass(frozen=True)
class MonitorConfig:
    wandb: Literal["offline", "online", "disabled"] = "offline"
    """Weights & Biases mode; offline files lie in the run folder until they are synced."""
    project: str = "tracekin"
    """Weights & Biases project."""
    init_seconds: float = 20.0
    """Longest wait for the W&B server at a start (online); after that, this start logs offline."""
    finish_seconds: float = 8.0
    """Longest wait for what is not yet sent at an end; the rest stays in the run folder for `python -m launch.sync`."""

    def __post_init__(self) -> None:
        for key in ("init_seconds", "finish_seconds"):
            require(getattr(self, key) > 0, f"monitor.{key}", getattr(self, key), "above 0")


@dataclass(frozen=True)
class Config:
    """One pretraining run."""

    name: str = "pretrain"
    """The run's name; it lies in `folder`/`name`."""
    folder: str = "runs"
    """Folder of the runs."""
    seed: int = 0
    """Seed of the weights, the sample order and every augmentation."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    mining: MiningConfig = field(default_factory=MiningConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def __post_init__(self) -> None:
        parts = Path(self.name).parts
        if not parts or Path(self.name).is_absolute() or ".." in parts:
            raise UserError(
                f"name={self.name!r} is not a name: it must be a relative path inside folder={self.folder}."
            )
        sizes = [len(part.encode("utf-8", "surrogatepass")) for part in self.run_folder.parts]
        if max(sizes) > LONGEST_PART or sum(sizes) + len(sizes) > LONGEST_PATH:
            raise UserError(
                f"folder and name make a path that is too long, {str(self.run_folder)!r}: accepted are {LONGEST_PATH}"
                f" bytes, {LONGEST_PART} between two slashes."
            )
        # So that the config that lies beside a run says everything.
        objective, model = resolved(self.objective, self.model, self.train.global_batch)
        object.__setattr__(self, "objective", objective)
        object.__setattr__(self, "model", model)
        brought = own(objective.name, objective.version)
        if self.mining.mode == "eliminate" and self.mining.policy != "none" and not brought.negatives:
            raise UserError(
                f"mining.mode=eliminate leaves mined images out of the negatives, and objective.name={objective.name}"
                " has none; accepted: objective.name=simclr or moco, or mining.mode=attract."
            )
        if (
            self.mining.mode == "eliminate"
            and self.mining.policy != "none"
            and objective.queue
            and not self.mining.queue
        ):
            raise UserError(
                "mining.mode=eliminate mines from the batch while mining.queue=0, and moco's negatives are keys of past"
                f" batches: set mining.queue, best to objective.queue={objective.queue}, or objective.version=3."
            )
        if objective.queue and self.mining.policy.startswith("tracin_cp"):
            raise UserError(
                f"mining.policy={self.mining.policy} needs each checkpoint's own keys, which moco's queue does not"
                " hold; use another policy, or objective.version=3."
            )

    @property
    def run_folder(self) -> Path:
        return Path(self.folder) / self.name


@dataclass(frozen=True)
class EvaluateConfig:
    """Scores of a finished run's encoder: bank and probe on train, the probe's C from val."""

    manifest: str | None = None
    """Score on this manifest instead of the run's own."""
    split: Literal["test", "val"] = "test"
    """Split that is scored: choose a recipe on val, report it on test."""
    knn_k: int = 20
    """Neighbours that vote."""
    knn_temperature: float = 0.07
    """T in the vote's weight exp(cosine / T)."""
    linear_c: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0)
    """Inverse regularisation strengths of the linear probe; the best on val is taken."""
    bootstrap: int = 1000
    """Bootstrap replicates, drawn by group, behind each standard error and 95 % interval."""
    batch: int = 256
    """Images a forward pass."""
    workers: int = 2
    """Loader processes."""
    baselines: bool = True
    """Also score the untrained encoder and the 8x8 pixels."""
    seed: int = 0
    """Seed of the bootstrap."""

    def __post_init__(self) -> None:
        for key in ("knn_k", "bootstrap", "batch"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        require(self.knn_temperature > 0, "knn_temperature", self.knn_temperature, "above 0")
        require(len(self.linear_c) > 0 and min(self.linear_c, default=0) > 0, "linear_c", self.linear_c, "above 0")
        for key in ("workers", "seed"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "0 or more")


@dataclass(frozen=True)
class InfluenceConfig:
    """Proponents and opponents of images under a finished run: TracIn summed over its checkpoints."""

    manifest: str | None = None
    """Where the run's images lie now, if no longer where its config says; the shards must be the same."""
    against: Literal["train", "val", "test"] = "train"
    """Split that is searched; influence proper is that of training images, another split gives gradient similarity."""
    images: str = ""
    """Keys of the images to explain, comma-separated; empty explains the whole split."""
    k: int = 10
    """Proponents and opponents an image."""
    normalise: bool = True
    """Scores are cosines of gradients; false takes the products themselves, which favour images of large gradients."""
    weight: Literal["lr", "equal"] = "lr"
    """Weight of a checkpoint in the sum: the learning rate of its step (TracInCP; near 0 at the end), or 1."""
    checkpoints: int = 0
    """How many of the newest checkpoints are summed; 0 sums all that the run folder holds."""
    exclude_group: bool = True
    """Never name an image of the explained image's own group (patient, lesion)."""
    draws: int = 1
    """Pairs of augmented views an image, over which its gradient is the mean; the cost is proportional."""
    seed: int = 0
    """Seed of the augmented views."""
    gallery: int = 24
    """Explained images that the HTML page shows, evenly spaced; 0 shows none."""
    batch: int = 256
    """Images a forward pass."""
    workers: int = 2
    """Loader processes."""

    def __post_init__(self) -> None:
        for key in ("k", "draws", "batch"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        for key in ("checkpoints", "gallery", "workers"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "0 or more")

"""Each objective's training step runs at >= 0.95 times the images a second of lightly's step of the same method.

    python -m benchmarks.objectives [--objectives simclr,moco] [key=value ...]

Equal form, the claim's: ResNet-18 at 64 px, a batch of 128 synthetic images, one process of one thread, fp32 with fp32.
Both sides start from the same weights and take the same views, heads' widths, constants and torch optimiser; no
DeepSpeed, no mining. A step is both views' forward passes, loss, backward pass, optimiser and, where there is one, the
slow copy. lightly's is written out in lightly_steps.py, in the form of its own examples. That both are the same step is
compared, or the claim does not hold: loss and gradient in float64 (of small views) to 1e-10, and the loss of the first
timed step to 1e-4, all relative. Steps alternate; `ratio` is the median of lightly's seconds over ours in each pair, +-
twice its standard error, and `uncertain` names the objectives within that of the bound. Peak memory is what weights,
optimiser and two steps hold at once, as the allocator reports it.

With our defaults, no part of the claim: the step of a real run (DeepSpeed's engine, bf16, the log's figures) beside
BYOL's of the same kind, beside the same step with plain torch instead of DeepSpeed, and beside lightly's of the equal
form; then with the views of one core added to both, ours and lightly's `BYOLTransform` of drawn lesions.

On a GPU both run there. The machine should do nothing else: about ten minutes on one core.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any, get_args

import torch
from torch import Tensor, nn

from benchmarks.augment_throughput import against_lightly, lesion
from benchmarks.harness import arguments, finish, peak_bytes, seconds, summary
from benchmarks.lightly_steps import LightlyStep, refuse_unequal
from benchmarks.ranks import run_ranks
from benchmarks.steps import LR, build_step, median_error, synthetic_batch
from tracekin.config import Config, ObjectiveName, UserError, load, own
from tracekin.data.batch import Batch
from tracekin.distributed.world import World
from tracekin.model.networks import Outputs
from tracekin.model.precision import set_convolution_precision
from tracekin.monitor.metrics import Clock
from tracekin.objective import build_objective, build_online
from tracekin.objective.moco import MoCo
from tracekin.train.miner import Miner
from tracekin.train.optimiser import build_optimiser
from tracekin.train.step import Losses, loss_with_mined_positives, train_step

BOUND = 0.95
TOLERANCES = {"loss": 1e-10, "gradient": 1e-10, "fp32_loss": 1e-4}
"""Between both sides: losses relative to the loss or 1, whole gradients relative; the first two in float64."""
SMALL = 16
"""Side of the views in float64."""
OBJECTIVES = get_args(ObjectiveName)
BATCH = 128
OFFSET = {"byol": 4.0}
"""lightly's BYOL is -2 cos a view, ours 2 - 2 cos."""
MEBI = 2**20
SHOWN = ("overrides", "peers", "bound", "uncertain", "holds")


class Plain:
    """What a step asks of an engine, without DeepSpeed: the network and torch's optimiser."""

    def __init__(self, online: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        self.module, self.optimiser = online, optimiser

    def __call__(self, views_VBCSS: Tensor) -> Outputs:
        outputs: Outputs = self.module(views_VBCSS)
        return outputs

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimiser.step()
        self.optimiser.zero_grad()


class OurStep:
    """Our step with plain torch around it; a call is one."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config = config
        torch.manual_seed(config.seed)
        self.online = build_online(config).to(device).train()
        self.objective = build_objective(config, self.online)
        self.miner = Miner(config.mining, self.objective, config.seed)
        self.engine = Plain(self.online, build_optimiser(self.online, config.optimiser, zero_stage=0))
        for group in self.engine.optimiser.param_groups:
            group["lr"] = LR
        self.context: dict[str, Any] = {"weight": config.mining.weight, "step": 0, "lr": LR, "clock": Clock(device)}

    def loss(self, batch: Batch) -> Tensor:
        return loss_with_mined_positives(self.engine, self.objective, batch, self.miner, **self.context).loss

    def __call__(self, batch: Batch) -> Losses:
        tau = self.config.objective.tau_base
        return train_step(self.engine, self.objective, batch, self.miner, tau=tau, **self.context)


def lightly_step(config: Config, device: torch.device) -> LightlyStep:
    """lightly's step from the same weights as ``OurStep``'s."""
    torch.manual_seed(config.seed)
    momentum = own(config.objective.name, config.objective.version).momentum
    return LightlyStep(config, build_online(config).to(device), momentum=momentum, lr=LR)


def build_both(config: Config, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[OurStep, LightlyStep]:
    """Both steps from the same weights; MoCo's queues are full from the start, of images that are not the batch's."""
    ours, theirs = OurStep(config, device), lightly_step(config, device)
    if isinstance(ours.objective, MoCo) and ours.objective.memory is not None:
        memory = ours.objective.memory
        towards_x1, towards_x0 = (criterion.memory_bank.bank for criterion in theirs.criteria)
        memory.keys_NVD.copy_(torch.stack([towards_x0, towards_x1], 1))
        memory.ids_N.copy_(torch.arange(len(memory.ids_N)) + config.train.global_batch)
    for module in (ours.online, *ours.objective.kept.values(), theirs.net, theirs.criteria):
        module.to(dtype)
    return ours, theirs


def loss_difference(config: Config, ours: Tensor, theirs: Tensor) -> float:
    expected = float(theirs.detach()) + OFFSET.get(config.objective.name, 0.0)
    return abs(float(ours.detach()) - expected) / max(1.0, abs(expected))


def sub_batches_as_ours(config: Config) -> None:
    """Have lightly's W-MSE, which draws sub-batches from torch's generator, draw those of our step 0."""
    torch.manual_seed(config.seed * 2**32 % 2**63)


def differences(config: Config, batch: Batch, device: torch.device) -> dict[str, float]:
    """How far both sides' loss and gradient are apart, in float64: in fp32 a net of ReLUs amplifies each rounding."""
    ours, theirs = build_both(config, device, torch.float64)
    batch = replace(batch, views=batch.views[..., :SMALL, :SMALL].double())
    sub_batches_as_ours(config)
    losses = ours.loss(batch), theirs.loss(batch.views)
    gradients = []
    for loss, module in zip(losses, (ours.online, theirs.net), strict=True):
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]))
    apart = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    return {"loss": loss_difference(config, *losses), "gradient": float(apart)}


def rotate(candidates: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each candidate in each round; every second round runs backwards against drift."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for done in range(rounds):
        for name in list(candidates)[:: 1 if done % 2 == 0 else -1]:
            times[name].append(seconds(candidates[name]))
    return times


def over(times: Mapping[str, list[float]], numerator: str, denominator: str) -> dict[str, float]:
    """The ``summary`` of one candidate's seconds over another's in each round."""
    return summary([a / b for a, b in zip(times[numerator], times[denominator], strict=True)])


def peak(build: Callable[[], Callable[[], object]], device: torch.device) -> int:
    """Most bytes held at once by what is built and by two steps of it: the second has all of the optimiser's state."""

    def run() -> None:
        step = build()
        step()
        step()

    if device.type != "cuda":
        return peak_bytes(run)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def equal_form(config: Config, device: torch.device, pairs: int) -> dict[str, Any]:
    """Our step against lightly's on equal nets, in fp32."""
    config = replace(config, train=replace(config.train, precision="fp32"))
    batch = synthetic_batch(config, World()).to(device)

    def build_ours() -> Callable[[], object]:
        step = OurStep(config, device)
        return lambda: step(batch)

    def build_theirs() -> Callable[[], object]:
        step = lightly_step(config, device)
        return lambda: step(batch.views)

    apart = differences(config, batch, device)
    memory = {"ours": peak(build_ours, device), "lightly": peak(build_theirs, device)}
    ours, theirs = build_both(config, device)
    sub_batches_as_ours(config)
    apart["fp32_loss"] = loss_difference(config, ours(batch).loss, theirs(batch.views))  # which warm both up, too
    times = rotate({"ours": lambda: ours(batch), "lightly": lambda: theirs(batch.views)}, pairs)
    ratio = over(times, "lightly", "ours")
    described = {name: summary(values) for name, values in times.items()}
    return {
        "differences": apart,
        **described,
        "images_per_second": {name: len(batch.index) / one["median"] for name, one in described.items()},
        "peak_bytes": memory,
        "memory_ratio": memory["ours"] / memory["lightly"],
        "pair_ratio": ratio,
        "standard_error": median_error(ratio),
        "ratio": ratio["median"],
    }


def real_step(config: Config, device: torch.device) -> Callable[[], object]:
    """The step of a run, with what the loop computes for its log. A process group must exist."""
    step, clock = build_step(config, device, World()), Clock(device)

    def run() -> None:
        step("none", clock)
        clock.flush()

    return run


def with_defaults(config: Config, byol: Config, device: torch.device, rounds: int) -> dict[str, Any]:
    """The step of a real run beside BYOL's, beside its own without DeepSpeed, and beside lightly's in fp32."""
    batch = synthetic_batch(config, World()).to(device)
    plain, theirs = build_both(config, device)
    candidates: dict[str, Callable[[], object]] = {
        "ours": real_step(config, device),
        "plain": lambda: plain(batch),
        "lightly": lambda: theirs(batch.views),
    }
    if config.objective.name != "byol":
        candidates["byol"] = real_step(byol, device)
    for warm_up in candidates.values():
        warm_up()
    times = rotate(candidates, rounds)
    times.setdefault("byol", times["ours"])
    return {
        "seconds": {name: summary(values) for name, values in times.items()},
        "images_per_second": len(batch.index) / summary(times["ours"])["median"],
        "peak_bytes": peak(lambda: real_step(config, device), device),
        "over_byol": over(times, "ours", "byol"),
        "over_plain": over(times, "ours", "plain"),
        "lightly_over_ours": over(times, "lightly", "ours"),
    }


def measure(
    rank: int, names: Sequence[str], overrides: Sequence[str], pairs: int, rounds: int, threads: int
) -> dict[str, Any]:
    """All figures of the objectives named. A process group of one rank must exist.

    Args:
        rank: 0.
        names: of objectives.
        overrides: of the default configuration.
        pairs: of steps in equal form.
        rounds: of steps with our defaults.
        threads: of the CPU.
    """
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True  # as the training loop does
    set_convolution_precision("ieee")  # fp32 with fp32
    configs, byol = configure(names, overrides)
    equal = {name: equal_form(configs[name], device, pairs) for name in names}
    real = {name: with_defaults(configs[name], byol, device, rounds) for name in names}
    byol_bytes = peak(lambda: real_step(byol, device), device)
    lesions = [lesion(200, 150, seed) for seed in range(8)]
    views = against_lightly(byol.data.image_size, lesions, pairs)["views_per_second"]
    return {
        "batch": byol.train.global_batch,
        "precision": byol.train.precision,
        "views_per_second": views,
        "equal_form": equal,
        "with_defaults": {
            name: {
                **one,
                "memory_over_byol": one["peak_bytes"] / byol_bytes,
                "lightly_over_ours_with_views": _with_views(one, views, configs[name].train.global_batch),
            }
            for name, one in real.items()
        },
    }


def _with_views(one: Mapping[str, Any], views: Mapping[str, float], batch: int) -> float:
    """lightly's seconds over ours of a step and of its views, made by one core."""
    theirs, ours = (one["seconds"][side]["median"] + 2 * batch / views[side] for side in ("lightly", "ours"))
    return float(theirs / ours)


def configure(names: Sequence[str], overrides: Sequence[str]) -> tuple[dict[str, Config], Config]:
    """The default configuration with each objective, without mining; and BYOL's, which they are compared with.

    That one keeps to the paper's constants where an override is for another objective.

    Raises:
        UserError: an override that an objective does not take, or that lightly has no equal of.
    """

    def one(name: str, overrides: Sequence[str]) -> Config:
        fixed = f"objective.name={name}", "mining.policy=none"
        return load(Config, None, [f"train.global_batch={BATCH}", *overrides, *fixed])

    configs = {name: one(name, overrides) for name in names}
    for config in configs.values():
        refuse_unequal(config)
    general = [override for override in overrides if not override.startswith("objective.")]
    return configs, configs.get("byol") or one("byol", general)


def summarise(found: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured, then what is claimed of it; the ratios last."""
    equal = found["equal_form"]
    ratio = {name: one["ratio"] for name, one in equal.items()}
    near = [name for name, one in equal.items() if abs(ratio[name] - BOUND) <= 2 * one["standard_error"]]
    same = all(one["differences"][key] <= bound for one in equal.values() for key, bound in TOLERANCES.items())
    return {
        **found,
        "bound": BOUND,
        "tolerances": TOLERANCES,
        "uncertain": near,
        "holds": same and all(value >= BOUND for value in ratio.values()),
        "ratio": ratio,
    }


def table(found: Mapping[str, Any]) -> list[str]:
    """Lines of the figures in equal form, then of those with our defaults."""
    head = f"{'objective':<13}{'ours':>7}{'lightly':>9}{'ratio':>8}{'+-':>7}{'MiB':>8}{'lightly':>9}{'apart':>9}"
    lines = [
        f"equal form, fp32, batch {found['batch']}: images a second, peak memory, gradients",
        head,
    ]
    for name, one in found["equal_form"].items():
        rate, held = one["images_per_second"], one["peak_bytes"]
        lines.append(
            f"{name:<13}{rate['ours']:>7.1f}{rate['lightly']:>9.1f}{one['ratio']:>8.3f}"
            f"{2 * one['standard_error']:>7.3f}{held['ours'] / MEBI:>8.0f}{held['lightly'] / MEBI:>9.0f}"
            f"{one['differences']['gradient']:>9.0e}"
        )
    head = f"{'objective':<13}{'images/s':>9}{'MiB':>7}{'time':>8}{'memory':>8}{'plain':>8}{'lightly':>9}"
    lines += [
        f"with our defaults, {found['precision']} in DeepSpeed's engine: time and memory over BYOL's,",
        "time over plain torch's, lightly's time in fp32 over ours, and so with views",
        f"{head}{'with views':>12}",
    ]
    for name, one in found["with_defaults"].items():
        lines.append(
            f"{name:<13}{one['images_per_second']:>9.1f}{one['peak_bytes'] / MEBI:>7.0f}"
            f"{one['over_byol']['median']:>8.3f}{one['memory_over_byol']:>8.3f}{one['over_plain']['median']:>8.3f}"
            f"{one['lightly_over_ours']['median']:>9.2f}{one['lightly_over_ours_with_views']:>12.2f}"
        )
    return lines


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(threads=1)
    parser.add_argument("--objectives", default=",".join(OBJECTIVES), help="of %(default)s, separated by commas")
    parser.add_argument("--pairs", type=int, default=7, help="of steps in equal form (%(default)s)")
    parser.add_argument("--rounds", type=int, default=4, help="of steps with our defaults (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the default configuration")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = options.objectives.split(",")
    for option in ("pairs", "rounds"):
        if getattr(options, option) < 1:
            parser.error(f"--{option} {getattr(options, option)}: accepted is 1 or more")
    if unknown := [name for name in names if name not in OBJECTIVES]:
        parser.error(f"--objectives {','.join(unknown)}: accepted are {', '.join(OBJECTIVES)}")
    try:
        configure(names, options.overrides)
    except UserError as error:
        parser.error(str(error))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    jobs = (names, options.overrides, options.pairs, options.rounds, options.threads)
    found = run_ranks(measure, 1, *jobs, backend=backend, timeout=7200)[0]
    peers = {"lightly": metadata.version("lightly")}
    result = {"overrides": options.overrides, "peers": peers, **summarise(found)}
    print(*table(result), "", sep="\n")
    finish("objectives", result, save=options.save, shown=SHOWN)
    sys.exit(0 if result["holds"] else 1)


if __name__ == "__main__":
    main()

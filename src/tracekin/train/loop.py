"""A pretraining run: what surrounds the step. One entry under python, torchrun and srun."""

import json
import math
import os
import platform
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tracekin import checkpoint
from tracekin.config import Config, UserError, shareable, to_dict, to_yaml
from tracekin.data.manifest import Manifest, read_manifest
from tracekin.data.order import left_over, num_steps_per_epoch, shuffle_of
from tracekin.data.stream import pretrain_batches
from tracekin.distributed import collectives
from tracekin.distributed.group import process_group
from tracekin.distributed.world import World, world_from_environment
from tracekin.files import write_text
from tracekin.model.byol import Online, Target, tau_at
from tracekin.model.initial import sentence, start_from
from tracekin.monitor.environment import environment
from tracekin.monitor.metrics import Clock, Meter
from tracekin.monitor.progress import Progress
from tracekin.monitor.sinks import open_sinks
from tracekin.train.checks import check_run
from tracekin.train.engine import build_engine, load_optimiser_tensors, optimiser_tensors, preflight, set_lr
from tracekin.train.miner import Miner
from tracekin.train.optimiser import peak_lr
from tracekin.train.preemption import Flag, signals_raise_a_flag
from tracekin.train.record import gallery_pairs, line, measure
from tracekin.train.schedule import lr_at
from tracekin.train.skips import Skips
from tracekin.train.start import Start
from tracekin.train.step import Losses, train_step

NUM_GALLERY = 24


class Outcome(NamedTuple):
    """How a start of a run ended."""

    preempted: str
    """The signal that asked for the end, ``USR2`` or ``TERM``; empty for a run that is finished."""
    step: int
    """Steps done, and saved."""


def pretrain(config: Config) -> Outcome:
    """Train to the last epoch, from the newest checkpoint of the run folder if there is one.

    On USR2 or TERM all ranks save at the same step and return: the caller decides what becomes of the job.

    Raises:
        UserError: anything that check_run or preflight find wrong.
        FloatingPointError: the loss is no longer finite.
        FencedError: a newer start of this run has taken over the run folder.
    """
    world = world_from_environment()
    manifest = read_manifest(config.data.manifest, complete=False)
    check_run(config, manifest, world)
    device = _claim_device(config, world)
    preflight(device)
    start = Start(config.run_folder, world)
    with signals_raise_a_flag() as flag, start.guarded(), process_group(world, device):
        return _Run(config, manifest, world, device, start, flag).train()


class _Run:
    """The objects that live as long as the run."""

    def __init__(
        self, config: Config, manifest: Manifest, world: World, device: torch.device, start: Start, flag: Flag
    ) -> None:
        self.config, self.manifest, self.world, self.device = config, manifest, world, device
        self.start, self.flag = start, flag
        self.folder = config.run_folder
        self.shuffle = shuffle_of(config.data, config.seed, config.train.global_batch)
        self.steps_per_epoch = num_steps_per_epoch(manifest.count("train"), self.shuffle)
        self.num_steps = config.train.epochs * self.steps_per_epoch
        torch.manual_seed(config.seed)
        online = Online(config.model, config.data.channels, config.train.precision == "bf16").to(device)
        self.initial = None
        if config.init.from_ is not None and checkpoint.latest(self.folder) is None:
            self.initial = start_from(online.backbone, Path(config.init.from_))
            self._say(f"{self.folder}: {sentence(self.initial)}")
        self.target = Target(online)
        self.step = 0
        if world.is_main:
            start.take()  # before looking for a checkpoint: an older start adds none from here on
        found = collectives.broadcast_object(checkpoint.latest(self.folder))  # every rank goes on from the same one
        if found is not None:
            online.load_state_dict(checkpoint.load_model(found, "online."))
            self.target.load_state_dict(checkpoint.load_model(found, "target."))
            state = checkpoint.load_state(found)
            if state["dataset"] != manifest.fingerprint():
                raise UserError(
                    f"{found} was trained on other shards than {config.data.manifest} holds now;"
                    f" give this run another name=... or remove {self.folder}."
                )
            self.step = int(state["step"])
            self.initial = state["environment"].get("init")
        self.engine = build_engine(online, config.optimiser, config.train, world)
        if found is not None:
            load_optimiser_tensors(self.engine, checkpoint.load_part(found, "optimiser"))
        self.miner = Miner(config.mining, online, config.seed, world.local_size)
        if found is not None:
            self._remember(found)
        self.clock, self.meter = Clock(device), Meter(device)
        self.skips = Skips(manifest.count("train"), config.data.max_bad_fraction)
        # Gathered once: it asks git, which no checkpoint should wait for.
        self.facts = environment(world.size, device, config.train.zero_stage) if world.is_main else {}
        self.facts |= {"init": self.initial} if self.initial else {}
        self.slowest_stop = config.train.stop_seconds

    def train(self) -> Outcome:
        if self.step >= self.num_steps:
            self._say(f"{self.folder} is finished: {self.step} of {self.num_steps} steps. Nothing to do.")
            return Outcome("", self.step)
        self._say(self._headline())
        sinks = self._open_folder()
        progress = Progress(self.num_steps, self.step) if self.world.is_main else None
        began = time.perf_counter()
        try:
            stop = self._loop(sinks, progress)
        finally:
            for closable in [*sinks, *([progress] if progress else [])]:
                closable.close()
        if self.world.is_main:
            self.start.log("end", outcome="preempted" if stop else "finished", cause=stop, step=self.step)
        seconds = time.perf_counter() - began
        if stop:
            self._say(f"{self.folder}: {stop} came; saved step {self.step} of {self.num_steps} after {seconds:.0f} s")
        else:
            self._say(f"{self.folder}: done in {seconds:.0f} s; next: tracekin evaluate {self.folder}")
        return Outcome(stop, self.step)

    def _loop(self, sinks: list[Any], progress: Progress | None) -> str:
        """Train to the end, or to the step at which the ranks agree on a signal; returns its name, or ``""``."""
        config = self.config
        steps = range(self.step, self.num_steps)
        batches = iter(
            pretrain_batches(
                self.manifest,
                config.data,
                seed=config.seed,
                global_batch=config.train.global_batch,
                share=self.world.share(config.train.global_batch),
                steps=steps,
                views=2 + config.mining.support_views,
            )
        )
        self.engine.train()
        began, first = time.perf_counter(), self.step
        for step in steps:
            losses, schedule = self._one_step(batches, step)
            self.step = step + 1
            if progress:
                progress.update()
            stop = self.flag.agreed() if self.step % config.train.check_every == 0 else ""
            end_of_epoch = self.step % self.steps_per_epoch == 0
            if not end_of_epoch and not stop and self.step % config.train.log_every:
                continue
            record = self._record(losses, schedule, time.perf_counter() - began, self.step - first)
            if self.world.is_main:
                self.start.check()
            if record["skipped"]:
                self.skips.flush(self.step, self.folder if self.world.is_main else None)
            for sink in sinks:
                sink.write(record)
            if progress:
                progress.report(record)
            if not math.isfinite(record["loss"]):
                raise FloatingPointError(f"the loss is {record['loss']} at step {self.step}; the run stops here.")
            if end_of_epoch:
                self.skips.end_epoch()
            if end_of_epoch or stop:
                ended = time.perf_counter()
                self._save(losses, schedule["lr"], passing=not end_of_epoch)
                self._time_a_stop((ended - began) / (self.step - first), time.perf_counter() - ended)
            if stop and self.step < self.num_steps:
                return stop
            began, first = time.perf_counter(), self.step
        return ""

    def _time_a_stop(self, step_seconds: float, save_seconds: float) -> None:
        """Say so where a signal would have taken longer to obey than any before, and than the launcher was told."""
        needed = self.config.train.check_every * step_seconds + save_seconds
        if needed > self.slowest_stop:
            self.slowest_stop = needed
            self._say(
                f"a stop would take {needed:.0f} s ({self.config.train.check_every} steps of {step_seconds:.1f} s, save"
                f" {save_seconds:.1f} s), more than train.stop_seconds={self.config.train.stop_seconds:g}: raise it."
            )

    def _one_step(self, batches: Any, step: int) -> tuple[Losses, dict[str, float]]:
        config, mining = self.config, self.config.mining
        with self.clock.phase("data", host=True):
            batch = next(batches).to(self.device, non_blocking=True).developed()
        self.skips.fresh += batch.skipped
        self.meter.add(skipped=float(len(batch.skipped)))
        warmup_steps = round(config.optimiser.warmup_epochs * self.steps_per_epoch)
        peak = peak_lr(config.optimiser, config.train.global_batch)
        lr, tau = (
            lr_at(step, self.num_steps, warmup_steps, peak),
            tau_at(step, self.num_steps, config.objective.tau_base),
        )
        set_lr(self.engine, lr)
        losses = train_step(
            self.engine,
            self.target,
            batch,
            self.miner,
            tau=tau,
            weight=mining.weight if step >= mining.warmup * self.num_steps else 0.0,
            step=step,
            lr=lr,
            clock=self.clock,
        )
        measure(self.meter, losses, self.miner, step)
        return losses, {"lr": lr, "tau": tau}

    def _record(self, losses: Losses, schedule: dict[str, float], seconds: float, steps: int) -> dict[str, Any]:
        """One line of metrics.jsonl: means over the ``steps`` steps since the line before, seconds a step."""
        traffic, self.miner.traffic.bytes = self.miner.traffic.bytes, 0
        return {
            "step": self.step,
            "epoch": (self.step - 1) // self.steps_per_epoch,
            "time": round(time.time(), 1),
            **schedule,
            "images_per_second": self.config.train.global_batch * steps / seconds,
            **line(self.meter, losses, self.clock.flush(), traffic, steps, seconds),
        }

    def _save(self, losses: Losses, lr: float, *, passing: bool) -> None:
        """Checkpoint and, at the end of an epoch, gallery; collective: ZeRO's optimiser state lies on all ranks."""
        optimiser = optimiser_tensors(self.engine)
        pairs = gallery_pairs(losses.found, NUM_GALLERY) if losses.found and not passing else None
        if self.world.is_main:
            networks = {"online": self.engine.module, "target": self.target}
            model = {f"{name}.{key}": t for name, net in networks.items() for key, t in net.state_dict().items()}
            parts = {"model": model, "optimiser": optimiser}
            if self.miner.queue:
                parts["queue"] = self.miner.queue.state()
            state = {
                "dataset": self.manifest.fingerprint(),
                "lr": lr,
                "config": to_dict(self.config),
                "environment": self.facts,
            }
            keep = self.config.train.keep_checkpoints
            checkpoint.save(self.folder, self.step, parts, state, keep, passing=passing, check=self.start.check)
            if pairs is not None:
                content = {"step": self.step, "dataset": self.manifest.fingerprint(), "pairs": pairs}
                write_text(self.folder / "gallery.json", json.dumps(content) + "\n")
        if self.miner.history and not passing:
            self.miner.history.remember(self.engine.module, self.target, lr)
        collectives.barrier()

    def _remember(self, found: Path) -> None:
        """What the miner knew at a checkpoint: the queue, and the networks of the last checkpoints."""
        if self.miner.queue:
            self.miner.queue.load(checkpoint.load_part(found, "queue"), self.device)
        if self.miner.history:
            last = checkpoint.complete(self.folder, up_to=found, lasting=True)[-self.config.mining.checkpoints :]
            for path in collectives.broadcast_object(last):
                rate = checkpoint.load_state(path)["lr"]
                online, target = self.miner.history.remember(self.engine.module, self.target, rate)
                online.load_state_dict(checkpoint.load_model(path, "online."))
                target.load_state_dict(checkpoint.load_model(path, "target."))

    def _open_folder(self) -> list[Any]:
        if not self.world.is_main:
            return []
        self.start.begin(step=self.step, steps=self.num_steps, ranks=self.world.size, host=platform.node())
        write_text(self.folder / "config.yaml", to_yaml(self.config))
        write_text(self.folder / "environment.json", json.dumps(self.facts, indent=1) + "\n")
        sent = shareable(self.config, self.manifest.name)  # to W&B
        return open_sinks(self.config.monitor, self.folder, self.config.name, sent, self.step)

    def _headline(self) -> str:
        config = self.config
        return (
            f"{self.folder}: {config.mining.policy} on {self.manifest.name}, {self.manifest.count('train')} train"
            f" images, {config.model.backbone}, {config.data.image_size} px, batch {config.train.global_batch} over"
            f" {self.world.size} {self.device.type} rank(s), ZeRO {config.train.zero_stage}, {config.train.precision},"
            f" {self.num_steps} steps ({self._last_batch()})"
            f"{f', continuing after step {self.step}' if self.step else ''}"
        )

    def _last_batch(self) -> str:
        spare = left_over(self.manifest.count("train"), self.shuffle)
        return f"{spare} images an epoch left out" if spare >= 0 else f"{-spare} images an epoch seen twice"

    def _say(self, line: str) -> None:
        if self.world.is_main:
            print(line, flush=True)


def _claim_device(config: Config, world: World) -> torch.device:
    if torch.cuda.is_available():
        device = torch.device("cuda", world.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        precise = "ieee" if config.train.precision == "fp32" else "tf32"
        torch.backends.cudnn.conv.fp32_precision = precise  # type: ignore[attr-defined]
        return device
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(config.train.threads or max(1, cores // world.local_size))
    return torch.device("cpu")

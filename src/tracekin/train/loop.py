"""A pretraining run: what surrounds the step. One entry under python, torchrun and srun."""

import json
import multiprocessing
import os
import platform
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tracekin.checkpoint import Keep
from tracekin.config import Config, to_dict, to_yaml
from tracekin.data.batch import Batch
from tracekin.data.manifest import Manifest, read_manifest
from tracekin.data.order import left_over, num_steps_per_epoch, shuffle_of
from tracekin.data.stream import pretrain_batches
from tracekin.distributed import collectives
from tracekin.distributed.group import process_group
from tracekin.distributed.world import World, world_from_environment
from tracekin.files import write_text
from tracekin.model.byol import Online, Target, tau_at
from tracekin.monitor.environment import environment
from tracekin.monitor.metrics import Clock, Meter
from tracekin.monitor.progress import Progress
from tracekin.monitor.sinks import open_sinks
from tracekin.train.agreement import Agreement, Verdict
from tracekin.train.checks import check_run
from tracekin.train.engine import build_engine, preflight, set_lr
from tracekin.train.guard import Collapse, Fingerprint, Refusals, is_finite, samples_digest
from tracekin.train.miner import Miner
from tracekin.train.optimiser import peak_lr
from tracekin.train.preemption import Flag, signals_raise_a_flag
from tracekin.train.record import gallery_pairs, line, measure
from tracekin.train.saver import Saver
from tracekin.train.schedule import lr_at
from tracekin.train.skips import Skips
from tracekin.train.start import Start
from tracekin.train.state import find_checkpoint, gather_parts, load_networks, load_rest
from tracekin.train.step import Losses, train_step

NUM_GALLERY = 24


class Outcome(NamedTuple):
    """How a start of a run ended."""

    preempted: str
    """The signal that asked for the end, ``INT``, ``USR2`` or ``TERM``; empty for a run that is finished."""
    step: int
    """Steps done, and saved."""


def pretrain(config: Config, *, allow_change: bool = False) -> Outcome:
    """Train to the last epoch, from the newest sound checkpoint of the run folder if there is one.

    On INT, USR2 or TERM all ranks save at the same step and return: the caller decides what becomes of the job. A
    second INT ends the process at once, with 130.

    Args:
        config: the run.
        allow_change: continue a run of another config.

    Raises:
        UserError: anything that check_run or preflight find wrong, no sound checkpoint among several, or a checkpoint
            that cannot be written.
        DivergedError: the loss is no longer finite, or the networks have collapsed.
        DriftError: the ranks' networks differ.
        FencedError: a newer start of this run has taken over the run folder.
    """
    world = world_from_environment()
    manifest = read_manifest(config.data.manifest, complete=False)
    check_run(config, manifest, world, allow_change=allow_change)
    device = _claim_device(config, world)
    preflight(device)
    start = Start(config.run_folder, world)
    with signals_raise_a_flag(_interrupted) as flag, start.guarded(), process_group(world, device):
        return _Run(config, manifest, world, device, start, flag, allow_change).train()


class _Run:
    """The objects that live as long as the run."""

    def __init__(
        self,
        config: Config,
        manifest: Manifest,
        world: World,
        device: torch.device,
        start: Start,
        flag: Flag,
        allow_change: bool,
    ) -> None:
        self.config, self.manifest, self.world, self.device = config, manifest, world, device
        self.start, self.flag = start, flag
        self.folder = config.run_folder
        self.shuffle = shuffle_of(config.data, config.seed, config.train.global_batch)
        self.steps_per_epoch = num_steps_per_epoch(manifest.count("train"), self.shuffle)
        self.num_steps = config.train.epochs * self.steps_per_epoch
        torch.manual_seed(config.seed)
        online = Online(config.model, config.data.channels, config.train.precision == "bf16").to(device)
        self.target = Target(online)
        self.step = 0
        self.skips = Skips(manifest.count("train"), config.data.max_bad_fraction)
        if world.is_main:
            start.take()  # before looking for a checkpoint: an older start adds none from here on
        found, state = find_checkpoint(config, manifest, allow_change=allow_change, say=self._say)
        if found is not None:
            self.step = int(state["step"])
            self.skips.in_epoch = set(state["replaced"])
            load_networks(found, online, self.target)
        self.engine = build_engine(online, config.optimiser, config.train, world)
        self.miner = Miner(config.mining, online, config.seed, world.local_size)
        if found is not None:
            load_rest(found, self.engine, self.target, self.miner, device)
        self.clock, self.meter = Clock(device), Meter(device)
        self.losses: Losses | None = None
        self.agreement = Agreement()
        networks = {"online": online, "target": self.target}
        self.refusals = Refusals(config, manifest, [*networks.values()])
        self.fingerprint = Fingerprint(config, manifest, world, networks)
        self.collapse = Collapse(config)
        keep = Keep(config.train.keep_checkpoints, config.train.keep_every)
        self.saver = Saver(self.folder, keep, start.check)
        # Gathered once: it asks git, which no checkpoint should wait for.
        self.facts = environment(world.size, device, config.train.zero_stage) if world.is_main else {}
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
            self.saver.wait()  # a checkpoint under way is finished, whatever else has gone wrong
            for closable in [*sinks, *([progress] if progress else [])]:
                closable.close()
        outcome = {"": "finished", "INT": "interrupted"}.get(stop, "preempted")
        if self.world.is_main:
            self.start.log("end", outcome=outcome, cause=stop, step=self.step)
        seconds = time.perf_counter() - began
        if stop:
            self._say(f"{self.folder}: {stop} came; saved step {self.step} of {self.num_steps} after {seconds:.0f} s")
        else:
            self._say(f"{self.folder}: done in {seconds:.0f} s; next: tracekin evaluate {self.folder}")
        return Outcome(stop, self.step)

    def _loop(self, sinks: list[Any], progress: Progress | None) -> str:
        """Train to the end, or to the step at which the ranks agree on a signal; returns its name, or ``""``."""
        config = self.config.train
        steps = range(self.step, self.num_steps)
        batches = iter(self._batches(steps))
        self.engine.train()
        began, first = time.perf_counter(), self.step
        for step in steps:
            schedule, stop = self._one_step(batches, step)
            self.step = step + 1
            if progress:
                progress.update()
            end_of_epoch = self.step % self.steps_per_epoch == 0
            save = end_of_epoch or bool(stop) or (config.save_every > 0 and self.step % config.save_every == 0)
            if not save and self.step % config.log_every:
                continue
            record = self._record(schedule, time.perf_counter() - began, self.step - first)
            self._write(record, sinks, progress)
            if end_of_epoch:
                self.skips.end_epoch()
            if save:
                ended = time.perf_counter()
                self._save(schedule["lr"], end_of_epoch=end_of_epoch)
                self._time_a_stop((ended - began) / (self.step - first), time.perf_counter() - ended)
            if stop:
                break
            began, first = time.perf_counter(), self.step
        self._settle()
        return stop if self.step < self.num_steps else ""

    def _batches(self, steps: range) -> Iterator[Batch]:
        return pretrain_batches(
            self.manifest,
            self.config.data,
            seed=self.config.seed,
            global_batch=self.config.train.global_batch,
            share=self.world.share(self.config.train.global_batch),
            steps=steps,
            views=2 + self.config.mining.support_views,
        )

    def _one_step(self, batches: Iterator[Batch], step: int) -> tuple[dict[str, float], str]:
        """One step and what is measured of it; returns the schedule's values and the signal that was agreed on."""
        config, mining = self.config, self.config.mining
        with self.clock.phase("data", host=True):
            batch = next(batches).to(self.device, non_blocking=True).developed()
        self.skips.fresh += batch.skipped
        warmup_steps = round(config.optimiser.warmup_epochs * self.steps_per_epoch)
        peak = peak_lr(config.optimiser, config.train.global_batch)
        lr, tau = (
            lr_at(step, self.num_steps, warmup_steps, peak),
            tau_at(step, self.num_steps, config.objective.tau_base),
        )
        set_lr(self.engine, lr)
        self.refusals.before()
        verdict = Verdict("", True, False)

        def accept(loss: Tensor) -> bool:
            nonlocal verdict
            failed = self.saver.error is not None
            verdict = self.agreement.reach(signal=self.flag.raised, finite=is_finite(loss), save_failed=failed)
            return verdict.finite

        losses = train_step(
            self.engine,
            self.target,
            batch,
            self.miner,
            tau=tau,
            accept=accept,
            weight=mining.weight if step >= mining.warmup * self.num_steps else 0.0,
            step=step,
            lr=lr,
            clock=self.clock,
        )
        first = self.world.share(config.train.global_batch).start
        self.meter.add(skipped=float(len(batch.skipped)), samples=samples_digest(batch, step, first))
        if verdict.finite:
            self.refusals.accepted()
            measure(self.meter, losses, self.miner, step)
        else:
            self.miner.forget(step)
            self.refusals.refuse(step, losses.loss, batch)
        if verdict.finite or self.losses is None:
            self.losses = losses
        if (step + 1) % config.guard.fingerprint_every == 0:
            self.fingerprint.compare(step, batch)
        if verdict.save_failed:
            self._settle()
        self.batch = batch
        return {"lr": lr, "tau": tau}, verdict.stop

    def _record(self, schedule: dict[str, float], seconds: float, steps: int) -> dict[str, Any]:
        """One line of metrics.jsonl: means over the ``steps`` steps since the line before, seconds a step."""
        traffic, self.miner.traffic.bytes = self.miner.traffic.bytes, 0
        nonfinite = self.refusals.flush()
        assert self.losses is not None
        return {
            "step": self.step,
            "epoch": (self.step - 1) // self.steps_per_epoch,
            "time": round(time.time(), 1),
            **schedule,
            "images_per_second": self.config.train.global_batch * steps / seconds,
            **line(self.meter, self.losses, self.clock.flush(), traffic, steps, seconds, nonfinite),
        }

    def _write(self, record: dict[str, Any], sinks: list[Any], progress: Progress | None) -> None:
        """Show a line of metrics to everyone who looks at it."""
        if self.world.is_main:
            self.start.check()
        if record["skipped"]:
            self.skips.flush(self.step, self.folder if self.world.is_main else None)
        for sink in sinks:
            sink.write(record)
        if progress:
            progress.report(record)
        self.collapse.look(record)

    def _save(self, lr: float, *, end_of_epoch: bool) -> None:
        """Begin a checkpoint and, at the end of an epoch, write the gallery; collective."""
        self.fingerprint.compare(self.step - 1, self.batch)
        self.fingerprint.check_finite()
        with self.clock.phase("save", host=True):
            parts = gather_parts(self.engine, self.target, self.miner, self.device)
            found = self.losses.found if self.losses and end_of_epoch else None
            pairs = gallery_pairs(found, NUM_GALLERY) if found else None
            if self.world.is_main:
                state = {
                    "epoch_end": end_of_epoch,
                    "dataset": self.manifest.fingerprint(),
                    "lr": lr,
                    "replaced": sorted(self.skips.in_epoch),
                    "config": to_dict(self.config),
                    "environment": self.facts,
                }
                self.saver.start(self.step, parts, state)
                if pairs is not None:
                    content = {"step": self.step, "dataset": self.manifest.fingerprint(), "pairs": pairs}
                    write_text(self.folder / "gallery.json", json.dumps(content) + "\n")
        if self.miner.history and end_of_epoch:
            self.miner.history.remember(self.engine.module, self.target, lr)

    def _settle(self) -> None:
        """Wait for the checkpoint under way; where it could not be written every rank raises alike. Collective."""
        error = collectives.broadcast_object(self.saver.wait())
        if error is not None:
            raise error

    def _time_a_stop(self, step_seconds: float, stall_seconds: float) -> None:
        """Say so where a signal would have taken longer to obey than any before, and than the launcher was told."""
        save_seconds = stall_seconds + self.saver.seconds  # of the checkpoint before
        needed = step_seconds + save_seconds
        if needed > self.slowest_stop:
            self.slowest_stop = needed
            self._say(
                f"a stop would take {needed:.0f} s (a step {step_seconds:.1f} s, a checkpoint {save_seconds:.1f} s),"
                f" more than train.stop_seconds={self.config.train.stop_seconds:g}: raise it."
            )

    def _open_folder(self) -> list[Any]:
        if not self.world.is_main:
            return []
        self.start.begin(step=self.step, steps=self.num_steps, ranks=self.world.size, host=platform.node())
        write_text(self.folder / "config.yaml", to_yaml(self.config))
        write_text(self.folder / "environment.json", json.dumps(self.facts, indent=1) + "\n")
        sent = to_dict(self.config)  # to W&B: no path of this machine
        del sent["folder"]
        sent["data"]["manifest"] = self.manifest.name
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


def _interrupted() -> None:
    """End this process as a second Ctrl-C asks."""
    for child in multiprocessing.active_children():  # loader processes
        child.kill()
    os._exit(130)

"""A pretraining run: what surrounds the step. One entry under python, torchrun and srun."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tracekin import checkpoint
from tracekin.checkpoint import Keep
from tracekin.config import Config, to_dict
from tracekin.data.batch import Batch
from tracekin.data.manifest import Manifest, read_manifest
from tracekin.data.order import num_steps_per_epoch, shuffle_of
from tracekin.data.stream import pretrain_batches
from tracekin.distributed import collectives
from tracekin.distributed.group import process_group
from tracekin.distributed.watchdog import Watchdog, leave
from tracekin.distributed.world import World, world_from_environment
from tracekin.files import write_text
from tracekin.model.initial import sentence, start_from
from tracekin.model.networks import tau_at
from tracekin.monitor.environment import environment
from tracekin.monitor.metrics import Clock, Meter
from tracekin.objective import build_objective, build_online
from tracekin.train.agreement import Agreement, Verdict
from tracekin.train.checks import check_run
from tracekin.train.device import claim_device
from tracekin.train.engine import build_engine, preflight, set_lr
from tracekin.train.guard import Collapse, Fingerprint, Refusals, is_finite, samples_digest
from tracekin.train.miner import Miner
from tracekin.train.optimiser import peak_lr
from tracekin.train.preemption import Flag, signals_raise_a_flag
from tracekin.train.randomness import seed_generators
from tracekin.train.record import gallery_pairs, line, measure
from tracekin.train.reporter import Reporter
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
    device = claim_device(config.train, world)
    preflight(device)
    start = Start(config.run_folder, world)
    watchdog = Watchdog(world, config.guard.stall_seconds, start.stalled)
    with (
        signals_raise_a_flag(lambda: leave(130)) as flag,
        start.guarded(),
        process_group(world, device),
        watchdog,
    ):
        return _Run(config, manifest, world, device, start, flag, watchdog, allow_change).train()


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
        watchdog: Watchdog,
        allow_change: bool,
    ) -> None:
        self.config, self.manifest, self.world, self.device = config, manifest, world, device
        self.start, self.flag, self.watchdog = start, flag, watchdog
        self.folder = config.run_folder
        self.reporter = Reporter(config, manifest, world, start)
        self.say = self.reporter.say
        self.shuffle = shuffle_of(config.data, config.seed, config.train.global_batch)
        self.steps_per_epoch = num_steps_per_epoch(manifest.count("train"), self.shuffle)
        self.num_steps = config.train.epochs * self.steps_per_epoch
        seed_generators(config.seed)
        online = build_online(config).to(device)
        self.initial = None
        if config.init.from_ is not None and not checkpoint.complete(self.folder):
            self.initial = start_from(online.backbone, config.init.from_)
            self.say(f"{self.folder}: {sentence(self.initial)}")
        self.objective = build_objective(config, online)
        networks = {"online": online, **self.objective.kept}
        self.step = 0
        self.skips = Skips(manifest.count("train"), config.data.max_bad_fraction)
        if world.is_main:
            start.take()  # before looking for a checkpoint: an older start adds none from here on
        found = find_checkpoint(config, manifest, allow_change=allow_change, say=self.say)
        if found is not None:
            self.step = int(found.state["step"])
            self.initial = found.state["environment"].get("init")
            self.skips.in_epoch = set(found.state["replaced"])
            load_networks(found.folder, networks)
        self.engine = build_engine(online, config.optimiser, config.train, world)
        self.miner = Miner(config.mining, self.objective, config.seed, world.local_size)
        if found is not None:
            load_rest(found, self.engine, self.objective, self.miner, device, self.say)
        self.clock, self.meter = Clock(device), Meter(device)
        self.losses: Losses | None = None
        self.agreement = Agreement()
        forwarded: list[nn.Module] = [net for net in (online, self.objective.target) if net is not None]
        self.refusals = Refusals(config, manifest, forwarded)
        self.fingerprint = Fingerprint(config, manifest, world, networks)
        self.collapse = Collapse(config)
        keep = Keep(config.train.keep_checkpoints, config.train.keep_every)
        self.saver = Saver(self.folder, keep, start.check)
        # Gathered once: it asks git, which no checkpoint should wait for.
        self.facts = environment(world.size, device, config.train.zero_stage) if world.is_main else {}
        self.facts |= {"init": self.initial} if self.initial else {}
        self.slowest_stop = config.train.stop_seconds

    def train(self) -> Outcome:
        if self.step >= self.num_steps:
            self.say(f"{self.folder} is finished: {self.step} of {self.num_steps} steps. Nothing to do.")
            return Outcome("", self.step)
        self.reporter.open(self.step, self.num_steps, self.facts, self.device.type)
        began = time.perf_counter()
        try:
            stop = self._loop()
            if self.world.is_main:  # before the sinks close, which a kill may not wait for
                outcome = {"": "finished", "INT": "interrupted"}.get(stop, "preempted")
                self.start.log("end", outcome=outcome, cause=stop, step=self.step)
        finally:
            self.saver.wait()  # a checkpoint under way is finished, whatever else has gone wrong
            self.watchdog.beat(self.step, "end")
            self.reporter.close()
        seconds = time.perf_counter() - began
        if stop:
            self.say(f"{self.folder}: {stop} came; saved step {self.step} of {self.num_steps} after {seconds:.0f} s")
        else:
            self.say(f"{self.folder}: done in {seconds:.0f} s; next: tracekin evaluate {self.folder}")
        return Outcome(stop, self.step)

    def _loop(self) -> str:
        """Train to the end, or to the step at which the ranks agree on a signal; returns its name, or ``""``."""
        config = self.config.train
        steps = range(self.step, self.num_steps)
        batches = iter(self._batches(steps))
        self.engine.train()
        began, first = time.perf_counter(), self.step
        due = ended_epoch = False
        for step in steps:
            schedule, stop = self._one_step(batches, step)
            self.step = step + 1
            self.reporter.count_step()
            end_of_epoch = self.step % self.steps_per_epoch == 0
            ended_epoch |= end_of_epoch
            due |= end_of_epoch or (config.save_every > 0 and self.step % config.save_every == 0)
            # A checkpoint to go back to lies before what goes wrong; one that is due waits for a step that does not.
            save = (due and not self.refusals.in_row) or bool(stop) or self.step == self.num_steps
            if not (save or end_of_epoch) and self.step % config.log_every:
                continue
            record = self._record(schedule, time.perf_counter() - began, self.step - first)
            self._write(record)
            if end_of_epoch:
                self.skips.end_epoch()
            if save:
                ended = time.perf_counter()
                self._save(end_of_epoch=ended_epoch)
                due = ended_epoch = False
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

    def _one_step(self, batches: Iterator[Batch], step: int) -> tuple[dict[str, float | None], str]:
        """One step and what is measured of it; returns the schedule's values and the signal that was agreed on."""
        config, mining = self.config, self.config.mining
        self.watchdog.beat(step + 1, "data")
        with self.clock.phase("data", host=True):
            batch = next(batches).to(self.device, non_blocking=True).developed()
        self.watchdog.beat(step + 1, "step")
        self.skips.fresh += batch.skipped
        warmup_steps = round(config.optimiser.warmup_epochs * self.steps_per_epoch)
        peak = peak_lr(config.optimiser, config.train.global_batch)
        lr, base = lr_at(step, self.num_steps, warmup_steps, peak), config.objective.tau_base
        tau = None if base is None else tau_at(step, self.num_steps, base)
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
            self.objective,
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
            if self.world.is_main:
                self.start.check()
            self.refusals.refuse(step, losses.loss, batch, self._last_checkpoint)
        if verdict.finite or self.losses is None:
            self.losses = losses
        if (step + 1) % config.guard.fingerprint_every == 0:
            self.fingerprint.compare(step, batch)
        if verdict.save_failed:
            self._settle()
        self.batch = batch
        self.lr = lr
        return {"lr": lr, "tau": tau}, verdict.stop

    def _record(self, schedule: dict[str, float | None], seconds: float, steps: int) -> dict[str, Any]:
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

    def _write(self, record: dict[str, Any]) -> None:
        """Write a line of metrics, and look at what it says. Collective."""
        if self.world.is_main:
            self.start.check()
        if record["skipped"]:
            self.skips.flush(self.step, self.folder if self.world.is_main else None)
        self.reporter.write(record)
        self.collapse.look(record)

    def _save(self, *, end_of_epoch: bool) -> None:
        """Begin a checkpoint and, where an epoch has ended since the last one, write the gallery; collective."""
        self.watchdog.beat(self.step, "checkpoint")
        self.fingerprint.compare(self.step - 1, self.batch)
        self.fingerprint.check_finite()
        with self.clock.phase("save", host=True):
            self.saver.wait()  # for the one before, else the host would hold two
            parts = gather_parts(self.engine, self.objective, self.miner, self.device)
            found = self.losses.found if self.losses and end_of_epoch else None
            pairs = gallery_pairs(found, NUM_GALLERY) if found else None
            if self.world.is_main:
                state = {
                    "epoch_end": end_of_epoch,
                    "epochs": self.step // self.steps_per_epoch,
                    "dataset": self.manifest.fingerprint(),
                    "lr": self.lr,
                    "replaced": sorted(self.skips.in_epoch),
                    "config": to_dict(self.config),
                    "environment": self.facts,
                }
                self.saver.start(self.step, parts, state)
                if pairs is not None:
                    content = {"step": self.step, "dataset": self.manifest.fingerprint(), "pairs": pairs}
                    try:
                        write_text(self.folder / "gallery.json", json.dumps(content) + "\n")
                    except OSError as error:  # a page lacks pictures; whether there is a checkpoint the saver says
                        self.say(f"cannot write {self.folder / 'gallery.json'}: {error.strerror}")
        if self.miner.history and end_of_epoch:
            self.miner.history.remember(self.engine.module, self.objective.target, self.lr)

    def _settle(self) -> None:
        """Wait for the checkpoint under way; where it could not be written every rank raises alike. Collective."""
        error = collectives.broadcast_object(self.saver.wait())
        if error is not None:
            raise error

    def _last_checkpoint(self) -> Path | None:
        """The newest checkpoint once none is under way. Collective."""
        self._settle()
        complete: list[Path] = collectives.broadcast_object(checkpoint.complete(self.folder)[-1:])
        return complete[0] if complete else None

    def _time_a_stop(self, step_seconds: float, stall_seconds: float) -> None:
        """Say so where a signal would have taken longer to obey than any before, and than the launcher was told."""
        save_seconds = stall_seconds + self.saver.seconds  # of the checkpoint before
        needed = step_seconds + save_seconds
        if needed > self.slowest_stop:
            self.slowest_stop = needed
            self.say(
                f"a stop would take {needed:.0f} s (a step {step_seconds:.1f} s, a checkpoint {save_seconds:.1f} s),"
                f" more than train.stop_seconds={self.config.train.stop_seconds:g}: raise it."
            )

"""Saved in one world, resumed in another: the same images, the same losses; in the same world the same bits."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tests.data.tiny import make_dataset
from tests.ranks import run_ranks
from tests.train.same import differing
from tests.train.test_run import metrics, stop_after, tiny_config
from tests.train.tiny_run import tiny_backbone
from tracekin import checkpoint
from tracekin.config import Config

Form = tuple[int, int]
"""Ranks and ZeRO stage."""
NAMED: list[tuple[Form, Form]] = [
    ((1, 0), (1, 0)),
    ((1, 0), (2, 2)),
    ((1, 1), (4, 0)),
    ((2, 0), (4, 1)),
    ((2, 1), (1, 2)),
    ((2, 2), (2, 2)),
    ((4, 0), (2, 1)),
    ((4, 1), (4, 1)),
    ((4, 2), (1, 0)),
]
"""Every form once on each side; make faults takes all 81 pairs."""
STEPS, EPOCH, SAVED = 14, 7, 5
"""Of a run and of an epoch; those after which a run was stopped, in the middle of one."""


def run_all(rank: int, configs: Sequence[Config]) -> None:
    """Several runs, one after another, in the same processes."""
    from tracekin.train.loop import pretrain

    with tiny_backbone():
        for config in configs:
            pretrain(config)


def run_pairs(folder: Path, pairs: Sequence[tuple[Form, Form]]) -> dict[tuple[Form, Form], str]:
    """Stop runs of ``STEPS`` steps after ``SAVED`` and resume them in other worlds; what differs, in words, if any.

    A resumed run is compared with the unbroken one of its first world: the samples and, to a relative 1e-4, the losses
    of all steps; where the world is the same, these and the whole last checkpoint bit for bit.
    """
    make_dataset(folder / "data", train=16 * EPOCH, val=4, test=4)
    fixed = ("train.log_every=1", "train.epochs=2", "train.keep_checkpoints=99", "mining.warmup=0", "mining.queue=32")
    fixed += (f"train.save_every={SAVED}",)
    forms = sorted({form for pair in pairs for form in pair})

    def config(form: Form, name: str) -> Config:
        made = tiny_config(folder, *fixed, f"train.zero_stage={form[1]}", "optimiser.lr=0.05")
        return replace(made, name=name)

    whole = {form: config(form, f"whole-{form[0]}-{form[1]}") for form in forms}
    for ranks in sorted({form[0] for form in forms}):
        run_ranks(run_all, ranks, [whole[form] for form in forms if form[0] == ranks])
    resumed = {}
    for first, second in pairs:
        name = f"{first[0]}-{first[1]}-to-{second[0]}-{second[1]}"
        copied = stop_after(whole[first], SAVED, folder / "copies" / name)
        resumed[first, second] = replace(copied, train=replace(copied.train, zero_stage=second[1]))
    for ranks in sorted({form[0] for form in forms}):
        run_ranks(run_all, ranks, [config for (_, second), config in resumed.items() if second[0] == ranks])
    return {pair: difference(whole[pair[0]], after, pair[0] == pair[1]) for pair, after in resumed.items()}


def difference(whole: Config, resumed: Config, exact: bool) -> str:
    """What tells a resumed run from an unbroken one; empty for nothing."""
    one, other = metrics(whole), metrics(resumed)
    if [line["step"] for line in one] != [line["step"] for line in other] or len(one) != STEPS:
        return f"steps {[line['step'] for line in other]}"
    for before, after in zip(one, other, strict=True):
        if before["samples_digest"] != after["samples_digest"]:
            return f"other images in step {before['step']}"
        bound = 0 if exact else 1e-4 * abs(before["loss"])
        if abs(before["loss"] - after["loss"]) > bound:
            return f"loss {after['loss']} instead of {before['loss']} in step {before['step']}"
    last = [config.run_folder / "checkpoints" / f"step-{STEPS:08d}" for config in (whole, resumed)]
    return ", ".join(differing(*last)) if exact else ""


def test_nine_pairs_of_worlds(tmp_path: Path) -> None:
    assert SAVED % EPOCH
    assert run_pairs(tmp_path, NAMED) == dict.fromkeys(NAMED, "")


def test_a_difference_is_seen(tmp_path: Path) -> None:
    """With another seed the images differ, with another learning rate the losses, and in a checkpoint one bit does."""
    make_dataset(tmp_path / "data", train=16 * EPOCH, val=4, test=4)
    made = tiny_config(tmp_path, "train.log_every=1", "train.epochs=2", "mining.policy=none")
    changed = [
        replace(made, name="seed", seed=1),
        replace(made, name="lr", optimiser=replace(made.optimiser, lr=0.301)),
    ]
    run_ranks(run_all, 1, [made, *changed])
    assert difference(made, changed[0], False) == "other images in step 1"
    assert difference(made, changed[1], False).startswith("loss ")
    assert difference(made, made, True) == ""
    flipped = stop_after(made, STEPS, tmp_path / "flipped")
    last = flipped.run_folder / "checkpoints" / f"step-{STEPS:08d}"
    parts = {part: checkpoint.load_part(last, part) for part in ("model", "optimiser", "ranks")}
    parts["ranks"]["torch"][0, -1] ^= 1
    checkpoint.save(flipped.run_folder, STEPS, parts, {})
    assert difference(made, flipped, False) == ""
    assert difference(made, flipped, True) == "ranks.torch"

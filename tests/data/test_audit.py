"""python -m tracekin.data.audit: zeros on a sound stream, counts on an unsound one, one line for a mistake."""

import json
import os

import numpy as np
import pytest
from click.testing import CliRunner

from tests.data.tiny import make_dataset
from tracekin.data import audit
from tracekin.data.manifest import Manifest


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    return make_dataset(tmp_path_factory.mktemp("audited"), train=50, val=0, test=0, size=16, shard_size=7)


def run(manifest: Manifest, *arguments: str) -> tuple[int, str]:
    found = CliRunner().invoke(audit.main, [manifest.path, *arguments])
    return found.exit_code, found.output.splitlines()[-1]


@pytest.mark.parametrize(
    "overrides", [[], ["last_batch=wrap", "shuffle_shards=2", "streams=3"]], ids=["drop", "windows, streams, wrap"]
)
def test_a_sound_stream(manifest, overrides):
    code, line = run(
        manifest,
        "--global-batch",
        "12",
        "--world",
        "1,2,3,4",
        "--workers",
        "0,2",
        "--epochs",
        "2",
        "--resume",
        *overrides,
    )
    report = json.loads(line)
    assert (code, report["missing"], report["repeated"], report["out_of_order"], report["skipped"]) == (0, 0, 0, 0, 0)
    batches = 10 if overrides else 8
    assert report["samples"] == batches * 12 * (1 + 2 * 8)
    assert report["slowest_first_batch_seconds"] > 0


@pytest.mark.parametrize(
    ("spoil", "wrong"),
    [
        (lambda numbers: numbers[::-1].copy(), {"out_of_order"}),
        (lambda numbers: np.full_like(numbers, numbers[0]), {"missing", "repeated", "out_of_order"}),
    ],
)
def test_an_unsound_stream_is_found(manifest, monkeypatch, spoil, wrong):
    sound = audit.plan

    def unsound(sizes, shuffle, *, share, steps):
        for rows in sound(sizes, shuffle, share=share, steps=steps):
            alone = share.stop - share.start == shuffle.global_batch
            yield rows if alone else replace_places(rows, spoil(rows.places))

    def replace_places(rows, places):
        return rows._replace(places=places)

    monkeypatch.setattr(audit, "plan", unsound)
    code, line = run(manifest, "--global-batch", "12", "--world", "1,2", "--workers", "0")
    report = json.loads(line)
    assert code == 1
    assert {key for key in ("missing", "repeated", "out_of_order") if report[key]} == wrong


def test_what_was_replaced_is_counted(tmp_path):
    manifest = make_dataset(tmp_path, train=24, val=0, test=0, size=16, shard_size=24)
    shard = manifest.splits["train"][0]
    with (tmp_path / shard.file).open("r+b") as file:
        file.seek(shard.samples[5][0] + 900)
        file.write(b"\xff\xff")
    code, line = run(manifest, "--global-batch", "12", "--world", "1", "--workers", "0", "max_bad_fraction=0.1")
    report = json.loads(line)
    assert code == 1
    assert (report["missing"], report["repeated"], report["out_of_order"], report["skipped"]) == (2, 2, 0, 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--world", "5"], "--world 5 does not divide --global-batch 24"),
        (["--workers", "0,-1"], "--workers -1 is no number of processes"),
        (["--world", "two"], "'two' is no list of whole numbers"),
        (["--split", "holdout"], "no split 'holdout'; it has train"),
        (["--global-batch", "64"], "50 samples, fewer than"),
        (["last_bath=wrap"], "did you mean last_batch?"),
    ],
)
def test_mistakes_get_one_line(manifest, arguments, words):
    code, line = run(manifest, *arguments)
    assert code == 2
    assert words in line


def test_no_manifest(tmp_path):
    found = CliRunner().invoke(audit.main, [os.fspath(tmp_path / "manifest.json")])
    assert (found.exit_code, "no manifest at" in found.output) == (2, True)

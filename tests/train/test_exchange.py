"""What travels: every rank of the pool ends with the same columns, however they came, and the bytes are counted."""

from typing import Any

import pytest
import torch

from tests.influence import naive
from tests.ranks import run_ranks
from tracekin.config import MiningConfig
from tracekin.distributed.collectives import open_group
from tracekin.influence import Candidates, Factors, sketch_matrix, sketched
from tracekin.train.exchange import Exchange

RANKS, EACH, VIEWS, LABELS = 4, 3, 2, 3
LAYERS = naive.WIDTHS[:2]
DIM = 4
WAYS: dict[str, dict[str, Any]] = {
    "global": {},
    "node": {"pool": "node"},
    "rank": {"pool": "rank"},
    "ring": {"ring_above": 0},
    "node_ring": {"pool": "node", "ring_above": EACH},
    "bf16": {"transport": "bf16"},
    "sketch_ring": {"sketch_dim": DIM, "ring_above": 0},
}
POOL = {way: {"node": 2, "rank": 1}.get(mining.get("pool", "global"), RANKS) for way, mining in WAYS.items()}


def everyone() -> Candidates:
    """All ranks' images, with a second layer of other widths."""
    return naive.candidates(RANKS * EACH, views=VIEWS, layers=len(LAYERS), classes=LABELS)._replace(support=None)


def exchanged(rank: int) -> dict[str, Any]:
    """What this rank reads in two steps one after another, and the bytes that it counted in the second."""
    found = {}
    for way, mining in WAYS.items():
        config = MiningConfig(**mining)
        exchange = Exchange(config, open_group(config.pool, 2))
        for _ in range(2):
            rows = everyone().part(slice(rank * EACH, (rank + 1) * EACH))
            exchange.traffic.bytes = 0
            own = [exchange.send(layer.hidden) for layer in rows.factors]
            columns = exchange.gather(rows)
            blocks = [(block.start, block.columns) for block in exchange.blocks(columns)]
        found[way] = {"own": own, "columns": columns, "blocks": blocks, "bytes": exchange.traffic.bytes}
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(exchanged, RANKS)


def expected_pool(way: str, rank: int) -> Candidates:
    """The columns of this rank's pool, as they should arrive."""
    size = POOL[way] * EACH
    start = rank * EACH // size * size
    pool = everyone().part(slice(start, start + size))
    layers = []
    for number, layer in enumerate(pool.factors):
        hidden = layer.hidden
        if way == "sketch_ring":
            hidden = sketched(hidden, sketch_matrix(hidden.shape[-1], DIM, hidden.device, number))
        narrow = torch.bfloat16 if way == "bf16" else torch.float32
        layers.append(Factors(hidden.to(narrow), layer.delta.to(narrow)))
    return pool._replace(factors=tuple(layers))


@pytest.mark.parametrize("way", WAYS)
def test_the_pools_columns_arrive_in_rank_order(ranks: list[dict[str, Any]], way: str) -> None:
    for rank, found in enumerate(ranks):
        pool, blocks = expected_pool(way, rank), found[way]["blocks"]
        assert len(blocks) == (POOL[way] if "ring" in way else 1)
        assert sorted(start for start, _ in blocks) == [i * POOL[way] * EACH // len(blocks) for i in range(len(blocks))]
        for start, columns in blocks:
            wanted = pool.part(slice(start, start + len(columns.ids)))
            for got, want in zip(columns.factors, wanted.factors, strict=True):
                assert got.hidden.dtype == want.hidden.dtype
                torch.testing.assert_close(got.hidden, want.hidden, rtol=1e-6, atol=1e-6)
                assert torch.equal(got.delta, want.delta)
            assert all(torch.equal(a, b) for a, b in zip(columns[1:5], wanted[1:5], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(found[way]["columns"][1:5], pool[1:5], strict=True))


def test_the_rows_own_activations_are_never_rounded(ranks: list[dict[str, Any]]) -> None:
    rows = everyone().part(slice(EACH, 2 * EACH))
    assert torch.equal(ranks[1]["bf16"]["own"][0], rows.factors[0].hidden)
    assert ranks[1]["sketch_ring"]["own"][0].shape == (EACH, VIEWS, DIM)


@pytest.mark.parametrize("way", WAYS)
def test_bytes_are_those_of_what_arrived(ranks: list[dict[str, Any]], way: str) -> None:
    """Whole buffers where all is gathered, my own share among them; on a ring the blocks that were received."""
    pool = POOL[way] * EACH
    wide = 2 if way == "bf16" else 4
    small = VIEWS * (LAYERS[0][1] * 4 + sum(out for _, out in LAYERS) * wide) + 8 + 8 + LABELS
    hidden = VIEWS * wide * sum(min(DIM, width) if way == "sketch_ring" else width for width, _ in LAYERS)
    arriving = pool - EACH if "ring" in way else pool
    expected = 0 if way == "rank" else pool * small + arriving * hidden
    assert [found[way]["bytes"] for found in ranks] == [expected] * RANKS

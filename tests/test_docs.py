"""What the documents say can be done: make targets, files, links, commands and config keys exist."""

import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.influence import naive
from tests.train.tiny_run import context, global_batch, miner, networks
from tracekin.config import Config, EvaluateConfig, load
from tracekin.influence import POLICIES, Block, choose
from tracekin.objective import OBJECTIVES
from tracekin.train.step import loss_with_mined_positives

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "shards" / "README.md"]
COMMANDS = [
    (document, line.strip().removeprefix("$ "))
    for document in DOCUMENTS
    for block in re.findall(r"^```(?:bash|sh)?\n(.*?)^```", document.read_text(encoding="utf-8"), re.M | re.S)
    for line in re.sub(r"\\\n\s*", " ", block).splitlines()
    if re.match(r"\s*(\$ )?(make|tracekin|torchrun|srun|python -m) ", line)
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (document.parent / target).exists(), target
    for name in re.findall(r"`((?:configs|src|tests|shards|benchmarks)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize(("document", "line"), COMMANDS, ids=lambda x: x if isinstance(x, str) else x.name)
def test_commands_exist(document: Path, line: str) -> None:
    words = line.split("#")[0].split()
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        assert words[1] in targets
        return
    for module in re.findall(r"python -m ([\w.]+)|-m (tracekin\.cli)", line):
        path = ROOT / (module[0] or "src." + module[1]).replace(".", "/")
        assert path.with_suffix(".py").exists() or path.is_dir(), module
    keys = [word for word in words if re.match(r"[a-z_.]+=\S+$", word) and not word.startswith("-")]
    if "pretrain" in words:
        load(Config, ROOT / words[words.index("pretrain") + 1], [k for k in keys if "NAME" not in k])
    elif "evaluate" in words:
        load(EvaluateConfig, None, [k for k in keys if "=" in k and "PATH" not in k])
    if words[0] == "tracekin":
        from tracekin.cli import cli

        assert words[1] in cli.commands


def test_the_example_of_an_objective_is_one_file_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """CONTRIBUTING's file trains, with mining, and its gradient is autograd's."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = re.search(r"^## A new objective.*?^```python\n(.*?)^```", text, re.M | re.S)
    assert section
    module = ModuleType("align")
    exec(section.group(1), module.__dict__)
    assert len([line for line in section.group(1).splitlines() if line and "import" not in line]) <= 30  # as promised

    monkeypatch.setitem(OBJECTIVES, "simclr", module.OBJECTIVE)  # in the place of one whose heads are as wide
    online, found = networks(torch.float64, name="simclr")
    batch = global_batch(torch.float64)
    losses = loss_with_mined_positives(online, found, batch, miner(found, "tracin_cosine"), **context())
    assert losses.found is not None
    outputs = online(batch.views)
    compared = found.compare(outputs.output, outputs.projection, batch.index, 0)
    loss = compared.loss().loss
    delta = torch.autograd.grad(len(batch.index) * loss, outputs.output, retain_graph=True)[0]
    assert torch.allclose(compared.delta(), delta)
    assert torch.allclose(compared.attraction(outputs.projection[:, None], torch.ones(len(batch.index), 1)), loss)


def test_the_example_of_a_policy_is_one_file_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """CONTRIBUTING's file, under a name in the registry, chooses what it says it does, alone and in a step."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = re.search(r"^## A new policy.*?^```python\n(.*?)^```", text, re.M | re.S)
    assert section
    module = ModuleType("hidden_cosine")
    exec(section.group(1), module.__dict__)
    monkeypatch.setitem(POLICIES, "hidden_cosine", module.POLICY)

    side = naive.of_policy("hidden_cosine", 12, seed=0)
    alone = choose("hidden_cosine", side, [Block(0, side)], seed=0, step=0, exclude_group=True)
    online, objective = networks(torch.float64)
    inside = loss_with_mined_positives(
        online, objective, global_batch(torch.float64), miner(objective, "hidden_cosine"), **context()
    ).found
    assert inside is not None
    for mined, rows in ((alone, side), (inside.mined, inside.rows)):
        hidden = rows.factors[0].hidden
        score = naive.feature(hidden, hidden).masked_fill(rows.groups[:, None] == rows.groups, -torch.inf)
        assert torch.equal(mined.index[:, 0], score.argmax(1))

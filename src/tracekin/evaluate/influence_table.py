"""Proponents and opponents as a Parquet table, with an HTML page of the pictures beside it and a summary in words."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tracekin.data.reader import ShardReader
from tracekin.evaluate.influence import Influences, Study
from tracekin.evaluate.pictures import label_text, same_label, thumbnail
from tracekin.files import write_text
from tracekin.influence.diagnostics import hit_and_chance, in_degree
from tracekin.influence.mining import Mined
from tracekin.monitor.influence_page import Explained, InfluencePage, Related, render

NUM_SHOWN = 5
"""Proponents and opponents of an image on the page."""
DOMINANT = 0.9
"""Share of the weight from which on one checkpoint is said to speak for all."""
METADATA = b"tracekin"
"""The key of the Parquet file's metadata under which ``facts`` lies as JSON."""


def write_influences(study: Study, found: Influences, out: Path) -> list[str]:
    """Write ``out`` and beside it the page; both appear whole or not at all.

    The table has one row an explained image, kind and rank:

    ==============  ============  =====================================================================
    image           string        key of the explained image
    image_labels    list<string>  names of its classes; empty without labels or findings
    kind            string        ``proponent`` (its gradient agrees) or ``opponent`` (it is opposed)
    rank            int32         1 for the strongest; an image may have fewer than k of a kind
    other           string        key of the proponent or opponent
    other_labels    list<string>  names of its classes
    score           float         above 0 for proponents, below 0 for opponents
    measure         string        what ``score`` is: ``cosine`` (-1 to 1) or ``product`` of gradients
    ==============  ============  =====================================================================

    Its metadata hold ``facts`` as JSON under the key ``tracekin``.

    Returns:
        Sentences about what was found.
    """
    said = findings(study, found)
    page = render(_page(study, found, said))
    temporary = out.with_name(f".{out.name}.partial")
    try:
        pq.write_table(_table(study, found), temporary)
        write_text(out.with_suffix(".html"), page)
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    return said


def facts(study: Study) -> dict[str, Any]:
    """What the scores depend on, JSON values only."""
    config = study.config
    return {
        "run": study.run.name,
        "dataset": study.manifest.name,
        "fingerprint": study.manifest.fingerprint(),
        "split": study.split,
        "against": config.against,
        "images": len(study.numbers),
        "searched": study.manifest.count(config.against),
        "k": config.k,
        "normalise": config.normalise,
        "exclude_group": config.exclude_group,
        "draws": config.draws,
        "seed": config.seed,
        "checkpoints": [weighed.folder.name for weighed in study.checkpoints],
        "steps": [weighed.step for weighed in study.checkpoints],
        "learning_rates": [weighed.lr for weighed in study.checkpoints],
        "weights": [weighed.weight for weighed in study.checkpoints],
        "note": study.note,
        "optimiser": study.run.optimiser.name,
    }


def findings(study: Study, found: Influences) -> list[str]:
    """Sentences: how often labels agree, beside chance; how many images serve as proponents; what to beware of."""
    said = []
    exclude = study.config.exclude_group
    agree, chance = hit_and_chance(found.proponents, found.explained, found.searched, exclude)
    oppose, _ = hit_and_chance(found.opponents, found.explained, found.searched, exclude)
    shares = [float(share.nanmean()) for share in (agree, oppose, chance)]
    if not np.isnan(shares[2]):
        texts = ["none" if np.isnan(share) else f"{share:.3f}" for share in shares]
        said.append(
            f"Share with the label of the image they are named for: proponents {texts[0]}, opponents {texts[1]}, "
            f"chance {texts[2]}."
        )
    degree = in_degree(found.proponents.index, len(found.searched.ids))
    most, different = int(degree.most), round(float(degree.different))
    said.append(
        f"{different:,} different images are proponents; the most frequent is one for {most:,} of "
        f"{len(study.numbers):,}."
    )
    heaviest = max(study.checkpoints, key=lambda weighed: weighed.weight)
    share = heaviest.weight / sum(weighed.weight for weighed in study.checkpoints)
    if len(study.checkpoints) > 1 and share > DOMINANT:
        said.append(
            f"Step {heaviest.step:,} carries {share:.1%} of the checkpoints' weight by its learning rate; weight=equal "
            "shares it."
        )
    if study.note:
        said.append(study.note)
    if study.run.optimiser.name == "adamw":
        said.append("The run used AdamW, so a score is gradient similarity, not first-order influence.")
    return said


def _table(study: Study, found: Influences) -> pa.Table:
    index_RK, score_RK = (
        torch.cat(pair, 1).cpu().numpy()
        for pair in (
            (found.proponents.index, found.opponents.index),
            (found.proponents.score, -found.opponents.score),
        )
    )
    row, slot = np.nonzero(index_RK >= 0)  # by image, then proponents before opponents, then rank
    k = found.proponents.index.shape[1]
    named, of_named = np.unique(index_RK[row, slot], return_inverse=True)
    explained_keys = _keys(study, study.split, study.numbers)
    searched_keys = _keys(study, study.config.against, named.tolist())
    classes = study.manifest.classes
    explained_labels = _label_lists(found.explained.labels, classes)
    searched_labels = _label_lists(found.searched.labels[torch.from_numpy(named)], classes)
    columns = {
        "image": explained_keys.take(pa.array(row)),
        "image_labels": explained_labels.take(pa.array(row)),
        "kind": pa.array(["proponent", "opponent"]).take(pa.array(slot // k)),
        "rank": pa.array(slot % k + 1, pa.int32()),
        "other": searched_keys.take(pa.array(of_named)),
        "other_labels": searched_labels.take(pa.array(of_named)),
        "score": pa.array(score_RK[row, slot]),
        "measure": pa.repeat(_measure(study), len(row)),
    }
    return pa.table(columns).replace_schema_metadata({METADATA: json.dumps(facts(study))})


def _keys(study: Study, split: str, numbers: Sequence[int]) -> pa.Array:
    reader = ShardReader(study.manifest, split, study.run.data)
    return pa.array([reader.key(number) for number in numbers], pa.string())


def _label_lists(label_BL: torch.Tensor, classes: Sequence[str]) -> pa.Array:
    names = [[classes[c] for c in row.nonzero().flatten().tolist()] for row in label_BL.cpu()]
    return pa.array(names, pa.list_(pa.string()))


def _measure(study: Study) -> str:
    return "cosine" if study.config.normalise else "product"


def _page(study: Study, found: Influences, said: Sequence[str]) -> InfluencePage:
    config, count = study.config, len(study.numbers)
    num_shown = min(config.gallery, count)
    shown = [n * count // num_shown for n in range(num_shown)]  # spaced evenly, not picked by score
    steps = ", ".join(f"{weighed.step:,}" for weighed in study.checkpoints)
    measure = "cosines of gradients" if config.normalise else "products of gradients"
    settings = {key: value for key, value in facts(study).items() if value is not None}
    return InfluencePage(
        title=f"Influence in {study.run.name}",
        subtitle=(
            f"{count:,} {study.split} {'image' if count == 1 else 'images'} of {study.manifest.name} against "
            f"{study.manifest.count(config.against):,} "
            f"{config.against} images: {measure}, summed over the checkpoints of steps {steps}"
        ),
        findings=said,
        explained=[_explained(study, found, position) for position in shown],
        settings={key: ", ".join(map(str, v)) if isinstance(v, list) else str(v) for key, v in settings.items()},
    )


def _explained(study: Study, found: Influences, position: int) -> Explained:
    sample = ShardReader(study.manifest, study.split, study.run.data).read(study.numbers[position])
    others = ShardReader(study.manifest, study.config.against, study.run.data)

    def related(mined: Mined, sign: int) -> list[Related]:
        pairs = zip(mined.index[position].tolist(), mined.score[position].tolist(), strict=True)
        return [
            Related(
                thumbnail(other := others.read(number)),
                label_text(other, study.manifest),
                f"{sign * score:+.3f}" if study.config.normalise else f"{sign * score:+.2g}",
                same_label(sample, other, study.manifest),
            )
            for number, score in list(pairs)[:NUM_SHOWN]
            if number >= 0
        ]

    return Explained(
        thumbnail(sample),
        sample.key,
        label_text(sample, study.manifest),
        related(found.proponents, 1),
        related(found.opponents, -1),
    )

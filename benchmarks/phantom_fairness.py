"""Claim: the phantoms are fair. A supervised ResNet-18 solves them (>= 0.9 balanced accuracy on test at 64 px) and raw
pixels do not (area-averaged to 8x8, between chance + 0.05 and 0.6). About three minutes on 2 CPU cores:

    python -m benchmarks.phantom_fairness [--epochs 15] [--lesions 1000] [--seed 0]

The last line is a JSON object; `untrained` is the kNN score of a ResNet-18 that never trained.
"""

import io
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import balanced_accuracy_score
from torchvision.models import resnet18

from benchmarks.harness import arguments, finish
from shards.recipes.base import Record, split_by_group
from shards.recipes.phantom import Options, recipe
from tracekin.evaluate.knn import knn_probability


def pixels_of(record: Record) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(record.read())))


def knn(features, labels, train, test):
    """Balanced accuracy of the evaluation's weighted kNN."""
    x, hot = features.float().numpy(), F.one_hot(labels).float().numpy()
    probability = knn_probability(x[train], hot[train], x[test], k=20, temperature=0.07)
    return round(float(balanced_accuracy_score(labels[test], probability.argmax(1))), 4)


def forward(model, images):
    model.eval()
    with torch.no_grad():
        return torch.cat([model(batch) for batch in images.split(256)])


def supervised(images, labels, train, test, epochs, seed, batch=64):
    """Balanced accuracy on test of a ResNet-18 trained with flips and quarter turns, AdamW on a one-cycle schedule."""
    torch.manual_seed(seed)
    model = resnet18(num_classes=int(labels.max()) + 1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    steps = epochs * (len(train) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    for epoch in range(epochs):
        model.train()
        order = train[torch.randperm(len(train))][: len(train) // batch * batch]
        for chosen in order.split(batch):
            x = torch.rot90(images[chosen], int(torch.randint(4, ())), (2, 3))
            x = x.flip(3) if torch.rand(()) < 0.5 else x
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(x).float(), labels[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        print(f"epoch {epoch + 1}/{epochs} loss {loss.item():.3f}", flush=True)
    return round(float(balanced_accuracy_score(labels[test], forward(model, images[test]).argmax(1))), 4)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--lesions", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    dataset = recipe(None, Options(lesions=args.lesions), args.seed)
    records = split_by_group(dataset.records, args.seed, dataset.shares)
    with ProcessPoolExecutor() as pool:
        images = torch.from_numpy(np.stack(list(pool.map(pixels_of, records, chunksize=32))))
    images = images.permute(0, 3, 1, 2).float() / 255
    labels = torch.tensor([record.label for record in records])
    train, test = (torch.tensor([i for i, r in enumerate(records) if r.split == split]) for split in ("train", "test"))
    pixels = knn(F.adaptive_avg_pool2d(images, 8).flatten(1), labels, train, test)
    mean, std = images[train].mean((0, 2, 3), keepdim=True), images[train].std((0, 2, 3), keepdim=True)
    images = (images - mean) / std
    torch.manual_seed(args.seed)
    untrained = resnet18()
    untrained.fc = torch.nn.Identity()
    result = {
        "images": len(records),
        "chance": 1 / len(set(labels.tolist())),
        "pixels": pixels,
        "untrained": knn(forward(untrained, images), labels, train, test),
        "supervised": supervised(images, labels, train, test, args.epochs, args.seed),
        "seconds": round(time.perf_counter() - start, 1),
    }
    result["fair"] = result["supervised"] >= 0.9 and result["chance"] + 0.05 <= pixels <= 0.6
    result["ratio_to_bound"] = result["supervised"] / 0.9
    finish("phantom_fairness", result, save=args.save)


if __name__ == "__main__":
    main()

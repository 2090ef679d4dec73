"""How far features and saliency maps of a ViT-S/14 at 518 pixels move under every method, against time.

    python benchmarks/segmentation/saliency_agreement.py --weights WEIGHTS --images IMAGES --count 32 \
        --state agreement.jsonl --output benchmarks/segmentation/agreement_small14.csv

WEIGHTS holds vit_small14_saliency/ (backbone.safetensors, decoder.safetensors), IMAGES a tree of .jpg files, of which
`--count` are drawn by the seed. 1370 tokens; one image at a time, one thread, the runs taking turns. A run that was
stopped goes on from the state file; the table is of the images that are done.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from dense_runs import (
    CARDS,
    Setting,
    at_shares,
    by_setting,
    load_backbone,
    patched_copies,
    read_image,
    read_state,
    take_turns,
)
from dense_runs import timed as cpu_seconds
from safetensors.torch import load_file
from torch import Tensor, nn

import tokenzoo
from tokenzoo.core.registry import method_class
from tokenzoo.dense import encode
from tokenzoo.evaluation import environment, write_results
from tokenzoo.evaluation.results import table
from tokenzoo.evaluation.runs import Run

COLUMNS = (
    "setting", "method", "method_kwargs", "share", "gmacs", "tokens_out", "time_ratio", "time_q1", "time_q3", "cosine",
    "cosine_se", "cosine_worst_tenth", "saliency_mae", "saliency_mae_se", "saliency_iou", "saliency_iou_se",
    "saliency_corr", "saliency_corr_se", "images", "weights", "size",
)  # fmt: skip
MEANS = {"cosine": "cosine", "mae": "saliency_mae", "iou": "saliency_iou", "corr": "saliency_corr"}
SHOWN = ("setting", "share", "time_ratio", "cosine", "cosine_se", "saliency_mae", "saliency_mae_se", "saliency_iou")


class SaliencyDecoder(nn.Module):
    """Three transposed convolutions with batch norm and ReLU, and a 1 x 1 convolution: logits at 8 times the grid."""

    def __init__(self, dim: int = 384) -> None:
        super().__init__()
        for index, (inner, outer) in enumerate(((dim, 256), (256, 128), (128, 64)), 1):
            setattr(self, f"upconv{index}", nn.ConvTranspose2d(inner, outer, 4, stride=2, padding=1))
            setattr(self, f"bn{index}", nn.BatchNorm2d(outer))
        self.final_conv = nn.Conv2d(64, 1, 1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Saliency [B, 1, height, width] from 0 to 1 of features [B, C, h, w]."""
        for index in (1, 2, 3):
            x = F.relu(getattr(self, f"bn{index}")(getattr(self, f"upconv{index}")(x)))
        return F.interpolate(self.final_conv(x), size, mode="bilinear", align_corners=False).sigmoid()


def load_decoder(path: Path) -> SaliencyDecoder:
    """The decoder of the released file; every key has to be taken."""
    state = {key.removeprefix("decoder."): value.float() for key, value in load_file(path).items()}
    decoder = SaliencyDecoder()
    for key, value in decoder.state_dict().items():
        if key.endswith("num_batches_tracked"):
            state[key] = value  # the export does not have it, and nothing reads it in eval mode
    decoder.load_state_dict(state)
    return decoder.eval().requires_grad_(False)


def agreement(features: Tensor, saliency: Tensor, base: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Cosines of patches [1, P, C] and differences of maps [1, 1, H, W] to those of the unpatched model."""
    cosine = F.cosine_similarity(features, base[0], dim=2)[0]
    ours, theirs = saliency > 0.5, base[1] > 0.5
    union = (ours | theirs).sum().item()
    both = torch.stack([saliency.flatten(), base[1].flatten()]).double()
    return {
        "cosine": cosine.mean().item(),
        "worst": cosine.sort().values[: max(1, len(cosine) // 10)].mean().item(),
        "mae": (saliency - base[1]).abs().mean().item(),
        "iou": (ours & theirs).sum().item() / union if union else 1.0,
        "corr": torch.corrcoef(both)[0, 1].item(),
    }


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean over images and its standard error."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


def summarize(lines: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """What one setting comes to over all images."""
    pairs = by_setting(lines, name)
    ratio = [own["seconds"] / before["seconds"] for own, before in pairs]
    q1, median, q3 = np.percentile(ratio, (25, 50, 75)).round(3)
    row: dict[str, Any] = {"time_ratio": median, "time_q1": q1, "time_q3": q3, "images": len(pairs)}
    for key, column in MEANS.items():
        mean, error = mean_and_error([own[key] for own, _ in pairs])
        row |= {column: round(mean, 4), f"{column}_se": round(error, 4)}
    row["cosine_worst_tenth"] = round(mean_and_error([own["worst"] for own, _ in pairs])[0], 4)
    return row


def at_share(model: nn.Module, share: float) -> list[Setting]:
    """Every method at one share; clustering also in other ways, dropping also filled from the nearest kept patch."""
    settings = at_shares(model, [share], {}, spare=())
    for cluster, norm in (({}, "l2"), ({}, "copy"), ({"temperature": 0.02}, "l1")):
        recipe = [{"method": "cluster", **cluster}, {"method": "reconstruct", "layers": "norm", "norm": norm}]
        text = "".join(f" {key}={value}" for key, value in cluster.items())
        name = f"cluster{text}, reconstruct norm={norm} flops={share}"
        settings.append(Setting(name, "cluster+reconstruct", Run(recipe, {"flops": share}), share))
    for setting in list(settings):
        if "+" not in setting.method and method_class(setting.method).kind.startswith(("prune", "sample")):
            run = Run(setting.method, {"flops": share, "fill": "nearest"})
            settings.append(Setting(f"{setting.name} fill=nearest", setting.method, run, share))
    return settings


def try_sharpness(
    model: nn.Module, images: list[Tensor], share: float, tried: list[float]
) -> Iterator[tuple[float, float]]:
    """(sharpness, mean cosine of lifted features to those of the unpatched model) of clustering at a share."""
    with torch.inference_mode():
        base = [encode(model, x).features() for x in images]
        for sharpness in tried:
            with tokenzoo.patched(model, "cluster", sharpness=sharpness, flops=share):
                lifted = [encode(model, x).features() for x in images]
            cosines = [F.cosine_similarity(ours, theirs, dim=2).mean().item() for ours, theirs in zip(lifted, base)]
            yield sharpness, float(np.mean(cosines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--size", type=int, default=518)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.6])
    parser.add_argument("--sweep", type=float, nargs="+", default=None, help="of clustering: only try these")
    parser.add_argument("--sweep-count", type=int, default=4, help="images for it, which the table does not use")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="take no image after that many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, default=Path("agreement.jsonl"))
    parser.add_argument("--output", type=Path, default=Path("agreement.csv"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    card, size = CARDS["vit_small14_saliency"], (args.size, args.size)
    model = load_backbone(args.weights, card, size)
    decoder = load_decoder(args.weights / card.folder / "decoder.safetensors")
    paths = {str(p.relative_to(args.images)): p for p in sorted(args.images.rglob("*.[jJ][pP]*[gG]"))}
    settings = [s for share in args.shares for s in at_share(model, share)]
    models = patched_copies(model, settings)
    order = sorted(paths)
    random.Random(args.seed).shuffle(order)
    chosen = order[: args.count]
    if args.sweep:
        others = [read_image(paths[name], size, card, crop=True) for name in order[-args.sweep_count :]]
        for sharpness, cosine in try_sharpness(model, others, args.shares[0], args.sweep):
            print(f"sharpness={sharpness:g}: cosine {cosine:.4f} on {len(others)} other images", flush=True)
        return
    at_hand: dict[str, Any] = {}

    @torch.inference_mode()
    def work(name: str, image: str) -> dict[str, float]:
        if at_hand.get("image") != image:
            at_hand.update(image=image, x=read_image(paths[image], size, card, crop=True), base=None)
        features, seconds = cpu_seconds(lambda: encode(models[name], at_hand["x"]).features())
        grid = features.transpose(1, 2).unflatten(2, model.patch_embed.grid_size)
        saliency, decoding = cpu_seconds(lambda: decoder(grid, size))
        at_hand["base"] = at_hand["base"] or (features, saliency)
        return {"seconds": seconds, "decoding": decoding, **agreement(features, saliency, at_hand["base"])}

    work("unpatched", chosen[0])
    names = [setting.name for setting in settings]
    for image in take_turns(chosen, names, args.state, work):
        print(image, flush=True)
        if time.monotonic() - start > 60 * args.minutes:
            break
    lines = [line for line in read_state(args.state, names) if line["image"] in chosen]
    full = tokenzoo.report(model, size)
    rows = [{"setting": "unpatched", "method": "unpatched", "share": 1.0, "gmacs": round(full.total / 1e9, 3),
             "tokens_out": full.tokens_out, **summarize(lines, "unpatched")}]  # fmt: skip
    for setting in settings:
        costs = tokenzoo.report(models[setting.name], size)
        rows.append({
            "setting": setting.name, "method": setting.method, "method_kwargs": setting.run.settings(),
            "share": round(costs.total / full.total, 4), "gmacs": round(costs.total / 1e9, 3),
            "tokens_out": costs.tokens_out, **summarize(lines, setting.name),
        })  # fmt: skip
    for row in rows:
        row.update(weights="vit_small14_saliency", size=f"{size[0]}x{size[1]}")
    rows[1:] = sorted(rows[1:], key=lambda row: -row["cosine"])
    print(table([[str(row.get(column, "")) for column in SHOWN] for row in rows], SHOWN))
    record = environment("cpu", None) | {
        "command": f"python benchmarks/segmentation/saliency_agreement.py --count {args.count} --size {args.size}"
    }
    write_results(args.output, [dict.fromkeys(COLUMNS, "") | row for row in rows], COLUMNS, record)


if __name__ == "__main__":
    main()

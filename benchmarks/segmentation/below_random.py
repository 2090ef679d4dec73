"""Why some methods lie below randomly dropped patches at equal cost: what a block adds to its patches, and variants.

    python benchmarks/segmentation/below_random.py --weights WEIGHTS --data CAMVID --card vit_tiny_tin200 \
        --size 240 320 --work runs/tiny --count 12

First, one block of the model replaced by the method's: how far what the patches gain there is from what they gain in
the unpatched block, relative to that gain in the root mean square (1 is as far as gaining nothing), and the cosine of
both. Of `evo`, over the half of the patches that are farthest: those that follow the representative. Then variants of
`ats`, by the share of labelled pixels that the linear head of `camvid_table.py --work` answers as without a method.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from camvid_heads import CLASSES, Frame, read_frames, trained_heads  # beside this script
from dense_runs import CARDS, add_source, load_backbone, read_image
from torch import Tensor, nn

import tokenzoo
from tokenzoo.dense import Segmenter
from tokenzoo.evaluation.results import table
from tokenzoo.evaluation.runs import shared_copy

OPTIONS = {"evo": {"keep_rate": 0.5}, "sta": {"cell": 4}}


def gains(model: nn.Module, block: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a block takes and gives, patches only [N, C]."""
    seen: dict[str, Tensor] = {}

    def keep(_: nn.Module, given: tuple[Any, ...], answer: Any) -> None:
        both = (given[0], answer)
        seen["in"], seen["out"] = (part[0, 1:] if isinstance(part, Tensor) else part.x[0, 1:] for part in both)

    handle = model.blocks[block].register_forward_hook(keep)
    model.forward_features(x)
    handle.remove()
    return seen["in"], seen["out"]


def update_error(model: nn.Module, name: str, block: int, images: list[Tensor]) -> tuple[float, float]:
    """(relative error, cosine) of what the patches gain in a block, means over images."""
    patched = tokenzoo.patch_model(shared_copy(model), name, layers=(block,), **OPTIONS[name])
    errors, cosines = [], []
    for x in images:
        before, after = gains(model, block, x)
        given, found = gains(patched, block, x)
        wanted, had = after - before, found - given
        rows = torch.arange(len(wanted))
        if name == "evo":
            rows = ((had - wanted).norm(dim=1) / wanted.norm(dim=1)).argsort()[len(wanted) // 2 :]
        errors.append((had - wanted)[rows].norm() / wanted[rows].norm())
        cosines.append(F.cosine_similarity(had[rows], wanted[rows]).mean())
    return torch.stack(errors).mean().item(), torch.stack(cosines).mean().item()


def variants(model: nn.Module) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name to (method, options): ATS at 60 %, and others that drop as many patches in the same blocks."""
    solved = tokenzoo.recipe(tokenzoo.patch_model(shared_copy(model), "ats", flops=0.6))
    left, blocks = model.patch_embed.num_patches, range(len(model.blocks) // 4, len(model.blocks))
    rates = []
    for places in solved["max_tokens"]:
        rates.append(min(1.0, (places - 1 + 1e-6) / left))  # keep rates are of what is left
        left = places - 1
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for fill in ("stash", "nearest"):
        for name in ("ats", "topk", "random"):
            found[f"{name}, {fill}"] = (name, {"flops": 0.6, "fill": fill})
        for name in ("topk", "random"):
            there = {"layers": list(blocks), "keep_rate": rates, "fill": fill}
            found[f"{name} as many as ats in its blocks, {fill}"] = (name, there)
    return found


def agreement(model: nn.Module, head: nn.Module, frames: list[Frame], images: list[Tensor]) -> list[list[str]]:
    """Rows of a variant, its tokens in the end and its agreement in percent with the error over images."""
    rows = []
    base = [Segmenter(model, head, len(CLASSES)).eval()(x).argmax(1) for x in images]
    for name, (method, options) in variants(model).items():
        own = tokenzoo.patch_model(shared_copy(model), method, **options)
        segmenter, shares = Segmenter(own, head, len(CLASSES)).eval(), []
        for frame, x, wanted in zip(frames, images, base):
            labelled = torch.from_numpy(frame.mask)[None] < len(CLASSES)
            same = F.interpolate((segmenter(x).argmax(1) == wanted)[:, None].float(), labelled.shape[-2:])[:, 0]
            shares.append(same[labelled].mean() * 100)
        found = torch.stack(shares)
        costs = tokenzoo.report(own, model.patch_embed.img_size)
        error = found.std() / len(found) ** 0.5
        rows.append([name, f"{costs.ratio:.3f}", str(costs.tokens_out), f"{found.mean():.1f} ± {error:.1f}"])
    return rows


@torch.inference_mode()
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_source(parser)
    parser.add_argument("--work", type=Path, required=True, help="of camvid_table.py, with its linear head")
    parser.add_argument("--count", type=int, default=12, help="validation images, evenly spread")
    args = parser.parse_args()
    torch.set_num_threads(1)
    card, size = CARDS[args.card], tuple(args.size)
    model = load_backbone(args.weights, card, size)
    frames = read_frames(args.data / "val")
    frames = frames[:: max(1, len(frames) // args.count)][: args.count]
    images = [read_image(frame.image, size, card) for frame in frames]
    blocks = range(1, len(model.blocks), 2)
    errors = [
        [name, *("{:.2f}, {:.2f}".format(*update_error(model, name, block, images)) for block in blocks)]
        for name in OPTIONS
    ]
    print(table(errors, ("error, cosine", *(f"block {block}" for block in blocks))))
    head = trained_heads(model, ["linear"], [], card, args.work)["linear"]
    print(table(agreement(model, head, frames, images), ("variant", "share", "tokens_out", "agreement")))


if __name__ == "__main__":
    main()

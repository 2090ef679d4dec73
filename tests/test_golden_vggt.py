"""FastVGGT's partition, merge and way back against the published implementation."""

import torch
from goldens import Case, cases, check_settings, close

from tokenzoo.maps import BesideMap, MergeMap
from tokenzoo.ops.matching.frames import frame_destinations, frame_parts, spread_step
from tokenzoo.ops.matching.strided import split_pairs

SPECIAL = 5  # tokens in front of the patches of each image: camera and registers
PROTECT = 0.1


@cases("vlm", lambda c: c.has("out/is_destination"))
def test_merge_and_unmerge(case: Case):
    s, x = case.settings, case["in/tokens"]
    check_settings(s, "images", "h", "w", "C", "r", "protect", "sx", "sy", "merged_tokens", "seed")
    images, n = s["images"], x.shape[1]
    assert n == images * (s["h"] * s["w"] + SPECIAL)
    draw = (case["in/random_dst_choice"].flatten(1) + 0.5) / (s["sy"] * s["sx"])
    receives = frame_destinations(images, (s["h"], s["w"]), (s["sy"], s["sx"]), x.device, draw, SPECIAL)
    assert torch.equal(receives, case["out/is_destination"].bool())

    count = int(PROTECT * n) if s["protect"] else 0
    kept = torch.arange(count) * spread_step(n, count)
    free = int((~receives).sum() - (~receives[kept]).sum())
    src, dst = frame_parts(receives, kept, free, int(receives.sum()))
    assert src.tolist() == [i for i in range(n) if not receives[i] and i not in kept]
    pairs = split_pairs(case["in/metric"], src.unsqueeze(0), dst.unsqueeze(0), min(s["r"], free))
    token_map = BesideMap(MergeMap(pairs.order, pairs.src, pairs.slot, n), kept.unsqueeze(0))
    lengths = [pairs.order.shape[1] - len(dst), len(dst), len(kept)]
    assert lengths == case["out/block_lengths"].tolist() and token_map.n_out == s["merged_tokens"]
    close(token_map.apply(x), case["out/merged"], 1e-5)
    close(token_map.lift(case["out/merged"]), case["out/unmerged"], 1e-6)
    close(token_map.matrix().float() @ x, case["out/merged"], 1e-5)

"""A selector of tokenzoo behind the retention-mask contract of a serving engine, without the engine.

Engines that prune rows of videos ask for a mask: given the rows of one video [T * H * W / m^2, D], its patches (T, H,
W), the patches m that are merged along each side, and the share q that goes, which rows stay? The count is fixed by the
contract (at least one frame's worth), because placeholders are made before the rows are known. vLLM's
`compute_retention_mask` has this signature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenzoo.vlm import functional


def retained_count(rows_per_frame: int, frames: int, q: float) -> int:
    """Rows that stay, known in front of the tower.

    Args:
        rows_per_frame: rows of a frame.
        frames: frames of the video.
        q: share that goes.
    """
    return max(rows_per_frame, int(rows_per_frame * frames * (1 - q)))


def compute_retention_mask(
    video_embeds: Tensor, video_size_thw: tuple[int, int, int], spatial_merge_size: int, q: float
) -> Tensor:
    """Which rows of a video stay, chosen by DivPrune.

    Args:
        video_embeds: rows as the language model would see them [N, D].
        video_size_thw: patches (frames, high, wide).
        spatial_merge_size: patches per row along each side.
        q: share that goes, in [0, 1).

    Returns:
        [N] bool, with `retained_count` rows set.
    """
    frames, high, wide = map(int, video_size_thw)
    per_frame = (high // spatial_merge_size) * (wide // spatial_merge_size)
    if len(video_embeds) != frames * per_frame:
        raise ValueError(f"{len(video_embeds)} rows for {frames} frames of {per_frame}; give the rows of one video")
    keep = retained_count(per_frame, frames, q)
    mask = torch.zeros(len(video_embeds), dtype=torch.bool, device=video_embeds.device)
    mask[functional.divprune(video_embeds[None], keep)[0]] = True
    return mask


if __name__ == "__main__":
    video = torch.randn(8 * 4 * 4, 32)
    kept = compute_retention_mask(video, (8, 8, 8), 2, q=0.75)
    print(f"{int(kept.sum())} of {len(kept)} rows stay")

"""DToP against the published implementation."""

import ast
import re

import torch
from goldens import Case, cases, check_settings, close, read

from tokenzoo.dense import DToP, DToPHead


def head_from(tensors: dict[str, torch.Tensor], name: str, num_heads: int) -> DToPHead:
    """A recorded head, sizes read off its weights."""
    weights = {k.removeprefix(f"{name}/"): v for k, v in tensors.items() if k.startswith(f"{name}/")}
    width, dim = weights["input_proj.weight"].shape
    depth = 1 + max(int(k.split(".")[2]) for k in weights if k.startswith("decoder.layers."))
    head = DToPHead(dim, len(weights["q.weight"]), width, num_heads, depth)
    head.load_state_dict(weights)
    return head


def model_of(case: Case) -> DToP:
    tensors, meta = read(case.file)
    check_settings(meta, "out_indices", "num_classes", "threshold", "note", "weights", "input")
    taps = ast.literal_eval(meta["out_indices"])
    heads = int(re.search(r"(\d+) heads", meta["note"]).group(1))
    names = [f"aux{i}" for i in range(len(taps) - 1)] + ["head"]
    model = DToP(
        case.model(), [head_from(tensors, n, heads) for n in names], taps, float(meta["threshold"])
    )
    assert model.num_classes == int(meta["num_classes"])
    return model.eval()


@cases("dtop", lambda c: "pred" in read(c.file)[0])
@torch.no_grad()
def test_dtop(case: Case):
    tensors, model = read(case.file)[0], model_of(case)
    x = case.input(len(tensors["pred"]))
    seen: list[torch.Tensor] = []
    hooks = [model.backbone.blocks[i].register_forward_hook(lambda m, a, out: seen.append(out)) for i in model.taps]
    out = model.predict(x)
    for hook in hooks:
        hook.remove()
    for stage, done in enumerate(out.done):
        assert torch.equal(done, tensors[f"pruned_after_stage{stage}"].bool())
        close(out.stages[stage], tensors[f"aux{stage}_pred"])
    close(out.scores, tensors["pred"])
    close(out.masks, tensors["attn"])
    for stage, rows in enumerate(seen):  # finished tokens are zero there, and gone here
        tap = tensors[f"tap{stage}"]
        for image in range(len(x)):
            left = tap[image][tap[image].abs().sum(1) > 0]
            close(rows[image, : len(left)], left)
    # one by one, as recorded: images of a batch do not meet
    for image in range(len(x)):
        alone = model.predict(x[image : image + 1])
        close(alone.scores[0], out.scores[image], 1e-5)
        assert all(torch.equal(a[0], b[image]) for a, b in zip(alone.done, out.done))

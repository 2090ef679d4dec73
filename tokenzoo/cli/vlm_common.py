"""What the actions of `tokenzoo vlm` share: the model, its prompt, and the recipes that are named."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..vlm.recipe import VlmRecipe
from .common import key_values

_SIZES = {  # width, layers, heads of tower and language model, side of images, side of patches
    "tiny": (32, 4, 4, 64, 8),
    "small": (384, 12, 6, 336, 14),
}
_IMAGE = 250  # the placeholder of random models
_OF_PATCHING = ("prefill", "text", "images")


def add_vlm_arguments(parser: argparse.ArgumentParser, words: bool = True) -> None:
    """--model or --random, --method, and where it runs.

    Args:
        parser: gets them.
        words: whether there is one prompt of --prompt, so that random models, which know no words, will do.
    """
    group = parser.add_argument_group("model")
    which = group.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", default=None, help="name on the Hugging Face hub, or a folder of save_pretrained")
    if words:
        which.add_argument("--random", choices=_SIZES, default=None, help="a LLaVA with random weights")
    group.add_argument("--attn", default="sdpa", help="attention implementation of transformers")
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.add_argument("--threads", type=int, default=None, help="CPU threads")
    group.add_argument("--seed", type=int, default=0, help="seed of random weights and images")
    if words:
        group.add_argument("--prompt", default="Describe the image.", help="words beside the image")
    parser.add_argument(
        "--method",
        action="append",
        nargs="+",
        default=[],
        metavar=("NAME", "KEY=VALUE"),
        help="a selector, a dropper or a method of the tower with its options, or a recipe.yaml that holds several; "
        "prefill=0.3 solves for a share of the multiply-adds",
    )


def recipes_of(args: argparse.Namespace) -> list[tuple[str, Any, dict[str, Any]]]:
    """Label, method and options of every --method; unknown ones are refused before a model is loaded."""
    found = []
    for name, *pairs in args.method:
        options = key_values(pairs, "--method")
        VlmRecipe.parse(name, **{key: value for key, value in options.items() if key not in _OF_PATCHING})
        found.append((" ".join([name, *pairs]), name, options))
    return found


def load(args: argparse.Namespace) -> tuple[nn.Module, Any]:
    """The model in eval mode on its device, and its processor; None for random ones."""
    import transformers

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    options = {"attn_implementation": args.attn, "dtype": getattr(torch, args.dtype)}
    if getattr(args, "random", None) is None:
        model = transformers.AutoModelForImageTextToText.from_pretrained(args.model, **options)
        return model.to(args.device).eval(), transformers.AutoProcessor.from_pretrained(args.model)
    width, depth, heads, side, patch = _SIZES[args.random]
    same = {"intermediate_size": 4 * width, "num_hidden_layers": depth, "num_attention_heads": heads}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(hidden_size=width, image_size=side, patch_size=patch, **same),
        text_config=transformers.LlamaConfig(hidden_size=2 * width, vocab_size=300, **same),
        image_token_id=_IMAGE,
    )
    model = transformers.AutoModelForImageTextToText.from_config(config, **options)
    return model.to(args.device).eval(), None


def image_side(args: argparse.Namespace) -> int:
    """Side of an image that a random model takes, or of one made up for another."""
    return 336 if args.random is None else _SIZES[args.random][3]


def inputs_of(args: argparse.Namespace, model: nn.Module, processor: Any, image: Image.Image) -> dict[str, Tensor]:
    """What the model is called with for one image and the words of --prompt.

    Args:
        args: of the command.
        model: loaded.
        processor: of the model; None for random ones, whose words are made up.
        image: any size.
    """
    device, dtype = args.device, getattr(torch, args.dtype)
    if processor is None:
        from torchvision.transforms.functional import pil_to_tensor

        side, patch = _SIZES[args.random][3:]
        pixels = pil_to_tensor(image.convert("RGB").resize((side, side))).float() / 127.5 - 1
        words = [3 + sum(word.encode()) % 240 for word in args.prompt.split()]
        ids = torch.tensor([[1, *[_IMAGE] * (side // patch) ** 2, *words]])
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.unsqueeze(0)}
    else:
        content = [{"type": "image", "image": image}, {"type": "text", "text": args.prompt}]
        found = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
        )  # fmt: skip
    return {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in found.items()}

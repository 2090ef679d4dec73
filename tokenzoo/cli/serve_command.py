"""`tokenzoo serve`: a local page on which one's own photograph loses tokens."""

from __future__ import annotations

import argparse

from .common import add_model_arguments, load_model, say

HELP = "opens a page on this computer where an image of yours loses tokens, block by block"
EXAMPLE = "tokenzoo serve --model deit_small_patch16_224 --pretrained"
SIDE = 160  # of the demo's model, pixels: 400 patches


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--host, --port, and the model that the page starts with."""
    add_model_arguments(parser, required=False)  # the demo's model by default
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; this computer alone by default")
    parser.add_argument("--port", type=int, default=8765, help="0 takes a free one")


def run(args: argparse.Namespace) -> None:
    """Serves until it is interrupted.

    Raises:
        ImportError: fastapi or uvicorn is missing.
        ValueError: random weights, which would show nothing.
    """
    from ..serve import Shelf, create_app
    from ..serve.app import HOSTS
    from ..serve.demo import CLASSES, load_demo
    from ..serve.models import DEMO, shown
    from ..serve.samples import load_samples

    try:
        import uvicorn
    except ImportError as error:
        raise ImportError("the page needs fastapi and uvicorn: pip install 'tokenzoo[serve]'") from error
    given = {}
    if args.model is not None:
        if not (args.pretrained or args.checkpoint):
            raise ValueError(f"--model {args.model} has random weights; give --pretrained or --checkpoint")
        about = f"weights of {args.checkpoint}" if args.checkpoint else f"timm's weights of {args.model}"
        given[args.model] = shown(load_model(args), about=about)
    given["demo"] = shown(load_demo(SIDE).to(args.device), CLASSES, DEMO)
    app = create_app(Shelf(given, args.device), load_samples(), (*HOSTS, args.host))
    say(f"http://{args.host}:{args.port} (interrupt with Ctrl-C)")
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")

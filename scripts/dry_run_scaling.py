"""Dry run of a run at scale: webdataset shards, two processes, SIGKILL inside an epoch, resuming.

    python scripts/dry_run_scaling.py

Writes shards of random pictures into a temporary folder, trains on them with `torchrun --nproc_per_node 2` and gloo,
kills all processes once a checkpoint inside the second epoch is there, goes on with --resume, then trains once more
without the interruption and compares the weights. Needs `pip install .[wds]` and Linux; no network, no GPU.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import platform
import shlex
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
CLASSES = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shards", type=int, default=8, help="of the training split; a multiple of processes times workers")
    add("--pictures", type=int, default=32, help="a shard")
    add("--side", type=int, default=256, help="pixels of a stored picture")
    add("--model", default="vit_tiny_patch16_224")
    add("--method", nargs="+", default=["tome", "r=13"], metavar="NAME KEY=VALUE")
    add("--img-size", type=int, default=224)
    add("--batch-size", type=int, default=8, help="of one process")
    add("--epochs", type=int, default=3)
    add("--processes", type=int, default=2)
    add("--workers", type=int, default=1, help="that decode, of one process")
    add("--recovery-interval", type=int, default=4, help="updates between checkpoints inside an epoch")
    add("--output", type=Path, default=None, help="keep everything in this folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.shards % (args.processes * args.workers):
        parser.error("--shards has to be a multiple of --processes times --workers")
    if args.shards * args.pictures // (args.batch_size * args.processes) <= args.recovery_interval:
        parser.error("--recovery-interval leaves no checkpoint inside an epoch; lower it or give more pictures")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.output or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        return _dry_run(args, folder)


def _dry_run(args: argparse.Namespace, folder: Path) -> int:
    start = time.perf_counter()
    size = write_shards(folder / "shards", "train", args.shards, args.pictures, args.side)
    write_shards(folder / "shards", "val", 1, args.pictures, args.side)
    count = args.shards * args.pictures
    _say(
        f"{args.shards} training shards of {args.pictures} pictures, {size / count / 1e3:.1f} kB each, in "
        f"{time.perf_counter() - start:.1f} s"
    )
    command = _command(args, folder, count)
    _say("command: " + shlex.join(["torchrun", *command[3:]]).replace(str(folder), "FOLDER"))
    killed, whole = folder / "killed", folder / "whole"
    found = _kill(command, killed, f"checkpoint-00001-{args.recovery_interval:07d}.pt")
    _say(f"SIGKILL to all processes; newest checkpoint {found.name}, {found.stat().st_size / 1e6:.1f} MB")
    result = _finish(command, killed, "--resume")
    table(killed, "killed once and resumed")
    _finish(command, whole)
    table(whole, "never interrupted")
    one, other = (load_file(path / "model.safetensors") for path in (killed, whole))
    apart = max((one[key].double() - other[key].double()).abs().max().item() for key in one)
    _say(f"largest difference between the weights of the two: {apart:.1e}")
    seen = result["environment"]
    _say(
        f"{result['processes']} processes of 1 thread; {seen['device']}, {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f}; {platform.system()}, torch {seen['torch']}, timm {seen['timm']}"
    )
    return 0 if apart == 0 else 1


def write_shards(folder: Path, split: str, shards: int, pictures: int, side: int) -> int:
    """Shards as the webdataset library reads them, a JPEG and its class number each; returns their bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(len(split))
    for shard in range(shards):
        with tarfile.open(folder / f"{split}-{shard:06d}.tar", "w") as archive:
            for number in range(pictures):
                label = (shard * pictures + number) % CLASSES
                stream = io.BytesIO()
                picture(label, side, generator).save(stream, "JPEG", quality=90)
                for name, content in ((f"{number:06d}.jpg", stream.getvalue()), (f"{number:06d}.cls", b"%d" % label)):
                    member = tarfile.TarInfo(f"{shard:06d}{name}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return sum(path.stat().st_size for path in folder.glob(f"{split}-*.tar"))


def picture(label: int, side: int, generator: torch.Generator) -> Image.Image:
    """Clouds of three sizes; the colour leans towards that of the class."""
    scales = [torch.rand(1, 3, n, n, generator=generator) for n in (4, 16, side // 4)]
    layers = [torch.nn.functional.interpolate(x, size=side, mode="bicubic", align_corners=False) for x in scales]
    lean = torch.tensor([label % 3, label // 3 % 3, label % 2]).view(3, 1, 1) * 20
    pixels = (sum(layers)[0] * 70 + lean).clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _command(args: argparse.Namespace, folder: Path, count: int) -> list[str]:
    name, *options = args.method
    return [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(args.processes),
        "train_imagenet.py", "--data-dir", str(folder / "shards"), "--dataset", "wds/random",
        "--train-split", f"train-{{000000..{args.shards - 1:06d}}}.tar|{count}", "--val-split", "val-000000.tar",
        "--num-classes", str(CLASSES), "--model", args.model, "--img-size", str(args.img_size), "--method", name,
        *(["--method-kwargs", *options] if options else []), "--batch-size", str(args.batch_size),
        "--workers", str(args.workers), "--shuffle-buffer", str(args.pictures), "--aa", "rand-m9-mstd0.5-inc1",
        "--epochs", str(args.epochs), "--lr", "1e-4", "--device", "cpu", "--threads", "1",
        "--recovery-interval", str(args.recovery_interval),
    ]  # fmt: skip


def _start(command: list[str], output: Path, *more: str) -> subprocess.Popen:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [*command[:3], "--master_addr", "127.0.0.1", "--master_port", port, *command[3:]]
    return subprocess.Popen(
        [*words, "--output", str(output), *more], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def _kill(command: list[str], output: Path, moment: str) -> Path:
    """Starts a run and ends all its processes as soon as a checkpoint is there that is not older than `moment`."""
    process = _start(command, output)

    def newest() -> Path:
        return max(output.glob("checkpoint-*.pt"), default=Path())

    while process.poll() is None and newest().name < moment:
        time.sleep(0.01)
    if process.poll() is None:
        _end(process.pid)
    text = process.communicate()[0]
    if process.returncode != -signal.SIGKILL:
        raise RuntimeError(f"the run ended before it was killed:\n{text}")
    return newest()


def _end(first: int) -> None:
    """SIGKILL to a process and all that it started; torchrun gives each of its own a group of its own."""
    ends = [first]
    for parent in ends:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            ends += map(int, task.read_text().split())
    for number in ends:
        try:
            os.kill(number, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _finish(command: list[str], output: Path, *more: str) -> dict:
    text = _start(command, output, *more).communicate()[0]
    if "--result\n" not in text:
        raise RuntimeError(f"the run failed:\n{text}")
    return json.loads(text.split("--result\n")[1].splitlines()[0])[0]


def table(output: Path, title: str) -> None:
    """Prints the throughput of every epoch."""
    with (output / "summary.csv").open() as file:
        for row in csv.DictReader(file):
            speed = f"{row['images_per_second']} images/s, {row['seconds']} s with evaluation"
            _say(f"{title}: epoch {row['epoch']}, {speed}")


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())

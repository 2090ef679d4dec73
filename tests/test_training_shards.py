"""Broken pictures and torn shards of a stream: named by shard and key, counted, and the run goes on."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import torch
from test_train_imagenet import main, result_of  # noqa: F401 (main is a fixture)
from timm.data import create_dataset
from training_data import picture, words

from tokenzoo.evaluation import data_config, open_pictures
from tokenzoo.evaluation.loading import PictureLoader
from tokenzoo.evaluation.streams import IN_A_ROW
from tokenzoo.training.sampling import Streamed

pytest.importorskip("webdataset")
SIZE = 12  # pictures of a shard


def write_shard(path: Path, number: int, broken: tuple[int, ...] = (), count: int = SIZE) -> None:
    """JPEG pictures with keys 000000, ... over all shards; those in `broken` are cut in the middle."""
    generator = torch.Generator().manual_seed(number)
    with tarfile.open(path, "w") as archive:
        for i in range(count):
            stream = io.BytesIO()
            picture(i % 4, generator).save(stream, "JPEG")
            content = stream.getvalue()
            content = content[: len(content) // 2] if i in broken else content
            key = f"{number * count + i:06d}"
            for name, member in ((f"{key}.jpg", content), (f"{key}.cls", str(i % 4).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(member)
                archive.addfile(info, io.BytesIO(member))


@pytest.fixture
def shards(tmp_path) -> Path:
    """Four shards: a torn picture in the second, the third ends inside its fourth picture."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(4):
        write_shard(folder / f"train-{number:04d}.tar", number, (5,) if number == 1 else ())
    torn = folder / "train-0002.tar"
    with tarfile.open(torn) as archive:
        member = archive.getmember(f"{2 * SIZE + 3:06d}.jpg")
    torn.write_bytes(torn.read_bytes()[: member.offset_data + 512])
    return folder


BROKEN = {"train-0001.tar/000017", "train-0002.tar"}


@pytest.mark.parametrize("workers", ["0", "2"])
def test_training_goes_on_and_names_what_is_broken(main, shards, tmp_path, capsys, caplog, workers):  # noqa: F811
    more = ["--dataset", "wds/small", "--num-classes", "4", "--batch-size", "4", "--epochs", "2", "--workers", workers]
    more += ["--train-split", "train-{0000..0003}.tar|48", "--val-split", ""]
    assert main(words(shards, tmp_path / "run", *more)) == 0
    result = result_of(capsys.readouterr().out)
    assert set(result["broken"]) == BROKEN and result["n_broken"] == 2
    for name in BROKEN:  # once in two epochs
        assert caplog.text.count(f"picture {name} cannot be read") == 1
    assert "train-0001.tar/000017 cannot be read (OSError: " in caplog.text
    assert "train-0002.tar cannot be read (ReadError: unexpected end of data); training" in caplog.text


def streamed(folder: Path, split: str, transform=lambda image: image) -> Streamed:
    source = create_dataset("wds/small", root=str(folder), split=split, is_training=True, batch_size=4, seed=0)
    source.set_loader_cfg(num_workers=1)
    stream = Streamed(source, transform, 0)
    stream.start(0)
    return stream


def test_what_can_be_read_is_read(shards):
    """36 pictures of whole shards but one, and three in front of the tear."""
    source = streamed(shards, "train-{0000..0003}.tar|38")
    items = list(source)
    assert len(items) == 40  # whole batches
    found = [broken for _, _, several in items for broken in several]
    assert {broken.name for broken in found} == BROKEN
    assert len({image.tobytes() for image, _, _ in items}) == 38
    assert source.source.reader.ds is None  # the reader that was given is left alone


def test_names_lie_below_the_folder(shards, tmp_path):
    for folder, split in ((tmp_path, "shards/train-{0000..0003}.tar|38"), (f"{shards}/", "train-{0000..0003}.tar|38"),
                          (f"pipe:cat {shards}", "train-{0000..0003}.tar|38")):  # fmt: skip
        found = {broken.name for _, _, several in streamed(folder, split) for broken in several}
        assert found == {("shards/" if folder == tmp_path else "") + name for name in BROKEN}


def test_many_in_a_row_end_the_run_and_many_apart_do_not(tmp_path):
    count = 2 * IN_A_ROW
    write_shard(tmp_path / "apart.tar", 0, tuple(range(0, count, 2)), count)
    stream = streamed(tmp_path, f"apart.tar|{IN_A_ROW}")
    stream.source.reader.sample_initial_size = stream.source.reader.sample_shuffle_size = 1
    found = {broken.name for _, _, several in stream for broken in several}
    assert len(found) == IN_A_ROW
    write_shard(tmp_path / "row.tar", 1, tuple(range(IN_A_ROW)), IN_A_ROW)
    with pytest.raises(ValueError, match=rf"{IN_A_ROW} images or shards in a row.* row.tar/\d+ \(OSError: "):
        list(streamed(tmp_path, f"row.tar|{IN_A_ROW}"))
    for number in range(IN_A_ROW):
        (tmp_path / f"junk-{number:02d}.tar").write_bytes(b"\x01" * 2000)
    with pytest.raises(ValueError, match=rf"{IN_A_ROW} images or shards in a row.* junk-\d+.tar \(ReadError: "):
        list(streamed(tmp_path, f"junk-{{00..{IN_A_ROW - 1}}}.tar|8"))


def test_evaluation_refuses_or_leaves_out(shards):
    model = torch.nn.Linear(1, 1)
    config = data_config(model, [32])
    loader = PictureLoader(open_pictures(shards, "wds/small", "train-{0000..0003}.tar"), config)
    with pytest.raises(ValueError, match=r"image train-000\d.tar.* cannot be read \(.*--skip-broken"):
        list(loader)
    loader = PictureLoader(open_pictures(shards, "wds/small", "train-{0000..0003}.tar"), config, skip_broken=True)
    assert sum(len(target) for _, target in loader) == 38
    assert {broken.name for broken in loader.skipped} == BROKEN

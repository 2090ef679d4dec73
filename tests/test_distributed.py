"""Two gloo processes give the gradients of one."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import build, given, images
from torch.nn.parallel import DistributedDataParallel

import tokenzoo


def gradients(method, rank=None, port=None):
    model = build("deit")
    x = images(model, batch=4)
    tokenzoo.patch_model(model, given(method))
    if rank is None:
        model(x).square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        wrapped = DistributedDataParallel(model)
        wrapped(x[2 * rank : 2 * rank + 2]).square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    finally:
        dist.destroy_process_group()


def worker(rank, port, methods, folder):
    torch.set_num_threads(1)
    for i, method in enumerate(methods):
        torch.save(gradients(method, rank, port + i), f"{folder}/{method}_{rank}.pt")


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    try:
        for start in range(20_000, 60_000, 97):
            try:
                for i, one in enumerate(sockets):
                    one.bind(("127.0.0.1", start + i))
                return start
            except OSError:
                sockets = [socket.socket() for _ in range(count)]
    finally:
        for one in sockets:
            one.close()
    raise RuntimeError("no free ports on this machine")


@pytest.mark.slow
def test_gradients_of_two_processes(tmp_path):
    methods = ["tome", "evit", "mctf", "ats"]
    mp.spawn(worker, (free_ports(len(methods)), methods, str(tmp_path)), nprocs=2)
    for method in methods:
        expected = gradients(method)
        for rank in range(2):
            found = torch.load(tmp_path / f"{method}_{rank}.pt")
            assert found.keys() == expected.keys()
            for name, grad in expected.items():
                torch.testing.assert_close(found[name], grad, atol=1e-6, rtol=1e-4, msg=f"{method} {name}")

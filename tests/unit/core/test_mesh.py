"""One process: no-ops. Two processes: sums and order are right."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from plait.core import collectives, mesh
from plait.core.errors import ConfigError
from plait.core.launch import free_port

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_one_process_needs_no_distribution() -> None:
    value = torch.tensor([2.0, 3.0])
    with mesh.joined():
        assert not torch.distributed.is_initialized()
        assert (mesh.rank(), mesh.world()) == (0, 1)
        assert collectives.all_reduce_sum(value) is value
        assert value.tolist() == [2.0, 3.0]
        mesh.barrier()


def test_a_half_set_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="MASTER_ADDR, MASTER_PORT is not set"), mesh.joined():
        pass


def test_a_group_that_another_made_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ray Train's workers have one: each process would take itself for the only one."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match="not by Plait") as told, mesh.joined():
            pass
        assert "destroy_process_group" in told.value.remedy
    finally:
        torch.distributed.destroy_process_group()


WORKER = """
import json, torch
from plait.core import collectives, mesh
with mesh.joined():
    count = collectives.all_reduce_sum(torch.tensor([2**24 + mesh.rank()]))  # float32 could not hold the sum
    parts = torch.tensor([1.5, -2.0]) * (mesh.rank() + 1)
    collectives.all_reduce_sum(parts)
    mesh.barrier()
    with mesh.alone(), mesh.joined():
        assert mesh.world() == 1
    print(json.dumps([mesh.rank(), mesh.world(), count.item(), parts.tolist()]))
assert not mesh.active() and mesh.world() == 1
"""


def test_two_processes_sum() -> None:
    port = free_port()
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [worker.communicate(timeout=120) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [w.returncode for w in workers] == [0, 0], said
    results = [json.loads(out.splitlines()[-1]) for out, _ in said]
    assert results == [[rank, 2, 2**25 + 1, [4.5, -6.0]] for rank in range(2)]

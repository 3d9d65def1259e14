"""Two hosts: each a network namespace of its own, joined by a cable; torchrun on both, as on a cluster."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from benchmarks.layouts import BOUNDS, Way, apart, weights

VICTIM = Path(__file__).with_name("host_victim.py")
PORT = 29411


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Names of two namespaces, 10.77.0.1 and 10.77.0.2; both are taken away afterwards."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    names = [f"plait-{os.getpid()}-{number}" for number in (1, 2)]
    cables = [f"p{os.getpid() % 100_000}-{number}" for number in (1, 2)]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        for number, (name, cable) in enumerate(zip(names, cables, strict=True), 1):
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", cable)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", cable, "up")
        yield [f"{name} {cable}" for name, cable in zip(names, cables, strict=True)]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True, timeout=30)


def start(host: str, number: int, words: list[str]) -> subprocess.Popen[str]:
    """An agent of torchrun on a host; the first one holds the rendezvous."""
    name, cable = host.split()
    own = {"GLOO_SOCKET_IFNAME": cable, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    where = [f"--rdzv-endpoint=10.77.0.1:{PORT}", "--rdzv-backend=c10d", "--rdzv-id=hosts"]
    where += [f"--rdzv-conf=is_host={str(number == 1).lower()}", f"--local-addr=10.77.0.{number}"]
    return subprocess.Popen(
        ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes=2",
         "--nproc-per-node=1", "--max-restarts=2", *where, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | own | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip


@pytest.mark.row("S2-31")
@pytest.mark.parametrize("zero", [0, 3])
def test_two_hosts_of_which_one_loses_its_process_end_where_one_process_does(
    tmp_path: Path, hosts: list[str], zero: int
) -> None:
    agents = [start(host, number, [str(VICTIM), str(tmp_path), str(zero)]) for number, host in enumerate(hosts, 1)]
    try:
        said = [agent.communicate(timeout=240)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], said
    text = "".join(said)
    assert "resumed at step 3 of 5" in text, said
    alone = subprocess.run(
        [sys.executable, str(VICTIM), str(tmp_path / "alone"), "0"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert alone.returncode == 0, alone.stderr
    found, expected = (
        torch.load(path, weights_only=True) for path in (tmp_path / "weights-2.pt", tmp_path / "alone" / "weights-1.pt")
    )
    assert apart(found, expected, weights(Way(name="hosts", whole=True).model())) <= BOUNDS["float64"]

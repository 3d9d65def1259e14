"""Vector quantization against brute force, closed forms, and itself in parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from plait.core.errors import ConfigError, DataError
from plait.core.launch import free_port
from plait.models.codebook import VectorQuantizer


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 30), st.booleans(), st.integers(0, 5))
def test_the_nearest_code_is_that_of_brute_force(codes: int, d: int, n: int, normalize: bool, seed: int):
    torch.manual_seed(seed)
    quantizer = VectorQuantizer(codes, d, normalize=normalize).double()
    vectors = torch.randn(n, d, dtype=torch.float64) * 3
    found = quantizer(vectors)
    a, b = (functional.normalize(x, dim=-1) if normalize else x for x in (vectors, quantizer.codes.detach()))
    distance = (a[:, None] - b[None]).square().sum(-1)
    torch.testing.assert_close(distance.gather(1, found.ids[:, None])[:, 0], distance.amin(1), atol=1e-12, rtol=1e-12)
    assert torch.equal(found.values, b[found.ids])
    torch.testing.assert_close(found.commitment, distance.amin(1).sum(), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(found.codebook, found.commitment, atol=1e-10, rtol=1e-10)


def test_gradients_in_closed_form():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(3, 2).double()
    vectors = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    found = quantizer(vectors)
    pull = torch.randn_like(vectors)
    straight = torch.autograd.grad(
        (found.values * pull).sum(), [vectors, quantizer.codes], allow_unused=True, retain_graph=True
    )
    assert torch.equal(straight[0], pull)  # straight through: as if nothing had happened
    assert straight[1] is None
    gap = vectors.detach() - quantizer.codes.detach()[found.ids]
    to_vectors = torch.autograd.grad(found.commitment, [vectors, quantizer.codes], allow_unused=True, retain_graph=True)
    torch.testing.assert_close(to_vectors[0], 2 * gap)
    assert to_vectors[1] is None
    to_codes = torch.autograd.grad(found.codebook, [vectors, quantizer.codes], allow_unused=True)
    assert to_codes[0] is None
    torch.testing.assert_close(to_codes[1], torch.zeros(3, 2, dtype=torch.float64).index_add(0, found.ids, -2 * gap))


def test_codes_come_to_the_means_of_their_vectors_both_ways():
    torch.manual_seed(0)
    vectors = torch.tensor([[0.0, 0.0], [0.0, 2.0], [10.0, 0.0], [12.0, 0.0], [11.0, 3.0]], dtype=torch.float64)
    wanted = [[0.0, 1.0], [11.0, 1.0]]
    start = torch.tensor([[1.0, 1.0], [9.0, 1.0]], dtype=torch.float64)
    learned, moved = VectorQuantizer(2, 2).double(), VectorQuantizer(2, 2, decay=0.5).double()
    for quantizer in (learned, moved):
        quantizer.codes.data.copy_(start)
    moved.total.copy_(start)
    for _ in range(60):
        (gradient,) = torch.autograd.grad(learned(vectors).codebook, [learned.codes])
        learned.codes.data -= 0.1 * gradient
        moved(vectors)
        moved.update()
    torch.testing.assert_close(learned.codes.detach(), torch.tensor(wanted, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(moved.codes.detach(), torch.tensor(wanted, dtype=torch.float64), atol=1e-6, rtol=0)


def test_one_moving_average_by_hand_and_in_parts():
    vectors = torch.tensor([[1.0], [3.0], [9.0]])
    whole, parts = (VectorQuantizer(3, 1, decay=0.75) for _ in range(2))
    for quantizer in (whole, parts):
        quantizer.codes.copy_(torch.tensor([[2.0], [10.0], [50.0]]))
        quantizer.total.copy_(quantizer.codes)
    whole(vectors)
    assert whole.update() == 0
    # Use 0.75 x 1 + 0.25 x 2 and sum 0.75 x 2 + 0.25 x (1 + 3): (1.5 + 1) / 1.25; then (7.5 + 2.25) / 1; nobody.
    torch.testing.assert_close(
        whole.codes, torch.nn.Parameter(torch.tensor([[2.0], [9.75], [50.0]]), requires_grad=False)
    )
    for part in vectors.split(1):
        parts(part)
    parts.update()
    torch.testing.assert_close(parts.codes, whole.codes)
    before = whole.codes.clone()
    assert whole.update() == 0  # nothing was coded since
    whole.eval()
    whole(vectors)
    whole.update()
    assert torch.equal(whole.codes, before)  # nothing is learned while evaluating
    assert not whole.codes.requires_grad
    assert whole(vectors).codebook.item() == 0


def test_codes_nobody_uses_start_anew_at_vectors_of_the_last_step():
    quantizer = VectorQuantizer(4, 2, decay=0.5, restart=0.2)
    quantizer.codes[2:] = 100.0
    quantizer.total.copy_(quantizer.codes)
    vectors = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    again = []
    for step in range(4):
        quantizer(vectors)
        again.append(quantizer.update(generator=torch.Generator().manual_seed(step)))
        if again[-1]:  # they count as used, or would start anew until somebody chose them
            assert int((quantizer.usage == 1.0).sum()) == again[-1]
    assert again[:3] == [0, 0, 2]  # use 0.5, 0.25, 0.125
    assert quantizer.codes.abs().max() < 10
    assert len(quantizer(vectors).ids.unique()) == 4


WORKER = """
import json, torch
from plait.core import mesh
from plait.models.codebook import VectorQuantizer
torch.manual_seed(0)
quantizer = VectorQuantizer(4, 2, decay=0.5, restart=0.2)
quantizer.codes[3:] = 100.0
quantizer.total.copy_(quantizer.codes)
vectors = torch.randn(20, 2)
with mesh.joined():
    again = 0
    for step in range(3):
        quantizer(vectors[mesh.rank() :: mesh.world()])
        again += quantizer.update(generator=torch.Generator().manual_seed(step))
        if step == 1:
            early = quantizer.codes.tolist()
    if mesh.rank() == mesh.world() - 1:  # a rank without pictures in a step keeps nobody waiting
        quantizer(vectors)
    quantizer.update()
print(json.dumps([again, early, quantizer.codes.tolist()]))
"""


def test_two_processes_move_the_codes_as_one_does():
    def run(world: int) -> list[list]:
        port = str(free_port())
        own = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        workers = [
            subprocess.Popen([sys.executable, "-c", WORKER], env={**os.environ, **own, "RANK": str(rank)},
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for rank in range(world)
        ]  # fmt: skip
        try:
            said = [worker.communicate(timeout=120) for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
        assert [worker.returncode for worker in workers] == [0] * world, said
        return [json.loads(out.splitlines()[-1]) for out, _ in said]

    (one,), two = run(1), run(2)
    assert two[0] == two[1]  # also where a code started anew: at a vector of the first process
    assert one[0] == two[0][0] == 1
    torch.testing.assert_close(torch.tensor(two[0][1]), torch.tensor(one[1]))


def test_wrong_settings_and_vectors_are_refused():
    with pytest.raises(ConfigError, match="decay is 1"):
        VectorQuantizer(2, 2, decay=1.0)
    with pytest.raises(ConfigError, match=r"restart 0\.5"):
        VectorQuantizer(2, 2, restart=0.5)
    with pytest.raises(ConfigError, match="learned by gradients"):
        VectorQuantizer(2, 2).update()
    with pytest.raises(DataError, match="not finite"):
        VectorQuantizer(2, 2)(torch.tensor([[0.0, float("nan")]]))


def test_codes_that_are_averages_are_state_of_a_checkpoint():
    from plait.training.state import TrainState

    averaged = TrainState(VectorQuantizer(3, 2, decay=0.9).train())
    assert set(averaged.tensors()) == {"codes", "usage", "total"}  # all of them move, so a resumed run needs them all
    assert set(TrainState(VectorQuantizer(3, 2).train()).tensors()) == {"codes"}
    assert VectorQuantizer(3, 2, decay=0.9).state_dict().keys() >= {"codes"}

"""What stages say that each of several processes needs; and that what follows tune is planned with its decoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from plait.core.errors import ConfigError
from plait.core.estimate import Estimate, Machine
from plait.stages.align import Align
from plait.stages.compress import Compress
from plait.stages.evaluate import Evaluate
from plait.stages.pretrain import Pretrain
from plait.stages.tune import Tune

GIB = 2**30
ONE = Machine(cores=2, memory_bytes=8 * GIB, disk_bytes=50 * GIB, gemm_fp32=2.8e11, gemm_bf16=1.3e12, measured=True)
TWO = replace(ONE, processes=2)
DATA = Estimate(stage="data", samples={"train": 1127, "test-concept": 200, "test-style": 200, "test-both": 200})
BEFORE = {"data": DATA}
NEW = {"kind": "new", "model_type": "llama", "d": 512, "depth": 12, "heads": 8, "d_ff": 2048}
WHOLE = {"decoder": NEW, "connector": {"kind": "mlp"}, "batch_size": 32}


def tune(**parallel: Any) -> Tune:
    return Tune.model_validate({**WHOLE, "trainer": {"micro_batch": 8, "parallel": parallel}})


def training(found: Estimate, rank: int) -> int:
    return next(share for share in found.shares if rank in share.ranks).moments["decoder"]


def test_data_parallel_needs_a_replica_in_each_process_and_the_others_a_part() -> None:
    alone = tune().estimate(ONE, BEFORE)
    assert alone.shares == ()
    found = {name: tune(**settings).estimate(TWO, BEFORE) for name, settings in {
        "dp": {}, "zero": {"zero": 3}, "tp": {"tensor": 2}, "pp": {"pipeline": 2}
    }.items()}  # fmt: skip
    copies = [found["dp"].shares[0].memory[part] for part in ("weights", "gradients", "optimizer")]
    assert copies == [alone.memory[part] for part in ("weights", "gradients", "optimizer")]
    for name in ("zero", "tp", "pp"):
        for rank in (0, 1):
            assert training(found[name], rank) < training(found["dp"], rank), name
    # A tied table is in the first stage and in the last; what is divided adds up to the whole besides.
    optimizer = {name: [share.memory["optimizer"] for share in one.shares] for name, one in found.items()}
    assert sum(optimizer["zero"]) == pytest.approx(alone.memory["optimizer"], rel=1e-6)
    assert sum(optimizer["pp"]) == pytest.approx(alone.memory["optimizer"] + 8 * 49_152 * 512, rel=1e-6)
    assert {name: set(one.shares[0].sent) for name, one in found.items()} == {
        "dp": {"data"}, "zero": {"data"}, "tp": {"tensor"}, "pp": {"pipeline"}
    }  # fmt: skip


def test_pieces_of_rows_take_less_memory_in_tune_and_align() -> None:
    plain, pieces = (tune(tensor=2, sequence=sequence).estimate(TWO, BEFORE) for sequence in (False, True))
    assert training(pieces, 0) < training(plain, 0)
    assert pieces.shares[0].sent["tensor"] > plain.shares[0].sent["tensor"]
    before = {**BEFORE, "tune": Tune().estimate(TWO, BEFORE)}
    plain, pieces = (
        Align.model_validate({"trainer": {"parallel": {"tensor": 2, "sequence": sequence}}}).estimate(TWO, before)
        for sequence in (False, True)
    )
    assert pieces.shares[0].moments["training"] < plain.shares[0].moments["training"]
    assert pieces.shares[0].sent["tensor"] > plain.shares[0].sent["tensor"]


def test_only_the_first_process_encodes() -> None:
    found = tune().estimate(TWO, BEFORE)
    first, other = (next(share for share in found.shares if rank in share.ranks) for rank in (0, 1))
    assert first.moments["before"] > other.moments["before"]
    assert first.moments["decoder"] == other.moments["decoder"]


def test_one_process_ignores_how_several_would_share() -> None:
    assert tune(zero=3).estimate(ONE, BEFORE).moments == tune().estimate(ONE, BEFORE).moments


@pytest.mark.parametrize(
    "settings", [{}, {"image_tower": {"kind": "vit", "size": 32, "patch": 8, "d": 64, "depth": 2, "heads": 2}}]
)
def test_heads_and_towers_learn_in_pieces(settings: dict[str, Any]) -> None:
    spread = Pretrain.model_validate({**settings, "trainer": {"parallel": {"zero": 3}}}).estimate(TWO, BEFORE)
    whole = Pretrain.model_validate(settings).estimate(TWO, BEFORE)
    alone = Pretrain.model_validate(settings).estimate(ONE, BEFORE)
    # The first process encodes, where a tower is frozen.
    assert [share.ranks for share in whole.shares] == ([(0, 1)] if settings else [(0,), (1,)])
    assert whole.shares[-1].moments["training"] < alone.moments["training"] + 30 * 2**20  # half the rows; a message
    assert [share.ranks for share in spread.shares] == [(0,), (1,)]
    for one in spread.shares:
        other = whole.shares[0]
        assert one.moments.keys() - other.moments.keys() == {"saved", "whole"}
        assert one.sent["data"] >= other.sent["data"] == 4 * whole.params_trainable


def test_align_divides_the_decoder_of_the_stage_before() -> None:
    before = {**BEFORE, "tune": Tune().estimate(TWO, BEFORE)}
    whole = Align().estimate(TWO, before)
    staged = Align.model_validate({"trainer": {"parallel": {"pipeline": 2}}}).estimate(TWO, before)
    assert [share.ranks for share in whole.shares] == [(0, 1)]
    assert [share.ranks for share in staged.shares] == [(0,), (1,)]
    for share in staged.shares:
        assert share.moments["training"] < whole.shares[0].moments["training"]


def test_a_q_former_is_refused_in_several_processes() -> None:
    stage = Pretrain.model_validate({"qformer": {"queries": 4, "d": 64, "depth": 2, "heads": 2}})
    assert stage.shares(1) == 1
    with pytest.raises(ConfigError, match="QueryTasks compares all rows of a batch with each other, but 2 processes"):
        stage.shares(2)


def test_what_follows_is_planned_with_the_decoder_that_was_tuned() -> None:
    before = {**BEFORE, "tune": tune().estimate(ONE, BEFORE)}
    weights = before["tune"].params_trainable - before["tune"].connectors
    evaluate, compress = Evaluate().estimate(ONE, before), Compress().estimate(ONE, before)
    assert compress.params_frozen == weights
    assert evaluate.params_frozen - weights == Evaluate().estimate(ONE, BEFORE).params_frozen - 134_515_008
    assert evaluate.memory["weights"] == 4 * evaluate.params_frozen  # it learned as a whole, in float32
    usual = {**BEFORE, "tune": Tune().estimate(ONE, BEFORE)}
    assert Compress().estimate(ONE, usual).params_frozen == 134_515_008
    assert Compress().estimate(ONE, usual).disk_bytes == pytest.approx(
        Compress().estimate(ONE, {}).disk_bytes, rel=0.01
    )


VIEWS = {"objective": {"kind": "nt-xent"}, "image_tower": {"kind": "resnet", "size": 48, "width": 24}}


@pytest.mark.parametrize(
    ("stage", "processes", "said"),
    [
        (Pretrain(), 1128, "1127 training pictures for 1128 processes"),
        (Pretrain.model_validate(VIEWS), 1128, "1127 training pictures for 1128 processes"),
        (Tune.model_validate({"words": {"share": 0.5}}), 565, "564 named pictures in the first phase for 565"),
    ],
)
def test_a_plan_refuses_fewer_pictures_than_processes(stage: Any, processes: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        stage.estimate(replace(ONE, processes=processes), BEFORE)
    stage.estimate(replace(ONE, processes=processes - 1), BEFORE)

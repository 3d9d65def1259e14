"""Streams: means over what counts, errors that name both sides."""

import pytest
import torch
from torch import nn

from plait.core.errors import ConfigError, DataError
from plait.core.tensors import Patches
from plait.models.fusion.attention import AttentionFusion
from plait.models.fusion.bilinear import BilinearFusion
from plait.models.fusion.concat import ConcatFusion
from plait.models.fusion.early import EarlyFusion
from plait.models.fusion.graph import GraphAttention, GraphFusion
from plait.models.fusion.streams import Fused, Stream, only, presence, stream_of, take, vector
from plait.models.transformer import Transformer, TransformerSizes


def test_mean_is_over_what_counts() -> None:
    tokens = torch.tensor([[[1.0], [3.0], [torch.nan]], [[torch.nan]] * 3, [[7.0]] * 3])
    real = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
    stream = Stream(tokens=tokens, real=real, present=torch.tensor([True, False, True]))
    assert stream.mean().tolist() == [[2.0], [0.0], [0.0]]
    assert stream.here.tolist() == [True, False, False]  # present, but of padding alone: absent
    assert stream.clean().tokens.isfinite().all()
    assert Stream(tokens=torch.ones(2, 0, 3)).mean().tolist() == [[0.0] * 3] * 2


def test_a_towers_ragged_items_become_a_stream() -> None:
    media = Patches(values=torch.arange(3.0)[:, None], grid=torch.tensor([[1, 1, 1], [1, 1, 2]]))
    assert stream_of(media).mean().tolist() == [[0.0], [1.5]]


def test_fused_tokens_go_on_as_a_stream() -> None:
    fused = Fused(
        values=torch.tensor([[[1.0], [9.0]]]), present=torch.tensor([True]), real=torch.tensor([[True, False]])
    )
    assert fused.vector().tolist() == fused.stream().mean().tolist() == [[1.0]]
    assert Fused(values=torch.ones(1, 2), present=torch.tensor([False])).stream().here.tolist() == [False]


def test_only_some_modalities() -> None:
    inputs = {"image": vector(torch.ones(2, 3)), "text": vector(torch.ones(2, 4), torch.tensor([True, False]))}
    assert presence(only(inputs, ["text"]), ["image", "text"]).tolist() == [[False, True], [False, False]]
    with pytest.raises(DataError, match="no modality smell; there are image, text"):
        only(inputs, ["smell"])


def test_what_does_not_fit_is_named() -> None:
    image, text = vector(torch.ones(2, 3)), vector(torch.ones(2, 4))
    with pytest.raises(DataError, match=r"built for image, text; came image \| at no text"):
        take({"image": image}, ("image", "text"))
    with pytest.raises(DataError, match="at unknown audio"):
        take({"image": image, "audio": text}, ("image",))
    with pytest.raises(DataError, match="image 2, text 3"):
        take({"image": image, "text": vector(torch.ones(3, 4))}, ("image", "text"))
    with pytest.raises(DataError, match="image has tokens of width 3, this fusion was built for 5"):
        AttentionFusion({"image": 5}, 8)({"image": image})
    with pytest.raises(DataError, match=r"image has 1 tokens of width 3, which is 3 numbers; .* built for 6"):
        ConcatFusion({"image": 6})({"image": image})
    with pytest.raises(ConfigError, match="full bilinear pooling takes 2 modalities, came 3"):
        BilinearFusion({"a": 1, "b": 1, "c": 1}, 1)
    joint = Transformer(TransformerSizes(d=8, depth=1, heads=2))
    with pytest.raises(ConfigError, match="image is projected to width 6, the joint Transformer has 8"):
        EarlyFusion({"image": torch.nn.Linear(3, 6)}, joint)({"image": image})
    with pytest.raises(ConfigError, match="sees names smell; there are image"):
        EarlyFusion({"image": torch.nn.Linear(3, 8)}, joint, sees={"image": ["smell"]})


def test_projections_may_be_more_than_one_linear_layer() -> None:
    deep = {"image": nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 16)), "text": nn.Linear(4, 16)}
    given = {"image": Stream(tokens=torch.rand(2, 9, 6)), "text": Stream(tokens=torch.rand(2, 5, 4))}
    early = EarlyFusion(deep, Transformer(TransformerSizes(d=16, depth=1, heads=2)))
    for fuse in (early, GraphFusion(deep, [GraphAttention(16, 16, heads=2)])):
        assert fuse(given).values.shape == (2, 14, 16)
        with pytest.raises(DataError, match="text has tokens of width 6, this fusion was built for 4"):
            fuse({"image": given["image"], "text": given["image"]})

"""Connectors: shapes by the token account, order of cells, gradients to every weight."""

import pytest
import torch

from plait.core.protocols import Encoder
from plait.core.tensors import Patches
from plait.models.connectors.projection import Chain, Mlp, PixelShuffle, Split
from plait.models.connectors.words import ToWords, WordReader, shape_of


def media(*grids: tuple[int, int, int], d: int = 2) -> Patches:
    rows = sum(f * r * c for f, r, c in grids)
    return Patches(values=torch.arange(rows * d, dtype=torch.float32).view(rows, d), grid=torch.tensor(grids))


def test_pixel_shuffle_joins_neighbors_in_raster_order() -> None:
    out = PixelShuffle(2, 2)(media((1, 4, 4)))
    assert out.grid.tolist() == [[1, 2, 2]]
    # Cell (r, c) holds 2*(4r+c), 2*(4r+c)+1; the second joined cell covers columns 2..3 of rows 0..1.
    assert out.values[1].tolist() == [4, 5, 6, 7, 12, 13, 14, 15]


def test_pixel_shuffle_equals_torch_pixel_unshuffle() -> None:
    values = torch.randn(36, 5)
    ours = PixelShuffle(5, 3)(Patches(values=values, grid=torch.tensor([[1, 6, 6]])))
    theirs = torch.nn.functional.pixel_unshuffle(values.T.reshape(1, 5, 6, 6), 3)[0]  # channel-major: 5, then 3 x 3
    expected = theirs.view(5, 9, 4).permute(2, 1, 0).reshape(4, 45)
    assert torch.equal(ours.values, expected)


def test_grids_that_do_not_divide_are_padded_with_zeros_not_cut() -> None:
    out = PixelShuffle(2, 2)(media((1, 3, 5)))
    assert out.grid.tolist() == [[1, 2, 3]]
    assert float(out.values.sum()) == float(media((1, 3, 5)).values.sum())


@pytest.mark.parametrize("grids", [((1, 4, 4),), ((1, 2, 3), (2, 4, 1), (1, 1, 1))])
@pytest.mark.row("S2-07")
def test_every_connector_keeps_the_token_account(grids: tuple[tuple[int, int, int], ...]) -> None:
    chain = Chain(PixelShuffle(2, 2), Mlp(8, 16, 4))
    reader = Chain(
        PixelShuffle(2, 2), Mlp(8, 16, 12), Split(12, 3), ToWords(torch.randn(5, 4), torch.eye(4), count=3, free=1)
    )
    for connector in (PixelShuffle(2, 2), Mlp(2, 16, 4), Split(2, 2), chain, reader):
        assert isinstance(connector, Encoder)
        given = media(*grids)
        out = connector(given)
        assert torch.equal(out.grid, connector.grid_out(given.grid))
        assert out.values.shape == (int(out.grid.prod(1).sum()), connector.d_out)


def test_every_weight_gets_a_gradient() -> None:
    chain = Chain(PixelShuffle(2, 2), Mlp(8, 16, 4))
    chain(media((1, 4, 4))).values.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in chain.parameters())


# --- tokens in the space of words ----------------------------------------------------------------------------------

WORDS, WIDTH, COUNT, FREE = 6, 10, 4, 1


def to_words() -> ToWords:
    """More dimensions than words, so that the mixture's weights can be solved for; words far from the origin."""
    words = torch.randn(WORDS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 3
    table = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    shape = shape_of(table * torch.arange(1, WIDTH + 1)).double()
    return ToWords(words, shape, count=COUNT, free=FREE).double()


def tokens(groups: int = 5) -> Patches:
    values = torch.randn(groups * COUNT, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return Patches(values=values, grid=torch.tensor([[1, 1, groups * COUNT]]))


def test_split_is_the_inverse_of_joining() -> None:
    narrow = torch.randn(12, 5)
    joined = Patches(values=narrow.view(4, 15), grid=torch.tensor([[1, 1, 2], [1, 2, 1]]))
    out = Split(15, 3)(joined)
    assert torch.equal(out.values, narrow)
    assert out.grid.tolist() == [[1, 1, 6], [1, 2, 3]]
    assert torch.equal(torch.cat([out.values[i::3] for i in range(3)], dim=1), joined.values)


def test_mixed_tokens_are_softmax_mixtures_of_the_words() -> None:
    onto, given = to_words(), tokens()
    mixed = onto(given).values.view(-1, COUNT, WIDTH)[:, : COUNT - FREE].detach()
    # mixed = weights @ words has one solution, as the words are linearly independent.
    weights = torch.linalg.lstsq(onto.words.T, mixed.reshape(-1, WIDTH).T).solution.T
    torch.testing.assert_close(weights @ onto.words, mixed.reshape(-1, WIDTH), rtol=1e-9, atol=1e-9)
    assert bool((weights > 0).all())
    torch.testing.assert_close(weights.sum(1), torch.ones(len(weights), dtype=torch.float64), rtol=1e-9, atol=0)
    center = onto.words.mean(0)
    inputs = given.values.view(-1, COUNT, WIDTH)[:, : COUNT - FREE].reshape(-1, WIDTH)
    cosine = torch.nn.functional.cosine_similarity(inputs[:, None], (onto.words - center)[None], dim=-1)
    torch.testing.assert_close(weights, (12.0 * cosine).softmax(-1), rtol=1e-9, atol=1e-12)


def test_free_tokens_are_shaped_and_at_the_distance_of_words() -> None:
    onto, given = to_words(), tokens()
    center = onto.words.mean(0)
    away = onto(given).values.view(-1, COUNT, WIDTH)[:, COUNT - FREE :].detach() - center
    torch.testing.assert_close(away.norm(dim=-1), onto.length.detach().expand(5, FREE), rtol=1e-12, atol=0)
    torch.testing.assert_close(onto.length.detach(), (onto.words - center).norm(dim=1).mean(), rtol=1e-12, atol=0)
    shaped = given.values.view(-1, COUNT, WIDTH)[:, COUNT - FREE :] @ onto.shape
    cosine = torch.nn.functional.cosine_similarity(away, shaped, dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=1e-12, atol=0)


def test_whitened_directions_land_on_the_embeddings_they_are_of() -> None:
    onto = to_words()
    found = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    landed = onto.whitened(found) @ onto.shape
    cosine = torch.nn.functional.cosine_similarity(landed, found - onto.center, dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=1e-9, atol=0)
    torch.testing.assert_close(onto.whitened(found).norm(dim=-1), torch.ones(8, dtype=torch.float64))


def test_whitened_embeddings_vary_alike_in_all_directions() -> None:
    """Without a floor the covariance of ``table @ shape^-1`` is the identity times the squared mean deviation."""
    table = torch.randn(500, 6, generator=torch.Generator().manual_seed(7)) @ torch.diag(torch.arange(1.0, 7.0))
    deviations = torch.linalg.eigvalsh(torch.cov(table.T)).sqrt()
    white = table @ torch.linalg.inv(shape_of(table, floor=0.0))
    torch.testing.assert_close(torch.cov(white.T), torch.eye(6) * deviations.mean() ** 2, rtol=1e-3, atol=1e-3)


def test_scale_and_length_are_learned_and_words_are_kept_but_not_learned() -> None:
    onto = to_words()
    onto(tokens()).values.square().sum().backward()
    assert {name for name, _ in onto.named_parameters()} == {"scale", "length"}
    assert all(p.grad is not None and float(p.grad.abs()) > 0 for p in onto.parameters())
    assert set(onto.state_dict()) == {"scale", "length", "words", "shape"}


def reader(names: int = 3) -> tuple[WordReader, Chain]:
    torch.manual_seed(3)
    onto = to_words().float()
    chain = Chain(PixelShuffle(2, 2), Mlp(8, 16, WIDTH * COUNT), Split(WIDTH * COUNT, COUNT), onto)
    return WordReader(chain, torch.randn(names, WIDTH, generator=torch.Generator().manual_seed(8))), chain


def test_a_reader_scores_words_as_the_connector_mixes_them() -> None:
    asked, chain = reader()
    given = media((1, 2, 2), (1, 2, 2), (1, 1, 2))  # one joined cell each
    words, names = asked(given)
    assert (words.shape, names.shape) == ((3, COUNT - FREE, WORDS), (3, 3))
    onto = chain.parts[-1]
    assert isinstance(onto, ToWords)
    groups = chain(given).values.view(3, COUNT, WIDTH)
    torch.testing.assert_close(words.softmax(-1) @ onto.words, groups[:, : COUNT - FREE], rtol=1e-5, atol=1e-5)
    # One free token a picture: back from where it landed, then compared with the names as they are before shaping.
    back = torch.linalg.solve(onto.shape.T, (groups[:, COUNT - FREE] - onto.center).T).T
    embeddings = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(8))
    white = torch.linalg.solve(onto.shape.T, (embeddings - onto.center).T).T
    expected = onto.scale * torch.nn.functional.cosine_similarity(back[:, None], white[None], dim=-1)
    torch.testing.assert_close(names, expected, rtol=1e-4, atol=1e-4)


def test_a_reader_takes_a_picture_of_several_cells_as_one() -> None:
    asked, _ = reader()
    values = torch.randn(4, 2, generator=torch.Generator().manual_seed(5))
    small = Patches(values=values, grid=torch.tensor([[1, 2, 2]]))
    # The same joined cell four times: the mean is that cell. A second picture of one cell beside it.
    square = torch.cat([values.view(1, 2, 1, 2, 2).expand(2, 2, 2, 2, 2).reshape(16, 2), values])
    both = Patches(values=square, grid=torch.tensor([[1, 4, 4], [1, 2, 2]]))
    for alone, beside in zip(asked(small), asked(both), strict=True):
        assert len(beside) == 2
        torch.testing.assert_close(beside[1:], alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(beside[:1], alone, rtol=1e-5, atol=1e-5)


def test_a_reader_takes_cached_features_of_16_bits_and_trains_the_connector_in_place() -> None:
    asked, chain = reader()
    given = media((1, 2, 2))
    words, names = asked(Patches(values=given.values.half(), grid=given.grid))
    (words.sum() + names.sum()).backward()
    assert words.dtype == torch.float32
    assert all(p.grad is not None for name, p in chain.named_parameters() if name != "parts.3.length")


def test_names_are_not_saved_with_a_reader() -> None:
    asked, chain = reader()
    assert set(asked.state_dict()) == {f"connector.{name}" for name in chain.state_dict()}
    assert "names" in dict(asked.named_buffers())

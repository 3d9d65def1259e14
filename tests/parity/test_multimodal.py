"""MultimodalLM against Hugging Face's LLaVA with the same weights, and packed rows against rows of their own."""

import dataclasses

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from plait.core.errors import DataError
from plait.core.tensors import IGNORE, Batch, Output, Patches
from plait.core.types import MediaRef
from plait.data.collate import collate
from plait.data.template import Rendered
from plait.models.connectors.projection import Mlp
from plait.models.multimodal import MultimodalLM
from plait.objectives.language import NextToken, next_token_loss, sequence_logprobs, token_logprobs

IMAGE = 95
SLOTS = 4


@pytest.fixture(scope="module")
def llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.2)
    return model.eval()


class FromLlava(nn.Module):
    """LLaVA's own projector behind our connector's face."""

    def __init__(self, projector: nn.Module, d_out: int) -> None:
        super().__init__()
        self.projector, self.d_out = projector, d_out

    def forward(self, media: Patches) -> Patches:
        return Patches(values=self.projector(media.values), grid=media.grid)


def compose(llava: LlavaForConditionalGeneration) -> MultimodalLM:
    decoder = nn.Module()
    decoder.base_model = llava.model.language_model
    decoder.lm_head = llava.lm_head
    decoder.get_input_embeddings = llava.get_input_embeddings  # pyright: ignore[reportArgumentType]
    connector = FromLlava(llava.model.multi_modal_projector, 32)
    return MultimodalLM({}, {"image": connector}, decoder, placeholder=IMAGE)


def features(llava: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """LLaVA's features of one picture: the last layer, class token left out."""
    with torch.no_grad():
        return llava.model.vision_tower(pixels[None], output_hidden_states=True).hidden_states[-1][0, 1:]


def conversation(seed: int, before: int, answer: int) -> tuple[Rendered, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, 90, (before + answer,), generator=generator).tolist()
    ids = (*words[:1], *[IMAGE] * SLOTS, *words[1:])
    trained = (*[False] * (len(ids) - answer), *[True] * answer)
    ref = MediaRef(modality="image", sha256=str(seed), uri="")
    pixels = torch.randn(3, 16, 16, generator=generator)
    return Rendered(token_ids=ids, trained=trained, media=(ref,), slots=(SLOTS,)), pixels


def batch_of(llava: LlavaForConditionalGeneration, seeds: dict[int, tuple[int, int]], *, row: int) -> Batch:
    samples, cache = [], {}
    for seed, (before, answer) in seeds.items():
        rendered, pixels = conversation(seed, before, answer)
        samples.append((f"s{seed}", rendered))
        cache[str(seed)] = Patches(values=features(llava, pixels), grid=torch.tensor([[1, 2, 2]]))
    return collate(samples, cache, grid_out=lambda grid: grid, encoded=True, row=row, pad=0)


@pytest.mark.row("S4-44", "S2-07")
def test_logits_and_gradients_equal_llava(llava: LlavaForConditionalGeneration) -> None:
    rendered, pixels = conversation(1, 6, 4)
    ids = torch.tensor([rendered.token_ids])
    labels = torch.where(torch.tensor([rendered.trained]), ids, IGNORE)
    out = llava(input_ids=ids, pixel_values=pixels[None], labels=labels, attention_mask=torch.ones_like(ids))
    weight = llava.model.multi_modal_projector.linear_1.weight
    (theirs,) = torch.autograd.grad(out.loss, weight)

    ours = compose(llava)
    batch = batch_of(llava, {1: (6, 4)}, row=len(rendered))
    objective = NextToken()
    loss = objective(ours, batch)["next_token"] / objective.count(batch)["next_token"]
    (mine,) = torch.autograd.grad(loss, weight)
    wanted = out.logits[0, -5:-1]
    # Worst seen over 20 seeds: 4e-7 on logits, 2e-6 on gradients (relative).
    torch.testing.assert_close(ours(batch).logits, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, out.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_the_fused_head_gives_loss_and_gradients_of_all_scores(llava: LlavaForConditionalGeneration) -> None:
    ours, objective = compose(llava), NextToken()
    batch = batch_of(llava, {1: (6, 3), 2: (3, 2), 3: (4, 5)}, row=20)
    weights = [w for w in ours.parameters() if w.requires_grad]
    found: list[list[torch.Tensor]] = []
    for fused in (True, False):
        ours.fused = fused
        assert (ours(batch).logprobs is not None) is fused
        loss = objective(ours, batch)["next_token"]
        found.append([loss, *torch.autograd.grad(loss, weights)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("row", [13, 20, 29, 64])
def test_packed_rows_give_the_loss_of_rows_of_their_own(llava: LlavaForConditionalGeneration, row: int) -> None:
    ours, objective = compose(llava), NextToken()
    seeds = {1: (6, 3), 2: (3, 2), 3: (4, 5), 4: (1, 1), 5: (5, 4)}
    alone = sum(
        float(objective(ours, batch_of(llava, {s: size}, row=13))["next_token"].detach()) for s, size in seeds.items()
    )
    packed = batch_of(llava, seeds, row=row)
    assert int(objective.count(packed)["next_token"]) == sum(answer for _, answer in seeds.values())
    torch.testing.assert_close(float(objective(ours, packed)["next_token"].detach()), alone, rtol=1e-6, atol=1e-5)


def swapped(batch: Batch, sizes: tuple[int, ...], rows: tuple[int, ...]) -> Batch:
    """The same placeholders, other media: items of these sizes, said to belong to these rows."""
    values = torch.randn(sum(sizes), 24)
    media = Patches(values=values, grid=torch.tensor([[1, 1, size] for size in sizes]))
    return dataclasses.replace(batch, media={"image": media}, item_row={"image": torch.tensor(rows)})


@pytest.mark.parametrize(
    ("row", "sizes", "rows", "cause", "place"),
    [
        pytest.param(11, (3, 4), (0, 1), "row 0 has 4 placeholders, 3 media tokens", "row 0, sample s1", id="too few"),
        pytest.param(11, (4, 5), (0, 1), "row 1 has 4 placeholders, 5 media tokens", "row 1, sample s2", id="too many"),
        pytest.param(11, (5, 3), (0, 1), "row 0 has 4 placeholders, 5 media tokens", "row 0, sample s1", id="sum fits"),
        pytest.param(11, (8,), (0,), "row 0 has 4 placeholders, 8 media tokens", "row 0, sample s1", id="one lacks"),
        pytest.param(11, (4, 4), (1, 0), "not in the order of", "samples s1, s2", id="rows swapped"),
        pytest.param(11, (4, 4), (0,), "2 media items of 8 tokens by their grids; 1 ", "samples s1, s2", id="no row"),
        pytest.param(22, (5, 3), (0, 0), "media item 0 has 5 tokens, only 4", "row 0, sample s1", id="neighbor"),
        pytest.param(22, (2, 1, 5), (0, 0, 0), "media item 2 has 5 tokens, only 1", "row 0, sample s1", id="third"),
    ],
)
def test_no_sample_reads_the_picture_of_another(
    llava: LlavaForConditionalGeneration,
    row: int,
    sizes: tuple[int, ...],
    rows: tuple[int, ...],
    cause: str,
    place: str,
) -> None:
    batch = batch_of(llava, {1: (6, 1), 2: (5, 2)}, row=row)
    with pytest.raises(DataError, match=cause) as caught:
        compose(llava)(swapped(batch, sizes, rows))
    assert caught.value.place == place


def test_several_pictures_of_a_sample_are_accepted(llava: LlavaForConditionalGeneration) -> None:
    batch = batch_of(llava, {1: (6, 1), 2: (5, 2)}, row=22)
    whole = swapped(batch, (4, 4), (0, 0))
    parts = dataclasses.replace(
        whole,
        media={
            "image": Patches(values=whole.media["image"].values, grid=torch.tensor([[1, 1, 1], [1, 3, 1], [1, 2, 2]]))
        },
        item_row={"image": torch.tensor([0, 0, 0])},
    )
    assert torch.equal(compose(llava)(whole).hidden, compose(llava)(parts).hidden)


def test_a_grid_that_lies_about_the_tokens_is_refused(llava: LlavaForConditionalGeneration) -> None:
    batch = batch_of(llava, {1: (6, 4)}, row=16)
    lie = Patches(values=batch.media["image"].values[:3], grid=torch.tensor([[1, 2, 2]]))
    with pytest.raises(DataError, match="4 tokens by their grids; 1 items have a row, 3 tokens came"):
        compose(llava)(dataclasses.replace(batch, media={"image": lie}))


def test_placeholders_without_media_are_refused(llava: LlavaForConditionalGeneration) -> None:
    batch = batch_of(llava, {1: (6, 4)}, row=16)
    with pytest.raises(DataError, match="row 0 has 4 placeholders, 0 media tokens"):
        compose(llava)(dataclasses.replace(batch, media={}, item_row={}))


def test_media_without_a_connector_are_refused(llava: LlavaForConditionalGeneration) -> None:
    batch = batch_of(llava, {1: (6, 4)}, row=16)
    both = {"image": batch.media["image"], "audio": batch.media["image"]}
    with pytest.raises(DataError, match=r"the batch has audio, this model reads image"):
        compose(llava)(dataclasses.replace(batch, media=both))


def test_text_without_pictures_passes(llava: LlavaForConditionalGeneration) -> None:
    text = Rendered(token_ids=(5, 6, 7), trained=(False, True, True))
    batch = collate([("t", text)], {}, grid_out=lambda grid: grid, encoded=True, row=4, pad=0)
    hidden = compose(llava)(batch).hidden
    theirs = llava.model.language_model(input_ids=torch.tensor([[5, 6, 7]])).last_hidden_state
    torch.testing.assert_close(hidden[:, :3], theirs, rtol=1e-5, atol=1e-5)


def test_closed_forms() -> None:
    flat = torch.zeros(2, 4)
    targets = torch.tensor([0, 3])
    assert float(next_token_loss(flat, targets)) == pytest.approx(2 * 1.3862943611)
    even = Output(hidden=torch.zeros(1, 3, 1), score=lambda: torch.zeros(3, 4))
    each = sequence_logprobs(token_logprobs(even, torch.tensor([1, 2, 3])), owner=torch.tensor([0, 0, 1]), count=2)
    assert each.tolist() == pytest.approx([-2 * 1.3862943611, -1.3862943611])


def test_the_mlp_connector_composes_with_any_decoder(llava: LlavaForConditionalGeneration) -> None:
    ours = compose(llava)
    ours.connectors["image"] = Mlp(24, 16, 32)
    logits = ours(batch_of(llava, {1: (6, 4)}, row=16)).logits
    assert logits.shape == (4, 96)

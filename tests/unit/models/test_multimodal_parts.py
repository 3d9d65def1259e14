"""A decoder with several modalities, spliced in or read inside."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import FalconConfig, FalconForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from plait.core.errors import ConfigError, DataError
from plait.core.tensors import IGNORE, Batch, Patches
from plait.models.connectors.projection import Linear, Unchanged
from plait.models.connectors.query import PerceiverResampler
from plait.models.crossattend import GatedCrossAttention
from plait.models.multimodal import MultimodalLM
from plait.models.transformer import TransformerSizes

IMAGE, AUDIO = 40, 41


def decoder() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()


def batch(rows: list[list[int]], **grids: list[list[int]]) -> Batch:
    """Rows of one sample each; features of 8 numbers a token, in the order of the rows."""
    ids = torch.tensor(rows)
    torch.manual_seed(1)
    media, item_row = {}, {}
    for (modality, listed), number in zip(grids.items(), (IMAGE, AUDIO), strict=False):
        grid = torch.tensor(listed)
        media[modality] = Patches(values=torch.randn(int(grid.prod(1).sum()), 8), grid=grid)
        starts = (ids == number) & (torch.roll(ids, 1, 1) != number)
        item_row[modality] = starts.nonzero()[:, 0]
    return Batch(
        token_ids=ids,
        labels=torch.full_like(ids, IGNORE),
        segment_ids=torch.ones_like(ids),
        media=media,
        item_row=item_row,
        sample_ids=tuple(f"s{i}" for i in range(len(rows))),
        encoded=True,
    )


def spliced() -> MultimodalLM:
    llama = decoder()
    torch.manual_seed(2)
    connectors = {"image": Linear(8, 16), "audio": PerceiverResampler(8, queries=2, depth=1, heads=2, d_out=16)}
    return MultimodalLM({}, connectors, llama, placeholder={"image": IMAGE, "audio": AUDIO}).eval()


def reading() -> MultimodalLM:
    llama = decoder()
    torch.manual_seed(2)
    layers = [GatedCrossAttention(TransformerSizes(d=16, depth=1, heads=2, d_source=8)), None]
    resampler = PerceiverResampler(8, queries=3, depth=1, heads=2)
    return MultimodalLM({}, {"image": resampler}, llama, placeholder=IMAGE, reading=layers, inside="image").eval()


@pytest.mark.row("S4-44")
@torch.inference_mode()
def test_pictures_and_sounds_stand_where_their_placeholders_are() -> None:
    model = spliced()
    found = batch([[5, IMAGE, IMAGE, 6, AUDIO, AUDIO, 7], [AUDIO, AUDIO, 5, 6, IMAGE, IMAGE, IMAGE]],
                  image=[[1, 1, 2], [1, 1, 3]], audio=[[1, 1, 9], [1, 1, 4]])  # fmt: skip
    embedded, _ = model.inputs(found)
    image = model.connectors["image"](found.media["image"]).values
    audio = model.connectors["audio"](found.media["audio"]).values
    assert torch.equal(embedded[0, 1:3], image[:2])
    assert torch.equal(embedded[1, 4:], image[2:])
    assert torch.equal(embedded[0, 4:6], audio[:2])
    assert torch.equal(embedded[1, :2], audio[2:])
    assert torch.equal(embedded[0, 3], model.decoder.get_input_embeddings().weight[6])
    assert model.slots("audio", found.media["audio"].grid).tolist() == [2, 2]
    assert model.slots("image", found.media["image"].grid).tolist() == [2, 3]


@pytest.mark.row("S4-44")
@torch.inference_mode()
def test_text_alone_is_the_plain_decoder() -> None:
    ids = torch.randint(0, 40, (2, 5))
    wanted = decoder().base_model(input_ids=ids).last_hidden_state
    for model in (spliced(), reading()):
        for read in model.modules():
            if isinstance(read, GatedCrossAttention):
                nn.init.ones_(read.gate)
                nn.init.ones_(read.feed_forward_gate)
        torch.testing.assert_close(model.hidden(batch(ids.tolist())), wanted)
    # Nor does it matter that another row has a picture.
    found = model.hidden(batch([ids[0].tolist(), [5, IMAGE, 6, 7, 8]], image=[[1, 1, 2]]))
    torch.testing.assert_close(found[0], wanted[0])


@pytest.mark.row("S2-11")
def test_what_is_read_inside_takes_one_place_and_changes_nothing_at_the_start() -> None:
    model = reading()
    found = batch([[5, IMAGE, 6, 7], [5, 6, IMAGE, 7]], image=[[1, 2, 3], [1, 1, 1]])
    assert model.slots("image", found.media["image"].grid).tolist() == [1, 1]
    embedded, view = model.inputs(found)
    assert view is not None
    assert view.mask.any(-1)[:, 0].tolist() == [[False, True, True, True], [False, False, True, True]]
    plain = decoder().base_model(inputs_embeds=embedded).last_hidden_state
    torch.testing.assert_close(model.hidden(found), plain)
    nn.init.ones_(model.decoder.base_model.layers[0].reads.gate)
    moved = model.hidden(found)
    torch.testing.assert_close(moved[1, :2], plain[1, :2])
    assert not torch.allclose(moved[1, 2:], plain[1, 2:])
    moved.square().sum().backward()
    assert model.connectors["image"].latents.grad is not None
    assert model.mark.grad is not None


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()


@pytest.mark.row("S2-11")
@pytest.mark.parametrize("make", [decoder, gpt2])
@torch.inference_mode()
def test_an_answer_token_by_token_is_what_the_whole_text_gives(make) -> None:
    torch.manual_seed(2)
    readers = [GatedCrossAttention(TransformerSizes(d=16, depth=1, heads=2, d_source=8)) for _ in range(2)]
    for read in readers:
        nn.init.ones_(read.gate)
        nn.init.ones_(read.feed_forward_gate)
    model = MultimodalLM(
        {}, {"image": Unchanged(8), "audio": Linear(8, 16)}, make(),
        placeholder={"image": IMAGE, "audio": AUDIO}, reading=readers, inside="image",
    ).eval()  # fmt: skip
    nn.init.normal_(model.mark)
    # Two pictures, a sound and padding in front; the second row sees one picture, the third none.
    prompts = [[IMAGE, 5, IMAGE, 6, 7], [0, 0, AUDIO, IMAGE, 8], [0, 3, 4, 5, 6]]
    segments = torch.tensor([[1] * 5, [0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
    media = {"image": [[1, 1, 2], [1, 2, 2], [1, 1, 3]], "audio": [[1, 1, 1]]}
    start = replace(batch(prompts, **media), segment_ids=segments)
    answers = torch.tensor([[9, 10, 11], [12, 13, 14], [15, 16, 17]])
    ids = torch.cat([start.token_ids, answers], 1)
    seen = torch.cat([segments, torch.ones_like(answers)], 1)
    whole = replace(start, token_ids=ids, labels=torch.full_like(ids, IGNORE), segment_ids=seen)
    wanted = model.hidden(whole)[:, 4:]
    state = model.prefill(start)
    found = [state.hidden]
    for column in answers.T:
        state = model.extend(state, column, last=31)
        found.append(state.hidden)
    torch.testing.assert_close(torch.stack(found, 1), wanted, atol=1e-5, rtol=1e-5)  # worst seen 5e-7


def test_parts_that_do_not_fit_are_refused() -> None:
    llama = decoder()
    line = {"image": Linear(8, 16)}
    with pytest.raises(ConfigError, match="share a placeholder"):
        MultimodalLM({}, {**line, "audio": Linear(8, 16)}, llama, placeholder=40)
    with pytest.raises(ConfigError, match=r"connectors \['image'\], placeholders \['audio'\]"):
        MultimodalLM({}, line, llama, placeholder={"audio": 40})
    with pytest.raises(ConfigError, match="are given, the modality they read is ''"):
        MultimodalLM({}, line, llama, placeholder=40, reading=[None, None])
    with pytest.raises(ConfigError, match="connector gives tokens of width 64, what reads them takes 16"):
        MultimodalLM({}, {"image": Linear(8, 64)}, llama, placeholder=40)
    tower = nn.Identity()
    tower.d_out = 12
    with pytest.raises(ConfigError, match="tower gives tokens of width 12, its connector takes 8"):
        MultimodalLM({"image": tower}, line, llama, placeholder=40)
    wide = [GatedCrossAttention(TransformerSizes(d=16, depth=1, heads=2, d_source=12)), None]
    with pytest.raises(ConfigError, match="width 16, what reads them takes 12"):
        MultimodalLM({}, line, llama, placeholder=40, reading=wide, inside="image")
    other = [GatedCrossAttention(TransformerSizes(d=32, depth=1, heads=2, d_source=16)), None]
    with pytest.raises(ConfigError, match="decoder of another width than 16"):
        MultimodalLM({}, line, llama, placeholder=40, reading=other, inside="image")
    sound = batch([[5, 6]])
    with pytest.raises(DataError, match="the batch has audio, this model reads image"):
        reading()(replace(sound, media={"audio": Patches(values=torch.zeros(0, 8), grid=torch.zeros(0, 3).long())}))
    with pytest.raises(DataError, match="row 0 has 2 placeholders, 1 media tokens"):
        reading()(batch([[IMAGE, IMAGE, 5]], image=[[1, 1, 4]]))


def test_a_decoder_that_keeps_its_arguments_from_its_layers_is_found_out() -> None:
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    falcon = FalconForCausalLM(FalconConfig(**sizes, bos_token_id=0, eos_token_id=1)).eval()
    layers = [GatedCrossAttention(TransformerSizes(d=16, depth=1, heads=2, d_source=8)), None]
    model = MultimodalLM({}, {"image": Unchanged(8)}, falcon, placeholder=IMAGE, reading=layers, inside="image")
    with pytest.raises(ConfigError, match="FalconForCausalLM does not hand its arguments on"):
        model.hidden(batch([[5, IMAGE, 6]], image=[[1, 1, 2]]))

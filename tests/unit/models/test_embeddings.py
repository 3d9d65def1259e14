"""What tokens, patches, sounds and boxes become: one width, gradients only where something was looked up."""

import pytest
import torch

from plait.core.errors import DataError
from plait.core.tensors import Patches
from plait.models import audio_specs, specs, text_specs
from plait.models.build import build_encoder
from plait.models.build_media import build_audio, build_text
from plait.models.position.absolute import LearnedBox
from plait.models.towers.text_transformer import TextTransformer


@pytest.mark.row("S3-03")
def test_all_embeddings_have_the_one_width() -> None:
    d = 24
    text = build_text(text_specs.Bert(vocabulary=30, d=d, depth=1, heads=2, page=20))
    assert isinstance(text, TextTransformer)
    image = build_encoder(specs.ViT(size=16, patch=8, d=d, depth=1, heads=2))
    audio = build_audio(audio_specs.Whisper(d=d, depth=1, heads=2, mels=8, tokens=10))
    words = text(torch.tensor([[1, 2, 3]]), boxes=torch.tensor([[[0, 0, 3, 2]] * 3]))
    assert words.shape == (1, 3, d)
    picture = image(Patches(values=torch.rand(256, 3), grid=torch.tensor([[1, 16, 16]])))
    assert picture.values.shape == (4, d)
    sound = audio(Patches(values=torch.rand(1600, 1), grid=torch.tensor([[1, 1, 1600]])))
    assert sound.values.shape == (5, d)  # 100 ms at 20 ms a token


@pytest.mark.row("S3-03")
def test_gradients_reach_only_rows_that_were_looked_up() -> None:
    torch.manual_seed(0)
    text = build_text(text_specs.Bert(vocabulary=30, d=8, depth=1, heads=2, page=20, dropout=0.0))
    assert isinstance(text, TextTransformer)
    assert text.box is not None
    assert text.types is not None
    ids = torch.tensor([[4, 7, 7]])
    boxes = torch.tensor([[[1, 2, 5, 3], [5, 2, 9, 3], [9, 2, 9, 2]]])
    text(ids, boxes=boxes, types=torch.tensor([[1, 1, 1]])).square().sum().backward()

    def reached(table: torch.nn.Embedding) -> set[int]:
        assert table.weight.grad is not None
        return set(table.weight.grad.abs().sum(1).nonzero().flatten().tolist())

    assert reached(text.embedding) == {4, 7}
    assert reached(text.types) == {1}
    assert (reached(text.box.x), reached(text.box.y)) == ({1, 5, 9}, {2, 3})
    assert (reached(text.box.width), reached(text.box.height)) == ({0, 4}, {0, 1})


@pytest.mark.row("S3-03")
def test_a_tied_output_layer_is_a_copy_of_the_table_at_the_start() -> None:
    torch.manual_seed(0)
    tied, own = (build_text(text_specs.Gpt(vocabulary=30, d=8, depth=1, heads=2, head=True)) for _ in range(2))
    assert isinstance(tied, TextTransformer)
    assert isinstance(own, TextTransformer)
    own.load_state_dict(tied.state_dict())
    own.head = torch.nn.Linear(8, 30, bias=False)
    own.head.weight.data.copy_(tied.embedding.weight.data)
    hidden = tied.eval()(torch.tensor([[1, 2, 3]]))
    assert torch.equal(tied.logits(hidden), own.eval().logits(own(torch.tensor([[1, 2, 3]]))))


@pytest.mark.parametrize(
    ("box", "said"),
    [([0, 0, 20, 3], r"\[0, 0, 20, 3\]"), ([5, 0, 4, 3], r"\[5, 0, 4, 3\]"), ([-1, 0, 4, 3], "token 1 of row 0")],
)
def test_boxes_off_the_page_are_refused(box: list[int], said: str) -> None:
    with pytest.raises(DataError, match=said):
        LearnedBox(20, 4)(torch.tensor([[[0, 0, 1, 1], box]]))


def test_boxes_are_given_exactly_where_there_are_pages() -> None:
    for page, boxes, said in ((0, torch.zeros(1, 1, 4, dtype=torch.long), "knows no pages"), (20, None, "no boxes")):
        text = build_text(text_specs.Bert(vocabulary=30, d=8, depth=1, heads=2, page=page))
        with pytest.raises(DataError, match=said):
            text(torch.tensor([[1]]), boxes=boxes)

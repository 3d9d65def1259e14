"""Compositions of ours as LLaVA folders of transformers and back: equal logits, no weight missing or left over."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from plait.adapters.lora import Lora, attach
from plait.assembly.compose import compose
from plait.assembly.llava import DECODERS, export_llava, from_llava, mismatches
from plait.assembly.multimodal import Multimodal, build_multimodal, load_multimodal, save_multimodal
from plait.assembly.towers import load_image_tower
from plait.assembly.vlm import load_vlm
from plait.core.errors import CheckpointError, ConfigError, UsageError
from plait.core.events import Event, Events
from plait.core.tensors import IGNORE, Batch
from plait.core.types import MediaRef, Request, Text, Turn
from plait.data.collate import joined
from plait.inference.build import build_engine, encode_pictures
from plait.models import specs
from plait.models.composition import Composition, Connectors, Encoders, NewDecoder, PretrainedDecoder

MLP = specs.Mlp(norm=False)
TOLERANCE = 2e-5
"""Logits of about 5; the largest difference seen was 2.4e-6: other attention kernels, another order of sums."""


def picture(side: tuple[int, int] = (32, 32), seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*side[::-1], 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a CLIP and a SigLIP tower of three layers, every weight random."""
    import transformers

    root = tmp_path_factory.mktemp("towers")
    found: dict[str, Path] = {}
    for kind in ("CLIP", "Siglip"):
        folder = found[kind] = root / kind
        folder.mkdir()
        torch.manual_seed(4)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
        config = getattr(transformers, f"{kind}VisionConfig")(**sizes, image_size=32, patch_size=8)
        model = getattr(transformers, f"{kind}VisionModel")(config)
        for weight in model.parameters():
            nn.init.normal_(weight, std=0.3)
        model.save_pretrained(folder)
        settings = {"image_mean": [0.48, 0.45, 0.40], "image_std": [0.26, 0.25, 0.27], "resample": 3}
        settings["size"] = {"height": 32, "width": 32}  # pyright: ignore[reportArgumentType]
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return found


def made(tower: Path, decoder: Any, *, connector: Any = MLP, layer: int = -2) -> Multimodal:
    """A composition with weights moved away from where they began, as training moves them."""
    torch.manual_seed(5)
    image = specs.PretrainedImage(name=str(tower), layer=layer, dtype="float32")
    built = compose(
        Composition(encoders=Encoders(image=image), connectors=Connectors(image=connector), decoder=decoder)
    )
    for name, weight in built.model.named_parameters():
        if not name.startswith("encoders.") and weight.ndim > 1:
            weight.data += torch.randn_like(weight) * 0.1
    built.model.eval().requires_grad_(requires_grad=False)
    return built


def logits(built: Multimodal, turns: Sequence[Turn], pictures: Sequence[Image.Image]) -> tuple[list[int], Tensor]:
    """Ids and the scores of every next token by our own model."""
    ids = built.template.turns(turns, prompt=True).token_ids
    token_ids = torch.tensor([ids])
    batch = Batch(
        token_ids=token_ids,
        labels=torch.full_like(token_ids, IGNORE),
        segment_ids=torch.ones_like(token_ids),
        media={"image": joined([built.image.prepare(found) for found in pictures])},
        item_row={"image": torch.zeros(len(pictures), dtype=torch.long)},
        sample_ids=("s",),
        encoded=False,
    )
    with torch.no_grad():
        return list(ids), built.model.logits(built.model.hidden(batch)[0])


def theirs(folder: Path, ids: Sequence[int], pictures: Sequence[Image.Image]) -> Tensor:
    """The same of the folder, with the processor's pixels."""
    auto: Any = AutoModelForImageTextToText
    model, report = auto.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not any(report.values()), report
    pixels = AutoProcessor.from_pretrained(folder).image_processor(list(pictures), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0]


REF = MediaRef(modality="image", sha256="0", uri="a.png", width=32, height=32)
ASKED = (Turn(role="user", parts=(REF, Text(text="what is this?"))),)
TWO = (*ASKED, Turn(role="assistant", parts=(Text(text="a cat"),)), Turn(role="user", parts=(REF, Text(text="this?"))))
MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this?"}]}]


def check_export(built: Multimodal, folder: Path, turns: Sequence[Turn] = ASKED) -> Any:
    """Equal logits for the same ids and pictures; ids and pixels of the processor are ours."""
    pictures = [picture(seed=n) for n, _ in enumerate(p for t in turns for p in t.parts if isinstance(p, MediaRef))]
    ids, wanted = logits(built, turns, pictures)
    done = export_llava(built, folder)
    named = [done.image_token_id if number == built.model.placeholder else number for number in ids]
    found = theirs(folder, named, pictures)[:, : wanted.shape[1]]
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)
    messages = [
        {
            "role": turn.role,
            "content": [
                {"type": "image"} if isinstance(part, MediaRef) else {"type": "text", "text": part.text}
                for part in turn.parts
            ],
        }
        for turn in turns
    ]
    processor = AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert processor(text=text, images=pictures)["input_ids"][0] == named
    return done


@pytest.mark.row("S4-225")
@pytest.mark.parametrize("kind", DECODERS)
def test_every_family_of_decoders_has_equal_logits(
    kind: Any, towers: dict[str, Path], tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    decoder = NewDecoder(
        model_type=kind, tokenizer=str(tiny_folders["decoder"]), d=32, depth=2, kv_heads=2, tied=kind != "mistral"
    )
    done = check_export(made(towers["CLIP"], decoder), tmp_path / "out", TWO)
    assert (done.dtype, done.merged, done.tokens_per_picture) == ("float32", 0, 16)
    assert done.image_token == "<image>"


@pytest.mark.row("S4-225")
@pytest.mark.parametrize(
    ("kind", "connector", "layer"),
    [
        ("CLIP", MLP, -1),
        ("CLIP", specs.Linear(), -3),
        ("Siglip", specs.Mlp(norm=False, d_hidden=32), -2),
        ("Siglip", specs.Linear(), -2),
    ],
)
def test_towers_layers_and_connectors_of_the_layout(
    kind: str, connector: Any, layer: int, towers: dict[str, Path], tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    decoder = PretrainedDecoder(name=str(tiny_folders["decoder"]))
    check_export(made(towers[kind], decoder, connector=connector, layer=layer), tmp_path / "out")


def test_adapters_are_merged_in_a_copy(towers: dict[str, Path], tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    built = made(towers["CLIP"], PretrainedDecoder(name=str(tiny_folders["decoder"])))
    lora = Lora(rank=2, alpha=4.0, targets=("q_proj", "v_proj", "down_proj"), dropout=0.0)
    before = logits(built, ASKED, [picture()])[1]
    attach(built.language.model, lora)
    built = built.with_lora(lora)
    for name, weight in built.language.model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(weight, std=0.3)
    built.model.eval()
    attached = logits(built, ASKED, [picture()])[1]
    assert (attached - before).abs().max() > 0.1
    done = check_export(built, tmp_path / "out")
    assert done.merged == 6
    assert any("merged into 6 matrices" in note for note in done.notes)
    assert any("lora_" in name for name, _ in built.language.model.named_parameters()), "the model itself changed"
    assert torch.equal(logits(built, ASKED, [picture()])[1], attached)


def test_the_picture_token_is_never_written_and_generate_answers_as_our_engine(
    towers: dict[str, Path], tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    built = made(towers["CLIP"], PretrainedDecoder(name=str(tiny_folders["decoder"])))
    image = picture((32, 32))
    image.save(tmp_path / "a.png")
    engine = build_engine(built, encode_pictures(built, lambda _: (tmp_path / "a.png").read_bytes()))
    wanted = engine([Request(id="r", turns=ASKED, max_new_tokens=12)])[0].token_ids
    done = export_llava(built, tmp_path / "out")
    model: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    text = processor.apply_chat_template(MESSAGES, add_generation_prompt=True)
    inputs = processor(text=text, images=[image], return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    assert tuple(n for n in answer if n != built.stop) == wanted
    assert model.generation_config.suppress_tokens == [done.image_token_id]


def test_pictures_that_are_not_square_are_shown_whole_and_the_notes_say_what_differs(
    towers: dict[str, Path], tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    built = made(towers["CLIP"], PretrainedDecoder(name=str(tiny_folders["decoder"])))
    done = export_llava(built, tmp_path / "out")
    assert any(
        "mean color (122, 114, 102) where Plait, as in training, takes (255, 255, 255)" in note for note in done.notes
    )
    images = AutoProcessor.from_pretrained(tmp_path / "out").image_processor
    dark = Image.new("RGB", (64, 32))
    pixels = images([dark], return_tensors="pt")["pixel_values"][0]
    mean, std = torch.tensor([0.48, 0.45, 0.40]), torch.tensor([0.26, 0.25, 0.27])
    shown = (pixels.permute(1, 2, 0) * std + mean) * 255
    assert torch.allclose(shown[9:23], torch.zeros(14, 32, 3), atol=0.5)  # the whole picture, in the middle
    assert torch.allclose(shown[:5], torch.tensor([122.0, 114, 102]).expand(5, 32, 3), atol=0.5)
    back = from_llava(tmp_path / "out")
    assert back.image.contract.background == (122, 114, 102)


@pytest.mark.row("S4-225")
def test_there_and_back_is_the_same_model(
    towers: dict[str, Path], tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    for name, connector in (("mlp", MLP), ("linear", specs.Linear())):
        built = made(towers["CLIP"], PretrainedDecoder(name=str(tiny_folders["decoder"])), connector=connector)
        done = export_llava(built, tmp_path / name)
        back = from_llava(tmp_path / name)
        assert back.connectors.image == connector
        assert back.language.tokenizer.chat_template == built.language.tokenizer.chat_template
        ids, wanted = logits(built, ASKED, [picture()])
        again, found = logits(back, ASKED, [picture()])
        pairs = zip(ids, again, strict=True)
        holes = [(one == built.model.placeholder, other == back.model.placeholder) for one, other in pairs]
        assert all(one == other for one, other in holes)
        torch.testing.assert_close(found[:, : wanted.shape[1]], wanted, rtol=0, atol=TOLERANCE)
        # Written a second time, no further token is added.
        twice = check_export(back, tmp_path / f"{name}-again")
        assert (twice.image_token_id, twice.weights) == (done.image_token_id, done.weights)


@pytest.mark.row("S4-225")
@pytest.mark.parametrize("name", ["llava", "llava-siglip"])
def test_a_llava_folder_becomes_our_composition(name: str, vlm_folder: Any, tmp_path: Path) -> None:
    said: list[Event] = []
    back = from_llava(vlm_folder(name), events=Events(None, listeners=(said.append,)))
    assert (back.slots_per_picture, back.whole) == (16, True)
    assert any("where it stands in the text" in event.text for event in said)
    image = back.language.tokenizer.convert_tokens_to_ids("<image>")
    assert isinstance(image, int)
    ids, found = logits(back, TWO, [picture(seed=0), picture(seed=1)])
    named = [image if number == back.model.placeholder else number for number in ids]
    wanted = theirs(vlm_folder(name), named, [picture(seed=0), picture(seed=1)])
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)
    # And it is a model of ours from then on: saved, loaded, exported.
    (tmp_path / "ours").mkdir()
    save_multimodal(back, tmp_path / "ours")
    loaded = load_multimodal(tmp_path / "ours")
    assert torch.equal(logits(loaded, TWO, [picture(seed=0), picture(seed=1)])[1], found)
    export_llava(loaded, tmp_path / "out")
    again = theirs(tmp_path / "out", named, [picture(seed=0), picture(seed=1)])
    torch.testing.assert_close(again, wanted, rtol=0, atol=TOLERANCE)


def test_an_exported_folder_is_a_wrapped_model_too(
    towers: dict[str, Path], tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    built = made(towers["Siglip"], PretrainedDecoder(name=str(tiny_folders["decoder"])))
    done = export_llava(built, tmp_path / "out")
    vlm = load_vlm(tmp_path / "out")
    ids = built.template.turns(ASKED, prompt=True).token_ids
    found = vlm.template.turns(ASKED, prompt=True).token_ids
    assert found == tuple(done.image_token_id if n == built.model.placeholder else n for n in ids)
    assert vlm.stop == built.stop


def test_parts_of_different_number_formats_get_the_widest_and_it_is_said(
    towers: dict[str, Path], tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    built = made(towers["CLIP"], PretrainedDecoder(name=str(tiny_folders["decoder"])))
    decoder: Any = built.language.model
    decoder.to(torch.bfloat16)
    ids, wanted = logits(built, ASKED, [picture()])
    done = export_llava(built, tmp_path / "out")
    assert done.dtype == "float32"
    assert any("the parts here bfloat16, float32: last digits" in note for note in done.notes)
    found = theirs(tmp_path / "out", [min(n, done.image_token_id) for n in ids], [picture()])
    torch.testing.assert_close(found[:, : wanted.shape[1]], wanted, rtol=0, atol=0.2)  # bfloat16: 8 bits of about 5


# --- what is refused -------------------------------------------------------------------------------------------------


def test_what_is_not_llava_is_refused_part_by_part(
    tiny_model: Any, towers: dict[str, Path], tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    decoder = PretrainedDecoder(name=str(tiny_folders["decoder"]))
    with pytest.raises(ConfigError, match=r"connectors\.image: found words, wanted mlp or linear"):
        export_llava(tiny_model, tmp_path / "out")
    gpt2 = NewDecoder(model_type="gpt2", tokenizer=str(tiny_folders["decoder"]), d=32, depth=1)
    built = made(towers["Siglip"], gpt2, connector=specs.Mlp(shuffle=2, d_hidden=24), layer=-1)
    assert [(wrong.part, wrong.found, wrong.wanted) for wrong in mismatches(built)] == [
        ("encoders.image.layer", "-1", "-2 or less: LLaVA takes layers before SigLIP's last norm"),
        ("connectors.image.shuffle", "2", "1"),
        ("connectors.image.norm", "true", "false"),
        ("connectors.image.d_hidden", "24", "32, the decoder's width (or 0)"),
        ("decoder", "gpt2", "one of llama, mistral, qwen2, qwen3"),
    ]
    assert not (tmp_path / "out").exists()
    own = compose(
        Composition(
            encoders=Encoders(image=specs.ViT(size=16, patch=8, d=16, depth=1, heads=2)),
            connectors=Connectors(image=MLP),
            decoder=decoder,
        )
    )
    assert [str(wrong) for wrong in mismatches(own)] == [
        "encoders.image: found a tower of Plait's own, wanted a Hugging Face folder of CLIP or SigLIP"
    ]
    for settings, cause in (
        ({"size": 64}, "encoders.image.size: found 64, wanted 32, at which its positions were learned"),
        ({"fit": specs.Tiles()}, "encoders.image.fit: found tiles, wanted square"),
    ):
        tower = load_image_tower(str(towers["CLIP"]), dtype="float32", **settings)  # pyright: ignore[reportArgumentType]
        other = build_multimodal({"image": tower}, own.language, Connectors(image=MLP), decoder=decoder)
        assert [str(wrong) for wrong in mismatches(other)] == [cause]


def test_a_target_that_holds_something_is_left_alone(
    towers: dict[str, Path], tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    built = made(towers["CLIP"], PretrainedDecoder(name=str(tiny_folders["decoder"])))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        export_llava(built, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("field", "value", "cause"),
    [
        ("vision_feature_layer", [-2, -3], "one layer, -4 to 3"),
        ("vision_feature_select_strategy", "full", "'default' with clip_vision_model"),
        ("projector_hidden_act", "relu", "'gelu' or 'linear'"),
    ],
)
def test_forms_of_llava_that_are_not_done_are_refused(
    field: str, value: object, cause: str, vlm_folder: Any, tmp_path: Path
) -> None:
    for path in vlm_folder("llava").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(CheckpointError, match=cause) as caught:
        from_llava(tmp_path)
    assert field in caught.value.place


def test_another_family_is_no_llava(vlm_folder: Any) -> None:
    with pytest.raises(CheckpointError, match="model_type is 'idefics3', expected 'llava'"):
        from_llava(vlm_folder("idefics3"))

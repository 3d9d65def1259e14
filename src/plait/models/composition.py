"""What a multimodal model is made of, as settings: encoders × connectors × a decoder. Loads no torch.

Example, as YAML::

    encoders:
      image: {kind: swin, d: 32, heads: [2, 4, 8, 16]}
    connectors:
      image: {kind: qformer, queries: 16, d: 64, depth: 2, heads: 4}
    decoder: {kind: new, model_type: qwen2, d: 128, depth: 4, heads: 4}
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from plait.core.spec import Spec
from plait.core.types import Modality
from plait.models.audio_specs import AudioEncoder
from plait.models.specs import Connector, GatedCrossAttention, ImageEncoder, Part, Positive, QFormer
from plait.models.video_specs import VideoEncoder

MODALITIES: tuple[Modality, ...] = ("image", "audio", "video")
"""What encoders and connectors there are for, in the order in which their placeholders are numbered: add at the end."""


class PretrainedDecoder(Part):
    """causal language model of Hugging Face from a folder, or the packaged SmolLM2-135M."""

    source: ClassVar[str] = "https://huggingface.co/docs/transformers"
    kind: Literal["pretrained"] = "pretrained"
    """Which decoder this is."""
    name: str = "smollm2"
    """`smollm2`, or a local folder in Hugging Face's layout, with a chat template."""


class Mixture(Spec):
    """Experts in place of each feed-forward network, some of which a router chooses for each token (Mixtral)."""

    experts: int = Field(default=8, ge=2)
    """How many there are in each layer."""
    top_k: Positive = 2
    """How many each token passes."""
    capacity: float | None = Field(default=None, gt=0.0)
    """While training, an expert takes this multiple of an even share of each sample's tokens, such as 1.25; what is
    beyond it is dropped, passes by the layer, and is counted (`loss/dropped`, the share of all choices). null drops
    nothing. (GShard, https://arxiv.org/abs/2006.16668, with a sample as the group.)"""
    balance: float = Field(default=0.01, ge=0.0)
    """Weight of the loss that keeps experts evenly used (`loss/balance`, a sum over layers, in each `top_k` where use
    is even): by sample, as in DeepSeek-V3 (https://arxiv.org/abs/2412.19437, equations 17 to 20), so that it is the
    same however a batch is split. 0 only reports it."""

    @model_validator(mode="after")
    def _fits(self) -> "Mixture":
        if self.top_k > self.experts:
            raise ValueError(f"top_k is {self.top_k} of {self.experts} experts: choose between 1 and all of them")
        return self


class NewDecoder(Part):
    """causal language model of Hugging Face from scratch, of a family of your choice."""

    source: ClassVar[str] = "https://huggingface.co/docs/transformers"
    kind: Literal["new"] = "new"
    """Which decoder this is."""
    model_type: Literal["llama", "mistral", "qwen2", "qwen3", "gpt2", "mixtral"] = "llama"
    """Family, as transformers calls it; `mixtral` has experts."""
    tokenizer: str = "smollm2"
    """Whose tokenizer and chat template: `smollm2`, or a local folder of a decoder."""
    d: Positive = 256
    """Width."""
    depth: Positive = 6
    """Layers."""
    heads: Positive = 4
    """Heads of attention."""
    kv_heads: int = Field(default=0, ge=0)
    """Heads of keys and values; 0 is as many as heads. GPT-2 has no other."""
    d_ff: int = Field(default=0, ge=0)
    """Width inside the feed-forward networks; 0 is four times the width."""
    context: Positive = 1024
    """Most tokens."""
    tied: bool = True
    """Whether the output head is the table of word embeddings."""
    mixture: Mixture | None = None
    """Experts of `mixtral`; `{}` takes their defaults. The others have none: null."""

    @model_validator(mode="after")
    def _fits(self) -> "NewDecoder":
        if (self.model_type == "mixtral") != (self.mixture is not None):
            has = "has experts: give mixture ({} takes its defaults)" if self.mixture is None else "has no mixture"
            raise ValueError(f"{self.model_type} {has}")
        if self.d % self.heads:
            raise ValueError(f"{self.heads} heads do not divide a width of {self.d}")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"{self.kv_heads} heads of keys and values do not divide {self.heads} heads")
        if self.model_type == "gpt2" and self.kv_heads not in (0, self.heads):
            raise ValueError(f"gpt2 has as many heads of keys and values as heads, came {self.kv_heads}")
        if self.model_type != "gpt2" and self.d // self.heads % 2:
            raise ValueError(
                f"{self.heads} heads of a width of {self.d} have {self.d // self.heads} each: {self.model_type} turns "
                "them in pairs (RoPE), which an odd width has not"
            )
        return self


Decoder = Annotated[PretrainedDecoder | NewDecoder, Field(discriminator="kind")]
"""All decoders."""


class Encoders(Spec):
    """One encoder a modality; null where the model takes none."""

    image: ImageEncoder | None = None
    """Of pictures."""
    audio: AudioEncoder | None = None
    """Of sounds."""
    video: VideoEncoder | None = None
    """Of videos."""

    def by_modality(self) -> dict[Modality, Part]:
        """Those that there are, in the order of :data:`MODALITIES`."""
        found: dict[Modality, Part | None] = {"image": self.image, "audio": self.audio, "video": self.video}
        return {modality: spec for modality, spec in found.items() if spec is not None}

    @field_validator("audio", mode="before")
    @classmethod
    def _pretrained(cls, given: Any) -> Any:
        """Sounds had one kind of encoder, which was not said: such settings hold."""
        return {"kind": "pretrained", **given} if isinstance(given, Mapping) and "kind" not in given else given


class Connectors(Spec):
    """One connector a modality that has an encoder."""

    image: Connector | None = None
    """Of pictures."""
    audio: Connector | None = None
    """Of sounds."""
    video: Connector | None = None
    """Of videos."""

    def by_modality(self) -> dict[Modality, Connector]:
        """Those that there are, in the order of :data:`MODALITIES`."""
        found: dict[Modality, Connector | None] = {"image": self.image, "audio": self.audio, "video": self.video}
        return {modality: spec for modality, spec in found.items() if spec is not None}


class Composition(Spec):
    """A model: encoders, a connector for each, and the decoder that reads what they give."""

    encoders: Encoders
    """What turns media into features."""
    connectors: Connectors
    """What turns features into what the decoder reads."""
    decoder: Decoder = PretrainedDecoder()
    """The language model."""

    @model_validator(mode="after")
    def _together(self) -> "Composition":
        chosen = self.connectors.by_modality()
        there, joined = list(self.encoders.by_modality()), list(chosen)
        if there != joined or not there:
            raise ValueError(
                f"there are encoders for {', '.join(there) or 'nothing'} and connectors for "
                f"{', '.join(joined) or 'nothing'}: give each encoder a connector"
            )
        started = [m for m, spec in chosen.items() if isinstance(spec, QFormer) and spec.start != "drawn"]
        if started:
            raise ValueError(
                f"connectors.{started[0]}.start is pretrain: only a recipe has a pretrain stage; set it to drawn"
            )
        inside = [modality for modality, spec in chosen.items() if isinstance(spec, GatedCrossAttention)]
        if len(inside) > 1:
            raise ValueError(f"{' and '.join(inside)} are both read inside the decoder: splice one of them in")
        return self

"""Scorer: Stream -> token log-probs. The module that Accelerate wraps.

Decoder and head both run inside `forward`, and only log-probs leave it: DDP's hooks and
Accelerate's cast of outputs then have nothing to get wrong, and no (tokens, vocab) tensor exists.

Two layouts have the same contract. `shared` runs the stream as it is, through the attention along
paths. `padded` is for models that this attention cannot serve (recurrent or hybrid
layers, soft-capped attention, attention sinks, multi-axis positions): every answer becomes a row of
its own, prompt included, padded on the right, through the model's own attention.
"""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from dpo.data.stream import Stream, build_stream, to_device
from dpo.errors import UserError
from dpo.logps import TILE_BYTES, Predictions, Statistic, token_kls, token_logps, token_statistics
from dpo.model.attention import KEYWORD, Segments, use_attention_along_paths
from dpo.model.load import keep_4bit_trainable, without_peft

# Answers of unlike length that share openings, three segments deep; every vocabulary has small ids.
_PROBE = [
    ([1, 2, 3, 4] * 4, [5, 6, 7], [5, 7, 6, 8, 9]),
    ([1, 2, 3, 4] * 4, [5, 7, 6, 3], [5, 7, 8, 9]),
]


Also = Statistic | Literal["predictions"] | Predictions
"""What `Scorer` may be asked for besides log-probs."""


class _Parts(NamedTuple):
    causal_lm: PreTrainedModel
    backbone: nn.Module
    head: nn.Linear


class Scorer(nn.Module):
    """Token log-probs of both answers of every pair under a Hugging Face decoder (PEFT or plain).

    Args:
        model: a causal LM, or a PEFT model around one.
        attention: `auto` takes `shared` if the model can, otherwise `padded`.
        has_numbers: false for a model of fake tensors, whose head cannot be compared with ours.

    Attributes:
        layout: `shared` or `padded`; `layout_reason` says why.
        tile_bytes: how many bytes of the head's logits are alive at once.

    Raises:
        UserError: `shared` was asked for and cannot be; or the model's head is not one that
            `token_logps` computes, so its log-probs would be wrong.
    """

    def __init__(
        self,
        model: nn.Module,
        attention: Literal["auto", "shared", "padded"] = "auto",
        *,
        has_numbers: bool = True,
    ) -> None:
        super().__init__()
        self.model = model
        self.tile_bytes = TILE_BYTES
        self._last: Segments | None = None
        keep_4bit_trainable(model)
        causal_lm = without_peft(model)
        backbone = causal_lm.base_model
        if backbone is causal_lm:  # Llama 4 names another prefix than the attribute it uses
            backbone = causal_lm.model  # type: ignore[assignment]
        # A tuple keeps them out of the module tree, where every weight would be listed twice.
        self._parts = _Parts(causal_lm, backbone, _plain_head(causal_lm))
        self._logit_scale, self._softcap = _logit_transform(causal_lm.config.get_text_config())

        modes = [(module, module.training) for module in model.modules()]
        self.eval()  # the probes compare two passes: no LoRA dropout
        obstacle = "" if attention == "padded" else self.obstacle_to_sharing()
        if attention == "shared" and obstacle:
            raise UserError(
                f"model.attention: got shared, but this model cannot share prompts: {obstacle}. "
                "Set model.attention to auto or padded."
            )
        self.layout: Literal["shared", "padded"] = (
            "padded" if attention == "padded" or obstacle else "shared"
        )
        self.layout_reason = obstacle or ("as configured" if attention != "auto" else "")
        if has_numbers:
            self._check_head()
        for module, mode in modes:
            module.training = mode

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The model without PEFT's wrapper; its layers may hold adapters."""
        return self._parts.causal_lm

    @property
    def device(self) -> torch.device:
        """The device of the embeddings, where a stream must be."""
        return self.causal_lm.get_input_embeddings().weight.device  # type: ignore[union-attr]

    def forward(self, stream: Stream, also: Also | None = None) -> Any:
        """Log-prob of every target, (scored,) nats, fp32.

        An empty stream gives (0,), still with a graph to every parameter: under DDP a rank without
        pairs must take part in the step's gradient reduction.

        With `also`, it comes in a pair with what is asked for: a statistic of each prediction,
        (scored,); the predictions; or, given a reference's, the KL from it, (scored,) nats.
        """
        if not stream.num_pairs:
            dummy = build_stream([([0], [0], [0])]).to(stream.input_ids.device)
            none = self(dummy)[:0]
            if also == "predictions":
                return none, self._predictions(dummy)
            return none if also is None else (none, none)
        predictions = self._predictions(stream)
        statistic: Any = also if isinstance(also, str) and also != "predictions" else None
        logps, values = token_statistics(predictions, stream.targets, statistic, self.tile_bytes)
        if also is None:
            return logps
        if also == "predictions":
            return logps, predictions
        if isinstance(also, Predictions):
            values = token_kls(also, predictions, self.tile_bytes)
        return logps, values

    def _predictions(self, stream: Stream) -> Predictions:
        states = self._shared_states if self.layout == "shared" else self._padded_states
        head = self._parts.head
        hidden = states(stream).to(head.weight.dtype)
        return Predictions(hidden, head.weight, head.bias, self._logit_scale, self._softcap)

    def _shared_states(self, stream: Stream) -> Float[Tensor, "scored hidden"]:
        return self._backbone_states(stream, self._segments(stream))[stream.predictors]

    def _segments(self, stream: Stream) -> Segments:
        """Built once per stream: the policy and its reference score it one after the other."""
        last, device = self._last, stream.input_ids.device
        if last is None or last.each is not stream.segments or last.device != device:
            last = self._last = Segments(stream.segments, device)
        return last

    def _backbone_states(
        self, stream: Stream, segments: Segments
    ) -> Float[Tensor, "tokens hidden"]:
        output = self._parts.backbone(
            input_ids=stream.input_ids[None],
            position_ids=stream.position_ids[None],
            use_cache=False,
            **{KEYWORD: segments},
        )
        return output.last_hidden_state[0]

    def _padded_states(self, stream: Stream) -> Float[Tensor, "scored hidden"]:
        # No mask: padding is on the right, where causal attention does not look.
        rows = stream.input_ids[_padded_rows(stream)]
        output = self._parts.backbone(input_ids=rows, use_cache=False)
        return output.last_hidden_state[stream.sequence_ids, stream.position_ids[stream.predictors]]

    def obstacle_to_sharing(self) -> str:
        """Why the attention along paths cannot serve this model; "" when it can."""
        causal_lm, backbone, _ = self._parts
        config = causal_lm.config.get_text_config()
        layer_types = set(getattr(config, "layer_types", None) or [])
        other = layer_types - {"full_attention", "sliding_attention"}
        if other:
            return f"it has {', '.join(sorted(other))} layers"
        if "mrope_section" in (getattr(config, "rope_parameters", None) or {}):
            return "its positions have several axes"
        use_attention_along_paths(backbone)  # type: ignore[arg-type]
        stream = build_stream(_PROBE).to(self.device)
        segments = self._segments(stream)
        try:
            with torch.no_grad():
                self._backbone_states(stream, segments)
        except Exception as error:  # a model's code may fail in any way on what it does not know
            return f"its forward refuses the layout ({type(error).__name__}: {error})"
        if segments.num_calls != config.num_hidden_layers:
            return (
                f"the layout reached {segments.num_calls} attention calls in "
                f"{config.num_hidden_layers} layers"
            )
        if segments.not_honoured:
            return f"its attention uses {', '.join(sorted(segments.not_honoured))}"
        return ""

    @torch.no_grad()
    def _check_head(self) -> None:
        """Compares our head with the model's own logits on a few tokens: families differ."""
        causal_lm, backbone, head = self._parts
        prompt, answer, _ = _PROBE[0]
        ids = torch.tensor([prompt[:4] + answer], device=self.device)
        states = backbone(input_ids=ids, use_cache=False).last_hidden_state[0].to(head.weight.dtype)
        targets = ids[0].roll(-1)
        ours = token_logps(
            states,
            head.weight,
            targets,
            head.bias,
            logit_scale=self._logit_scale,
            softcap=self._softcap,
        )
        logits = causal_lm(input_ids=ids, use_cache=False).logits[0].float()
        theirs = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        worst = (ours - theirs).abs().max().item()
        # Half-precision logits of the model's own head are off by about their last bit.
        allowed = 1e-3 + torch.finfo(head.weight.dtype).eps * 4 * logits.abs().max().item()
        if not worst <= allowed:
            raise UserError(
                f"model: the head of {type(causal_lm).__name__} computes other logits than "
                f"logit_scale x softcap(hidden @ weight.T + bias): {worst:.3g} nats off, wanted at "
                f"most {allowed:.3g}. This model cannot be trained here."
            )


def _plain_head(causal_lm: PreTrainedModel) -> nn.Linear:
    head = causal_lm.get_output_embeddings()
    if isinstance(head, nn.Linear) and type(head).__module__.startswith("torch."):
        return head
    raise UserError(
        f"model: the output head is a {type(head).__name__}, wanted a plain Linear: an adapter on "
        "the head, or a quantised head, is not scored here. Take lm_head out of "
        "lora.target_modules and of the adapter's modules_to_save."
    )


def _logit_transform(config: PreTrainedConfig) -> tuple[float, float | None]:
    """Logit scale and soft-cap, under the names that model families give them."""
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale *= getattr(config, "lm_head_multiplier", None) or 1.0  # Falcon-H1
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    return scale, getattr(config, "final_logit_softcapping", None)  # Gemma 2


def _padded_rows(stream: Stream) -> Int[Tensor, "sequences longest"]:
    """For each answer, the stream indices of its row; padding repeats index 0."""
    rows: list[list[int]] = []
    for segment in stream.segments:
        begun = ((stream.segments[i].start, length) for i, length in segment.path)
        runs = (*begun, (segment.start, segment.length))
        rows.append([i for start, length in runs for i in range(start, start + length)])
    longest = max(map(len, rows))
    index = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return to_device(index, stream.input_ids.device)

"""The error of a merged model against the trained policy, and how large it may be.

Nothing here is tuned on a model: how much rounding matters is measured on the merged model itself,
and each adapted layer is compared with its merged one, where rounding averages out.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpo.data.order import micro_batches
from dpo.data.stream import TokenizedPair, build_stream
from dpo.logps import sequence_logps
from dpo.model.scorer import Scorer

PROBE_ROWS = 32  # with hundreds of outputs enough to see an update far below a weight's rounding


@dataclass(frozen=True)
class Scores:
    """Log-probs in nats: of the answer tokens, (scored,), and of whole answers, (sequences,)."""

    tokens: Tensor
    answers: Tensor

    def apart(self, other: "Scores") -> float:
        """Mean absolute difference of a token's log-prob, nats."""
        return (self.tokens - other.tokens).abs().mean().item()


@torch.no_grad()
def score(scorer: Scorer, pairs: Sequence[TokenizedPair], budget: int) -> Scores:
    """Scores all pairs, at most `budget` tokens at a time, always in the same order."""
    tokens, answers = [], []
    for positions in micro_batches([pair.num_stream_tokens for pair in pairs], budget):
        stream = build_stream([pairs[i] for i in positions]).to(scorer.device)
        logps = scorer(stream)
        tokens.append(logps.cpu())
        answers.append(sequence_logps(logps, stream.sequence_ids, 2 * stream.num_pairs).cpu())
    return Scores(torch.cat(tokens), torch.cat(answers))


@dataclass(frozen=True)
class MergeError:
    """What a merge changed.

    Attributes:
        mean, worst: absolute difference of a token's log-prob, nats.
        per_answer: mean absolute difference of an answer's log-prob, nats.
        effect: mean absolute difference that the adapter makes to a token, nats; 0 without one.
        kept: share of the adapter's effect that the merge added to its base, by least squares over
            the tokens: 1 for a right merge, 0 for the base alone. An adapter that is added twice
            gives 2, or less if it is large, since log-probs are at most 0. None without an effect.
    """

    mean: float
    worst: float
    per_answer: float
    effect: float
    kept: float | None

    def row(self, name: str) -> str:
        """One line of the printed table, under `HEADER`."""
        kept = "" if self.kept is None else f"{self.kept:.2%}"
        return f"  {name:12}{self.mean:14.2g}{self.worst:14.2g}{self.per_answer:14.2g}{kept:>15}"


HEADER = f"  {'':12}{'token, mean':>14}{'token, worst':>14}{'answer, mean':>14}{'effect kept':>15}"


def measure(
    policy: Scores, bare: Scores | None, merged: Scores, base: Scores | None = None
) -> MergeError:
    """Compares the merged model with the policy; `bare` is the policy without its adapter, if any.

    `base` is the model that the adapter was merged into, if it is another one than `bare`: the
    difference of the two is not an effect of the adapter.
    """
    worst = (merged.tokens - policy.tokens).abs().max().item()
    per_answer = (merged.answers - policy.answers).abs().mean().item()
    errors = merged.apart(policy), worst, per_answer
    if bare is None:
        return MergeError(*errors, effect=0.0, kept=None)
    effect, moved = policy.tokens - bare.tokens, merged.tokens - (base or bare).tokens
    kept = (moved @ effect / (effect @ effect)).item() if effect.any() else None
    return MergeError(*errors, effect=effect.abs().mean().item(), kept=kept)


@torch.no_grad()
def jitter(model: nn.Module, epsilon: float) -> None:
    """Moves every weight at random, by up to `epsilon` of its size, in place.

    What that does to log-probs is the yardstick of a merge: rounding of that size is all that a
    right merge and its policy differ by.
    """
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        noise = 2 * torch.rand(weight.shape, generator=generator) - 1
        weight.copy_((weight.float() * (1 + epsilon * noise.to(weight.device))).to(weight.dtype))


def allowed(rounding: float, effect: float, apart: float) -> float:
    """The largest mean error, nats per token, of a merge that is right.

    Args:
        rounding: what `jitter` by the coarser type's epsilon does to the merged model, mean
            absolute nats per token. Twice of it passes; a right merge is off by about half of it
            (SmolLM2-135M in NF4: 0.49 in bfloat16, 0.50 in float16, 1.1 in float32).
        effect: the adapter's, mean absolute nats per token. A tenth of it passes: the bare base is
            off by all of it, half an adapter or one and a half by 0.3 of it or more.
        apart: how far the merge's base is from the trained one, both without the adapter, nats per
            token; 0 where it is the same one. Three times that passes, or a quarter of the effect,
            since the adapter's effect on another base may differ.
    """
    share = 0.25 if apart else 0.1
    return max(1e-5 + 2 * rounding + 3 * apart, share * effect)


@dataclass(frozen=True)
class LayerProbe:
    """What an adapted layer makes of some random inputs, without its adapter and with it; fp32."""

    width: int
    plain: Tensor
    adapted: Tensor

    def share_in(self, layer: nn.Module) -> tuple[float, float]:
        """The share of the adapter's effect that a merged layer has, and how far rounding blurs it.

        By least squares over all outputs: 1 for a right merge, 0 for the base alone. The blur is
        five standard errors of that share, from what the fit leaves over.
        """
        inputs = _inputs(layer, self.width).to(next(layer.parameters()).device)
        moved = _output(copy.deepcopy(layer).float(), inputs) - self.plain
        effect = self.adapted - self.plain
        share = ((moved * effect).sum() / effect.square().sum()).item()
        left_over = (moved - share * effect).norm() / effect.norm()
        return share, 5 * left_over.item() / math.sqrt(effect.numel())


@torch.no_grad()
def probe_layers(model: nn.Module) -> dict[str, LayerProbe]:
    """Probes every adapted layer of a PEFT model, by the layer's name in the base model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    probes = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        base: nn.Module = layer.get_base_layer()
        if not hasattr(base, "weight"):  # experts, which take more than inputs
            continue
        dtype, device = base.weight.dtype, base.weight.device  # type: ignore[union-attr]
        layer.float()  # type: ignore[attr-defined]
        width: int = layer.in_features  # type: ignore[assignment]
        inputs = _inputs(base, width).to(device)  # type: ignore[arg-type]
        plain, adapted = _output(base, inputs), _output(layer, inputs)  # type: ignore[arg-type]
        base.to(dtype)  # type: ignore[arg-type]
        probes[name.removeprefix("base_model.model.")] = LayerProbe(width, plain, adapted)
    return probes


@torch.no_grad()
def wrong_layers(model: nn.Module, probes: dict[str, LayerProbe]) -> list[str]:
    """The layers of a merged model that lack their adapter's effect or have too much; in words."""
    wrong = []
    for name, probe in probes.items():
        if torch.equal(probe.plain, probe.adapted):  # an adapter that does nothing here
            continue
        share, blur = probe.share_in(model.get_submodule(name))
        if not abs(share - 1) <= 0.1 + blur:
            wrong.append(f"{name} has {share:.0%} of its adapter's effect")
    return wrong


def _output(layer: nn.Module, inputs: Tensor) -> Tensor:
    """What a layer computes; a router of experts gives its scores first, then what it chose."""
    output = layer(inputs)
    return (output if isinstance(output, Tensor) else output[0]).cpu()


def _inputs(layer: nn.Module, width: int) -> Tensor:
    """Random inputs of a layer, the same in every call; tokens for an embedding."""
    generator = torch.Generator().manual_seed(width)
    if isinstance(layer, nn.Embedding):
        return torch.randint(width, (PROBE_ROWS,), generator=generator)
    return torch.randn(PROBE_ROWS, width, generator=generator)

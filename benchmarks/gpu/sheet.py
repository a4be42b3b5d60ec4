"""The table of the GPU benchmark: what is predicted for each row beside what was measured.

    cd benchmarks && python -m gpu.sheet [--rows rows.jsonl] [--output results/gpu.md]

A prediction needs no GPU. The model of `plan.py`, on fake tensors, runs one micro-batch through
the branches that a GPU takes; each operator takes the longer of its FLOPs
at the rate of a plain product and its bytes at the bandwidth of the memory. The assumptions
are in `Card`, below it, and in the report. A measurement far from its prediction is worth a look.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import common
import torch
from gpu.device import ARTICLE_PAIRS, GPU, SMALL, Setup, make_streams, shape_of
from gpu.recipe import FOUND, TRL, task_of
from gpu.sections import KINDS, REST, share
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper

from dpo.config import Config
from dpo.data.stream import TokenizedPair, build_stream
from dpo.model import attention
from dpo.plan.fake import FakePolicy
from dpo.plan.flops import FLASH_BACKWARD, costs, work
from dpo.plan.gpus import GPUS


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet, and how much of it can be reached.

    Attributes:
        name: its name in `dpo.plan.gpus.GPUS`.
        bandwidth: its memory's, bytes a second.
        product: share of the peak that a plain product reaches.
        attention: share of the product's rate that flash attention 2 reaches.
        host: seconds that the host takes to launch an operator.
    """

    name: str
    bandwidth: float
    product: float = 0.7
    attention: float = 0.5
    host: float = 10e-6

    @property
    def tflops(self) -> float:
        """TFLOP/s of a plain product."""
        return self.product * GPUS[self.name].tflops


CARDS = (Card("H100", 3.35e12), Card("H200", 4.8e12))
WAIT = 30e-6  # seconds that the host waits after each tensor that bitsandbytes steps
FUSED = 0.5  # share of the element-wise bytes that is left where layers are compiled
DETERMINISTIC = 1.5  # factor on the time of attention's backward if it sums in one order
FORMULAS = flop_registry | {op: shape_wrapper(own) for op, own in common.FORMULAS.items()}
NF4_BYTES = 0.5 + 4 / 64 + 2  # bytes moved for a weight, read in 4 bits and written in 16


@dataclass
class Cost:
    """What micro-batches ask of a device: bytes where memory is the bound, FLOPs elsewhere.

    Attributes:
        flops: FLOPs of products that compute more than they move.
        bytes: bytes that everything else moves, attention apart.
        scores, scores_backward: attention's FLOPs, forward (policy and reference) and backward.
        kernels: operators that are launched.
        dequantised: weights that are formed from 4 bits.
        useful: FLOPs that the method asks for.
    """

    flops: float = 0.0
    bytes: float = 0.0
    scores: float = 0.0
    scores_backward: float = 0.0
    kernels: int = 0
    dequantised: float = 0.0
    useful: float = 0.0

    def parts(self, card: Card, *, nf4: bool = False) -> dict[str, float]:
        """Seconds of the device by kind of kernel."""
        rate = card.tflops * 1e12
        moved = self.bytes + (NF4_BYTES * self.dequantised if nf4 else 0)
        return {
            "attention": (self.scores + self.scores_backward) / card.attention / rate,
            "GEMM": self.flops / rate,
            REST: moved / card.bandwidth,
        }

    def seconds(self, card: Card, *, nf4: bool = False) -> float:
        """The device works while the host launches: the slower of the two."""
        return max(sum(self.parts(card, nf4=nf4).values()), self.kernels * card.host)

    def tflops(self, card: Card, *, nf4: bool = False) -> str:
        """TFLOP/s of what the method asks for, and its share of a plain product's rate."""
        return share(self.useful / self.seconds(card, nf4=nf4) / 1e12, card.tflops)


class Roofline(TorchDispatchMode):
    """Adds up what every operator inside asks for; views are free, attention is left out.

    A product that moves more than it computes, as LoRA's do, counts by its bytes: `balance` is how
    many FLOPs a byte is worth.
    """

    def __init__(self, balance: float):
        super().__init__()
        self.cost, self._balance = Cost(), balance

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = (_tensors(values) for values in ((args, kwargs), result))
        known = {tensor.untyped_storage()._cdata for tensor in given}
        is_view = not func._schema.is_mutable and all(
            tensor.untyped_storage()._cdata in known for tensor in made
        )
        if is_view or "attn" in str(func) or "attention" in str(func):
            return result
        self.cost.kernels += 1
        moved = sum(tensor.numel() * tensor.element_size() for tensor in given + made)
        formula = FORMULAS.get(func.overloadpacket)
        flops = formula(*args, **(kwargs or {}), out_val=result) if formula else 0
        if flops > moved * self._balance:
            self.cost.flops += flops
        else:
            self.cost.bytes += moved
        return result


def _tensors(values: Any) -> list[torch.Tensor]:
    found = {id(leaf): leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)}
    return [*found.values()]


class _RmsNorm(torch.autograd.Function):
    """The bytes of a GPU's fused norm: one kernel, and one for its backward; a CPU has several."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad + ctx.saved_tensors[0]


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Inside, tensors say that they lie on a GPU that has flash attention."""
    with (
        mock.patch.object(torch.Tensor, "is_cuda", True),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
        mock.patch.object(attention, "takes_grouped_heads", return_value=True),
        mock.patch.object(torch.nn.functional, "rms_norm", lambda x, *_, eps: _RmsNorm.apply(x)),
    ):
        yield


class Traced:
    """The article's policy on fake tensors, and what its micro-batches cost.

    Layers are alike: models of one and of two layers tell what any number of them costs.

    Args:
        setup: the shape of the model.
        lean: lean layers, else PEFT's.
        trl: what TRL does: PEFT's layers, and every answer is a padded row.
        checkpointed: whether activations are computed again.
    """

    def __init__(
        self, setup: Setup, *, lean: bool = True, trl: bool = False, checkpointed: bool = False
    ):
        config = Config()
        config.model.quantization, config.model.lean_layers = "none", lean and not trl
        config.model.attention = "padded" if trl else "shared"
        config.train.gradient_checkpointing = checkpointed
        self._fakes = []
        with tempfile.TemporaryDirectory() as folder:
            config.model.name_or_path = folder
            for layers in (1, 2):
                shape_of(setup, layers).save_pretrained(folder)
                self._fakes.append(FakePolicy(config))

    def cost(
        self, pairs: Sequence[TokenizedPair], layers: int, *, live_reference: bool = True
    ) -> Cost:
        """The cost of one micro-batch: policy and reference, forward and backward."""
        one, two = (_cost(fake, pairs, live_reference) for fake in self._fakes)
        fields = zip(vars(one).values(), vars(two).values(), strict=True)
        return Cost(*(of_one + (layers - 1) * (of_two - of_one) for of_one, of_two in fields))

    def bytes(self, pairs: Sequence[TokenizedPair], layers: int) -> float:
        """Bytes at a micro-batch's peak, beyond weights and gradients, as `plan.py` has them."""
        with as_on_a_gpu():
            one, two = (fake.step_bytes(pairs) for fake in self._fakes)
        return one + (layers - 1) * (two - one)

    def kept(self, pairs: Sequence[TokenizedPair]) -> float:
        """KiB that a layer keeps of a token."""
        tokens = sum(pair.num_stream_tokens for pair in pairs)
        return (self.bytes(pairs, 2) - self.bytes(pairs, 1)) / tokens / 1024

    def base_bytes(self, layers: int) -> float:
        """Bytes of the base's weights in 16 bits."""
        one, two = (fake.base_bytes() for fake in self._fakes)
        return one + (layers - 1) * (two - one)

    def num_trained(self, layers: int) -> int:
        """The number of trained tensors."""
        return layers * len(self._fakes[0].trained)


def _cost(fake: FakePolicy, pairs: Sequence[TokenizedPair], live_reference: bool) -> Cost:
    balance = CARDS[0].tflops * 1e12 / CARDS[0].bandwidth
    with fake.mode, as_on_a_gpu(), Roofline(balance) as roofline:
        stream = build_stream(pairs)
        score = fake._score_both if live_reference else fake.scorer
        score(stream).sum().backward()
    its_costs = costs(fake.policy.model)
    its_work = work(stream.segments, len(stream.targets), fake.scorer.layout)
    scores = its_costs.attention * its_work.scores
    forwards = 1 + live_reference + its_costs.checkpointed
    return replace(
        roofline.cost,
        scores=scores * forwards,
        scores_backward=scores * FLASH_BACKWARD,
        dequantised=(forwards + 1) * its_costs.linear / 2,  # of a base kept in 4 bits, every pass
        useful=its_costs.flops(its_work, live_reference=live_reference).useful,
    )


Prediction = Callable[[Card], str]


def predict_sections(setup: Setup) -> dict[str, Prediction]:
    """The rows of `sections`, by their names."""
    n, few, half = setup.product, setup.few_layers, setup.budgets[-2]
    on_cpu = replace(setup, device=torch.device("cpu"))
    pairs = {budget: make_streams(on_cpu, budget)[0].pairs for budget in setup.budgets}
    lean, own = Traced(setup), Traced(setup, lean=False)
    at = {budget: lean.cost(pairs[budget], few) for budget in setup.budgets}
    plain, peft = at[half], own.cost(pairs[half], few)
    errors, nats = "worst error / largest of out, dq, dk, dv", "nats a token, mean (worst)"
    said: dict[str, Prediction] = {
        f"product of {n} x {n}, bfloat16: TFLOP/s": lambda card: f"{card.tflops:.3g}",
        f"attention in bfloat16, width 64: {errors}": lambda _: "< 2e-2 each",
        f"attention in bfloat16, width 128: {errors}": lambda _: "< 2e-2 each",
        f"shared against padded rows: {nats}": lambda _: "< 5e-2",
        f"policy against its reference, one micro-batch: {nats}": lambda _: "0.0e+00 (0.0e+00)",
        f"policy against its reference, pair by pair: {nats}": lambda _: "< 2e-2",
        "a micro-batch again, as it is: equal tensors": lambda _: "< 100%",
        f"{half} tokens, as it is: TFLOP/s": plain.tflops,
        "a micro-batch again, deterministic: equal tensors": lambda _: "100%",
        f"{half} tokens, deterministic: TFLOP/s": in_one_order(plain).tflops,
    }
    for name, traced in (("lean", lean), ("PEFT's", own)):
        kept = f"{traced.kept(pairs[setup.budgets[0]]):.1f}"
        said[f"kept by {name} layers, KiB per token and layer"] = lambda _, kept=kept: kept
    for budget, cost in at.items():
        what = f"micro-batches of {budget} tokens"
        said[f"{what}: TFLOP/s"] = cost.tflops
        said[f"{what}: ms of the host"] = lambda c, n=cost.kernels: f"{n * c.host * 1000:.3g}"
    what = f"a step of {2 * half} tokens"
    for kind in (*KINDS, REST):
        said[f"{what}: {kind}"] = lambda card, kind=kind: (
            f"{plain.parts(card)[kind] / plain.seconds(card):.0%}"
        )
    said[f"{what}: idle"] = lambda card: (
        f"{1 - sum(plain.parts(card).values()) / plain.seconds(card):.0%}"
    )
    for number in range(1, 6):
        said[f"{what}: costliest kernel {number}"] = lambda _: "a product"
    return said | {
        f"{half} tokens, PEFT's layers: TFLOP/s": peft.tflops,
        f"{half} tokens, NF4, dequantised in every pass: TFLOP/s": (
            lambda card: plain.tflops(card, nf4=True)
        ),
        f"{half} tokens, compiled regions: TFLOP/s": fused(plain).tflops,
    }


def predict_recipe(setup: Setup) -> dict[str, Prediction]:
    """The rows of `recipe`: a step of 16 pairs in one micro-batch; TRL's in its own."""
    lengths = task_of(Path(), setup).lengths[: common.PAIRS_PER_STEP]
    pairs = [TokenizedPair([3] * p, [5] * c, [6] * r) for p, c, r in lengths]
    layers, ours = setup.layers, Traced(setup)
    live, found = (ours.cost(pairs, layers, live_reference=is_live) for is_live in (True, False))
    base, kept = ours.base_bytes(layers), ours.bytes(pairs, layers)
    in_4_bits, waits = base * (NF4_BYTES - 2) / 2, ours.num_trained(layers) * WAIT
    said: dict[str, Prediction] = {}

    def say(side: str, peak: float, seconds: Callable[[Card], float]) -> None:
        def speed(card: Card) -> str:
            if peak > GPUS[card.name].memory_gib * 2**30:
                return f"does not fit: {peak / 2**30:.3g} GiB"
            a_second = len(pairs) / seconds(card)
            minutes = ARTICLE_PAIRS / a_second / 60
            said_peak = f"{peak / 2**30:.3g} GiB"
            return f"{a_second:.3g} ({minutes:.3g} min for {ARTICLE_PAIRS}; {said_peak})"

        said[f"recipe, {side}: pairs/s"] = speed
        if FOUND not in side:
            what = f"recipe, {side}: first step's loss, grad_norm, logps/chosen"
            said[what] = lambda _: "0.69315; dropout apart, the same for all sides"

    say("ours", base + kept, lambda card: live.seconds(card) + waits)
    say(f"ours, {FOUND}", base + kept, lambda card: found.seconds(card) + waits)
    say("ours, 4 bits kept", in_4_bits + kept, lambda card: live.seconds(card, nf4=True) + waits)
    say("ours, compiled", base + kept, lambda card: fused(live).seconds(card) + waits)
    say("ours, PyTorch's AdamW", base + kept, live.seconds)
    say("ours, deterministic", base + kept, lambda card: in_one_order(live).seconds(card) + waits)
    for name, size, checkpointed in (
        ("TRL, tuned by hand", 1, False),
        ("TRL, defaults", 4, True),
        ("TRL, checkpointing off", 4, False),
    ):
        trl = Traced(setup, trl=True, checkpointed=checkpointed)
        batches = [pairs[start : start + size] for start in range(0, len(pairs), size)]
        theirs = [trl.cost(batch, layers) for batch in batches]
        widest = max(batches, key=longest_row)
        peak = in_4_bits + trl.bytes(widest, layers)
        say(
            name,
            peak,
            lambda card, theirs=theirs: sum(c.seconds(card, nf4=True) for c in theirs) + waits,
        )
    return said


def longest_row(pairs: Sequence[TokenizedPair]) -> int:
    """The length to which a padded batch's rows are filled."""
    return max(
        len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs
    )


def in_one_order(cost: Cost) -> Cost:
    """The cost if attention's backward sums in one order."""
    return replace(cost, scores_backward=cost.scores_backward * DETERMINISTIC)


def fused(cost: Cost) -> Cost:
    """The cost if layers are compiled."""
    return replace(cost, bytes=cost.bytes * FUSED)


def report(rows: list[dict[str, Any]], setup: Setup) -> str:
    """Markdown: every row that is predicted or was measured; ours beside TRL's."""
    predicted = predict_sections(setup) | predict_recipe(setup)
    columns = [{name: say(card) for name, say in predicted.items()} for card in CARDS]
    columns.append({row["what"]: row["value"] for row in rows})
    for column in columns:
        column["ours against TRL"] = ratios(column)
    names = dict.fromkeys(name for column in columns for name in column)
    empty = "" if rows else "not measured"
    lines = [
        [name, *(column.get(name, "") for column in columns[:-1]), columns[-1].get(name) or empty]
        for name in names
    ]
    head = [
        "",
        *(f"{card.name}, predicted" for card in CARDS),
        rows[-1]["device"] if rows else "measured",
    ]
    packages = ["torch", "transformers", "peft", "accelerate", "bitsandbytes"]
    card = CARDS[0]
    return f"""# On a GPU

`bash benchmarks/gpu/run.sh` measures and fills in the last column.
{common.provenance(torch.get_num_threads(), packages)}

{common.table(head, lines)}

Mistral-7B's shape, random weights, LoRA r 16 with dropout {Config().lora.dropout} on all linear
layers, bfloat16, pairs with the lengths of `orca_lengths.json`; {setup.few_layers} layers, in the
recipe {setup.layers}, steps of {common.PAIRS_PER_STEP} pairs on a 4-bit base. TFLOP/s are of what
the method asks for (dpo.plan.flops), reference included.

Predicted, not measured: one step through the branches that a GPU takes, on tensors without numbers.
An operator takes the longer of its FLOPs, at {card.product:.0%} of the data sheet's peak, and its
bytes, at the memory's bandwidth. Assumed: attention runs at {card.attention:.0%} of the product's
rate, and its backward {DETERMINISTIC:g} times as long where it is deterministic; the host launches
an operator in {card.host * 1e6:.0f} us, and waits {WAIT * 1e6:.0f} us after each tensor that
bitsandbytes steps; compiling leaves {FUSED:.0%} of the element-wise bytes. TRL: PEFT's layers in
padded rows, on a base that is dequantised in every pass, without what its autocast and loop add.
"""


def ratios(column: dict[str, str]) -> str:
    """How many times as fast as each side of TRL ours is."""
    ours = column.get("recipe, ours: pairs/s", "")
    theirs = {name: column.get(f"recipe, {name}: pairs/s", "") for name in TRL}
    return "; ".join(
        f"{float(ours.split()[0]) / float(speed.split()[0]):.2f} x {name}"
        for name, speed in theirs.items()
        if ours and speed[:1].isdigit()
    )


def main(argv: list[str] | None = None) -> None:
    """Prints the table, with what was measured if there is something."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--rows", type=Path, help="written by sections and recipe")
    flags.add_argument("--output", type=Path, help="write the report there too")
    flags.add_argument("--small", action="store_true", help="for the trial on a CPU")
    args = flags.parse_args(argv)
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()] if args.rows else []
    rows = [row for row in rows if row["device"] == rows[-1]["device"]]  # one column is one device
    common.publish(report(rows, SMALL if args.small else GPU), args.output)


if __name__ == "__main__":
    main()

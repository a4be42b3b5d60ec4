import pytest
import torch
import transformers
from torch import nn

from dpo.config import OptimConfig
from dpo.train.optim import build_optimizer, learning_rate

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
every_optimizer = pytest.mark.parametrize(
    "name", ["adamw", "paged_adamw_32bit", "paged_adamw_8bit", "adamw_8bit"]
)


def rates_of_transformers(name, *, warmup, total, peak):
    """The learning rate that each of `total` steps is taken with under Hugging Face's scheduler."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    scheduler = transformers.get_scheduler(
        name,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=None if name == "constant_with_warmup" else total,
    )
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


# -------------------------------------------------------------------------------- learning rate


def test_the_cosine_by_hand():
    """Peak 4, warm-up 2 of 6 steps: 0, 2 | 4 x (1 + cos(pi k / 4)) / 2 for k = 0, 1, 2, 3.

    cos: 1, 0.707106781186548, 0, -0.707106781186548: 4, 3.414213562373095, 2, 0.585786437626905;
    and 0 at step 6, where the run ends.
    """
    config = OptimConfig(learning_rate=4.0, warmup_steps=2)
    rates = [learning_rate(step, 6, config) for step in range(7)]
    wanted = [0.0, 2.0, 4.0, 3.414213562373095, 2.0, 0.585786437626905, 0.0]
    assert rates == pytest.approx(wanted, abs=1e-14)


@pytest.mark.parametrize(("ratio", "total", "steps"), [(0.1, 150, 15), (0.03, 50, 2), (0.0, 9, 0)])
def test_a_warm_up_may_be_a_share_of_the_run(ratio, total, steps):
    """Rounded up, as transformers does: 0.03 x 50 = 1.5, so 2 steps."""
    by_ratio = OptimConfig(learning_rate=1.0, warmup_ratio=ratio, warmup_steps=7)
    by_steps = OptimConfig(learning_rate=1.0, warmup_steps=steps)
    for step in range(total):
        assert learning_rate(step, total, by_ratio) == learning_rate(step, total, by_steps)


def test_the_linear_and_the_constant_schedule_by_hand():
    """Peak 4, warm-up 2 of 6 steps: 0, 2 | 4, 3, 2, 1, and 0 at the end; or 4 throughout."""
    linear = OptimConfig(learning_rate=4.0, warmup_steps=2, lr_scheduler_type="linear")
    constant = OptimConfig(learning_rate=4.0, warmup_steps=2, lr_scheduler_type="constant")
    assert [learning_rate(s, 6, linear) for s in range(7)] == [0.0, 2.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    assert [learning_rate(s, 6, constant) for s in range(7)] == [0.0, 2.0, 4.0, 4.0, 4.0, 4.0, 4.0]


@pytest.mark.parametrize(("ours", "theirs"), SCHEDULES.items(), ids=SCHEDULES)
@pytest.mark.parametrize(
    ("warmup", "total"),
    [(100, 200), (2, 150), (20, 100), (0, 50), (0, 1), (1, 1), (7, 8), (10, 10), (100, 30)],
)
def test_every_step_has_the_rate_of_transformers(ours, theirs, warmup, total):
    """Warm-ups of none, of part, of all and of more than all of the run."""
    config = OptimConfig(learning_rate=5e-5, warmup_steps=warmup, lr_scheduler_type=ours)
    rates = [learning_rate(step, total, config) for step in range(total)]
    wanted = rates_of_transformers(theirs, warmup=warmup, total=total, peak=5e-5)
    assert rates == pytest.approx(wanted, rel=1e-12, abs=1e-18)


def test_the_three_schedules_differ():
    """The negative control of the comparison above."""
    rates = {
        name: learning_rate(120, 200, OptimConfig(lr_scheduler_type=name)) for name in SCHEDULES
    }
    assert len(set(rates.values())) == 3


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 5, 30])
def test_the_rate_stays_between_zero_and_the_peak_past_the_end(schedule, warmup):
    """A resumed run may be asked for steps beyond the ones planned: the cosine does not rise."""
    config = OptimConfig(learning_rate=1.0, warmup_steps=warmup, lr_scheduler_type=schedule)
    rates = [learning_rate(step, 20, config) for step in range(40)]
    assert all(0 <= rate <= 1 for rate in rates)
    assert rates[30:] == sorted(rates[30:], reverse=True)


# ------------------------------------------------------------------------------------ optimizer


class Tiny(nn.Module):
    """A matrix, a vector, a scalar and a frozen matrix."""

    def __init__(self, size=8):
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.matrix = nn.Parameter(torch.randn(size, size, generator=generator))
        self.vector = nn.Parameter(torch.randn(size, generator=generator))
        self.scalar = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Parameter(torch.ones(size, size), requires_grad=False)

    def quadratic(self):
        """Half the squared distance of all that trains from 1."""
        trained = (self.matrix, self.vector, self.scalar)
        return sum(0.5 * ((parameter - 1) ** 2).sum() for parameter in trained)


def descend(model, optimizer, steps):
    """The quadratic before each step and after the last."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model.quadratic()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    return [*losses, model.quadratic().item()]


@every_optimizer
def test_a_few_steps_go_down_a_quadratic_and_leave_the_frozen_alone(name):
    """Adam moves every entry by about the rate a step: 10 x 0.05 = 0.5 of distances around 1.

    80 x 80 entries: the 8-bit optimizers keep small tensors (under 4096) in 32 bits.
    """
    model = Tiny(80)
    optimizer = build_optimizer(model, OptimConfig(name=name, learning_rate=0.05))
    losses = descend(model, optimizer, 10)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.7 * losses[0]
    assert (model.frozen == 1).all()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_paged_32_bit_optimizer_takes_the_steps_of_pytorchs_adamw(weight_decay):
    """20 steps from one start, to 1e-5; the same steps with Adam's second moment, not another's."""
    models = [Tiny(), Tiny()]
    for model, name in zip(models, ["adamw", "paged_adamw_32bit"], strict=True):
        config = OptimConfig(name=name, learning_rate=0.05, weight_decay=weight_decay)
        descend(model, build_optimizer(model, config), 20)
    ours, theirs = (dict(model.named_parameters()) for model in models)
    for name, parameter in ours.items():
        torch.testing.assert_close(theirs[name], parameter, rtol=0, atol=1e-5)
    assert (ours["matrix"] - Tiny().matrix).abs().max() > 0.3


@every_optimizer
def test_weight_decay_spares_vectors_and_scalars(name):
    model = Tiny()
    config = OptimConfig(name=name, learning_rate=0.05, weight_decay=0.25)
    groups = build_optimizer(model, config).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay == {id(model.matrix): 0.25, id(model.vector): 0.0, id(model.scalar): 0.0}
    assert all(group["lr"] == 0.05 for group in groups)


@every_optimizer
def test_without_gradient_only_the_decay_moves_the_matrix(name):
    """Rate 0.1, decay 0.5: each step multiplies the matrix by 1 - 0.05 = 0.95; the vector stays."""
    model, start = Tiny(), Tiny()
    config = OptimConfig(name=name, learning_rate=0.1, weight_decay=0.5)
    optimizer = build_optimizer(model, config)
    for parameter in (model.matrix, model.vector, model.scalar):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.matrix, 0.95 * start.matrix, rtol=1e-6, atol=1e-6)
    assert torch.equal(model.vector, start.vector)


@every_optimizer
def test_a_model_of_matrices_alone_has_one_group(name):
    """LoRA without DoRA: no empty group is handed over."""
    model = nn.Linear(4, 4, bias=False)
    assert len(build_optimizer(model, OptimConfig(name=name)).param_groups) == 1


# --------------------------------------------------------------------------- half precision weights


def half_layer():
    layer = nn.Linear(64, 80, bias=False)  # more than 4096 weights: 8-bit states too
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-0.2, 0.2, 64 * 80).view(80, 64))
    return layer.bfloat16()


def take_steps(layer, optimizer, num_steps):
    """Along one fixed gradient, at a rate of 1e-5; the optimizer."""
    gradient = torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(0))
    for _ in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-5
        layer.weight.grad = gradient.bfloat16().to(layer.weight.dtype)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@every_optimizer
def test_half_precision_weights_take_steps_that_they_alone_could_not_hold(name):
    """100 steps of 1e-5 move a weight of 0.2, whose neighbours in bfloat16 are 1e-3 away, by 1e-3.

    As fp32 weights rounded at the end do.
    """
    config = OptimConfig(name=name, learning_rate=1e-5)
    half, whole = half_layer(), half_layer().float()
    for layer in (half, whole):
        take_steps(layer, build_optimizer(layer, config), 100)
    assert half.weight.dtype == torch.bfloat16
    assert torch.equal(half.weight, whole.weight.bfloat16())
    assert (half.weight != half_layer().weight).float().mean() > 0.5


def test_without_fp32_copies_such_steps_are_lost():
    """The negative control: PyTorch's AdamW on the weights themselves."""
    layer = half_layer()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-5, weight_decay=0.0)
    for _ in range(100):
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
    assert (layer.weight != half_layer().weight)[layer.weight.abs() > 0.1].sum() == 0


@every_optimizer
def test_fp32_copies_are_saved_and_go_on_bit_for_bit(name, tmp_path):
    config = OptimConfig(name=name, learning_rate=1e-5)
    straight, layer, resumed = (half_layer() for _ in range(3))
    expected = take_steps(straight, build_optimizer(straight, config), 7)
    first = take_steps(layer, build_optimizer(layer, config), 4)
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    optimizer = build_optimizer(resumed, config)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert torch.equal(resumed.weight, layer.weight)
    take_steps(resumed, optimizer, 3)
    assert torch.equal(resumed.weight, straight.weight)
    assert torch.equal(optimizer.state_dict()["copies"][0], expected.state_dict()["copies"][0])


def test_a_weight_without_a_gradient_is_not_stepped():
    layer = half_layer()
    optimizer = build_optimizer(layer, OptimConfig(name="adamw", weight_decay=0.5))
    before = layer.weight.clone()
    optimizer.step()
    assert torch.equal(layer.weight, before)

"""Gradients and steps of every architecture beside autograd on dense arrays, written here from the papers."""

import math

import numpy as np
import pytest
import torch

from millpond.analysis.sae import trainer as training
from millpond.analysis.sae.config import SaeConfig
from millpond.analysis.sae.sparse import above, add_sampled, by_latent, column_blocks, slopes_and_gradient
from millpond.analysis.sae.trainer import Trainer

D, S, N, K = 24, 96, 64, 4
LEVELS = (6, 24, 96)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(architecture, *, d_out=None, skip=False, **options):
    """A trainer with weights away from where they start, and a batch of inputs and targets."""
    if architecture in ("topk", "batchtopk", "matryoshka"):
        options = {"k": K} | options
    options |= {"prefixes": LEVELS} if architecture == "matryoshka" else {}
    config = SaeConfig(
        S, architecture=architecture, batch_size=N, encoder_dtype="float32", sparsity_warmup=0.0, **options
    )
    trainer = Trainer(config, D, total_steps=50, d_out=d_out, skip=skip)
    generator = torch.Generator().manual_seed(1)
    for name, size in (
        ("w_enc", 0.3),
        ("b_enc", 0.2),
        ("b_dec", 0.1),
        ("w_skip", 0.1),
        ("b_gate", 0.2),
        ("r_mag", 0.2),
    ):
        if name in trainer.parameters:
            tensor = trainer.parameters[name]
            tensor += size * torch.randn(tensor.shape, generator=generator)
    if architecture == "relu":
        trainer.parameters["w_dec"] *= 0.5 + torch.rand(S, 1, generator=generator)
    x = torch.randn(N, D, generator=generator) * 1.5 + 0.2
    y = torch.randn(N, d_out, generator=generator) if d_out else x
    return trainer, x, y


def select(trainer, x):
    return trainer.arch.select(x)


def cut_by_rank(pre, k, by_row):
    """Mask of the k largest of each row, or of k a row over the batch; of equal values the first."""
    flat = pre.detach() if by_row else pre.detach().reshape(1, -1)
    count = k if by_row else k * len(pre)
    order = torch.sort(flat, dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(flat).scatter_(1, order, 1.0).view_as(pre) > 0


class Heaviside(torch.autograd.Function):
    """H(z - theta) with the rectangle estimator of its derivative by theta."""

    @staticmethod
    def forward(ctx, z, theta, epsilon):
        ctx.save_for_backward((z - theta).abs() / epsilon < 0.5)
        ctx.epsilon = epsilon
        return (z > theta).float()

    @staticmethod
    def backward(ctx, gradient):
        (window,) = ctx.saved_tensors
        return None, -(gradient * window / ctx.epsilon).sum(0), None


def dense_loss(trainer, own, x, y):
    """The loss of the papers over all latents."""
    config, tied = trainer.config, trainer.arch.tied
    variance = (y - y.mean(0)).square().sum()
    centred = x - own["b_dec"] if tied else x
    hidden = centred @ own["w_enc"].T
    pre = hidden + own["b_enc"]
    rest = own["b_dec"] + (x @ own["w_skip"] if "w_skip" in own else 0.0)
    unit = math.sqrt(D)
    if config.architecture in ("topk", "batchtopk", "matryoshka"):
        acts = torch.relu(pre) * cut_by_rank(torch.relu(pre), K, config.architecture == "topk")
        levels = LEVELS if config.architecture == "matryoshka" else (S,)
        losses = [(acts[:, :m] @ own["w_dec"][:m] + rest - y).square().sum() for m in levels]
        return sum(losses) / len(losses) / variance, acts
    if config.architecture == "relu":
        acts = torch.relu(pre)
        penalty = (acts * own["w_dec"].norm(dim=1)).sum() / N / unit
        return (acts @ own["w_dec"] + rest - y).square().sum() / variance + 0.1 * penalty, acts
    if config.architecture == "gated":
        gate = hidden + own["b_gate"]
        acts = (gate > 0).float() * torch.relu(own["r_mag"].exp() * hidden + own["b_enc"])
        via_gate = torch.relu(gate) @ own["w_dec"].detach() + own["b_dec"].detach()
        errors = (acts @ own["w_dec"] + rest - y).square().sum() + (via_gate - y).square().sum()
        return errors / variance + 0.1 * torch.relu(gate).sum() / N / unit, acts
    theta = own["log_threshold"].exp()
    epsilon = config.bandwidth * unit
    z = torch.relu(pre)
    on = Heaviside.apply(z, theta, epsilon)
    # JumpReLU(z) = z H(z - theta); its derivative by theta is -theta / epsilon in the window, not -z / epsilon
    acts = z * on.detach() + theta.detach() * (on - on.detach())
    return (acts @ own["w_dec"] + rest - y).square().sum() / variance + 1e-3 * on.sum() / N, acts


CASES = [
    ("topk", {}),
    ("batchtopk", {}),
    ("matryoshka", {}),
    ("relu", {}),
    ("gated", {}),
    ("jumprelu", {"bandwidth": 0.05}),
    ("batchtopk", {"d_out": 17}),
    ("topk", {"d_out": 17, "skip": True}),
    ("matryoshka", {"d_out": 17, "skip": True}),
    ("relu", {"d_out": 17, "skip": True}),
]


@pytest.mark.parametrize(("architecture", "options"), CASES)
def test_loss_and_gradients_equal_autograd_on_dense_arrays(architecture, options):
    trainer, x, y = make(architecture, **options)
    own = {name: tensor.clone().requires_grad_() for name, tensor in trainer.parameters.items()}
    loss, acts = dense_loss(trainer, own, x, y)
    expected = torch.autograd.grad(loss, list(own.values()), allow_unused=True)
    batch = trainer.arch.gradients(x, y)
    assert float(batch.loss) == pytest.approx(float(loss.detach()), rel=1e-5)
    np.testing.assert_array_equal(batch.counts.numpy(), (acts > 0).sum(0).numpy())
    assert batch.gradients.keys() == own.keys()
    for name, gradient in zip(own, expected, strict=True):
        assert float(gradient.abs().max()) > 0, name
        scale = float(gradient.norm())
        np.testing.assert_allclose(batch.gradients[name].numpy(), gradient.numpy(), atol=1e-5 * scale, err_msg=name)


def test_blocks_of_columns_are_the_matrix():
    """Inputs and outputs of more than 64 dimensions, here of 2 * 64 and 22 more."""
    config = SaeConfig(S, K, batch_size=N, encoder_dtype="float32")
    trainer = Trainer(config, 150, total_steps=50)
    x = torch.randn(N, 150, generator=torch.Generator().manual_seed(0))
    assert len(column_blocks(x)) == 3
    own = {name: tensor.clone().requires_grad_() for name, tensor in trainer.parameters.items()}
    expected = torch.autograd.grad(dense_loss(trainer, own, x, x)[0], list(own.values()))
    for gradient, (name, found) in zip(expected, trainer.arch.gradients(x, x).gradients.items(), strict=True):
        np.testing.assert_allclose(found.numpy(), gradient.numpy(), atol=1e-5 * float(gradient.norm()), err_msg=name)


@pytest.mark.parametrize("with_dead", [False, True])
def test_a_step_is_a_clipped_adam_step_across_unit_decoder_rows(with_dead):
    trainer, x, _ = make("batchtopk", aux_k=5)
    if with_dead:
        dead = torch.arange(0, S, 4)
        trainer.idle[dead] = 10**9
        trainer.parameters["b_enc"][dead] = -1.0
    own = {name: tensor.clone().requires_grad_() for name, tensor in trainer.parameters.items()}
    loss, _ = dense_loss(trainer, own, x, x)
    if with_dead:
        share = N // training.AUX_SHARE
        error = (dense_acts(own, x) @ own["w_dec"] + own["b_dec"] - x).detach()
        pre = ((x - own["b_dec"].detach()) @ own["w_enc"].T + own["b_enc"])[:share, dead]
        rebuilt = torch.relu(pre * cut_by_rank(pre, 5, by_row=True)) @ own["w_dec"][dead]
        loss = loss + (rebuilt + error[:share]).square().sum() / error[:share].square().sum() / 32
    loss.backward()
    with torch.no_grad():
        own["w_dec"].grad -= (own["w_dec"].grad * own["w_dec"]).sum(1, keepdim=True) * own["w_dec"]
    torch.nn.utils.clip_grad_norm_(own.values(), 1.0 / D)
    torch.optim.Adam(own.values(), lr=trainer.lr / (0.05 * 50)).step()
    with torch.no_grad():
        own["w_dec"] /= own["w_dec"].norm(dim=1, keepdim=True)
    stats = trainer.step(x)
    assert stats.l0 == K
    assert stats.loss == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, expected in own.items():
        np.testing.assert_allclose(trainer.parameters[name].numpy(), expected.detach().numpy(), atol=1e-5)


def dense_acts(own, x):
    pre = torch.relu((x - own["b_dec"]) @ own["w_enc"].T + own["b_enc"])
    return pre * cut_by_rank(pre, K, by_row=False)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_of_exact_ties_at_the_cut_only_the_first_stay(architecture):
    trainer, x, _ = make(architecture)
    own = trainer.parameters
    with torch.no_grad():  # every latent four times, every row twice; whole numbers, so that sums are exact
        for name in ("w_enc", "w_dec", "b_enc"):
            own[name].copy_(own[name][: S // 4].repeat(4, *[1] * (own[name].dim() - 1)))
        own["w_enc"].copy_((4 * own["w_enc"]).round())
        own["b_enc"].copy_((4 * own["b_enc"]).round())
        own["b_dec"].zero_()
    x = (2 * x[: N // 2]).round().repeat(2, 1)
    pre = torch.relu(x @ own["w_enc"].T + own["b_enc"])
    expected = (cut_by_rank(pre, K, architecture == "topk") & (pre > 0)).nonzero()
    active = select(trainer, x)
    assert len(active.col) == K * N
    np.testing.assert_array_equal(torch.stack([active.row, active.col], dim=1).numpy(), expected.numpy())
    loss, _ = dense_loss(trainer, own, x, x)
    assert float(trainer.arch.gradients(x, x).loss) == pytest.approx(float(loss), rel=1e-5)


@torch.no_grad()
def test_selection_stays_exact_while_the_scale_of_the_batches_jumps():
    trainer, _, _ = make("batchtopk")
    own = trainer.parameters
    for seed, scale in enumerate((1.0, 1.0, 0.05, 20.0, 1.0)):
        x = torch.randn(N, D, generator=torch.Generator().manual_seed(seed)) * scale
        active = select(trainer, x)
        pre = torch.relu(x @ own["w_enc"].T + own["b_enc"])
        expected = cut_by_rank(pre, K, by_row=False).nonzero()
        np.testing.assert_array_equal(torch.stack([active.row, active.col], dim=1).numpy(), expected.numpy())
        np.testing.assert_allclose(active.values.numpy(), pre[tuple(expected.T)].numpy(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("most", [0.5, 6.0], ids=["compared with the bias", "added to the bias"])
def test_a_selection_in_bfloat16_is_that_of_float32(most):
    trainer, _, _ = make("batchtopk")
    trainer.arch.bf16 = True
    own = trainer.parameters
    generator = torch.Generator().manual_seed(5)
    own["b_enc"].copy_(most * torch.rand(S, generator=generator))
    own["b_enc"][::7] = -40.0 * torch.rand(len(own["b_enc"][::7]), generator=generator)
    own["w_enc"][::7] *= 20
    for _ in range(4):
        x = torch.randn(8 * N, D, generator=generator)
        pre = torch.relu((x - own["b_dec"]) @ own["w_enc"].T + own["b_enc"])
        active = trainer.arch.select(trainer.arch.centred(x))
        expected = cut_by_rank(pre, K, by_row=False).nonzero()
        np.testing.assert_array_equal(torch.stack([active.row, active.col], dim=1).numpy(), expected.numpy())


@pytest.mark.parametrize("threads", [1, 3])
def test_exact_values_by_tiles_and_marks_in_ragged_rows(threads):
    """1,100 latents of width 2,048 are nine tiles, of which some hold no entry; 1,101 entries a row are no whole words."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(9, 2048, generator=generator), torch.randn(1100, 2048, generator=generator)
    cols = [[3, 127, 128, 129, 130, 131, 1099], [], [600], [], [], [], [], [600], [0, 1, 2, 3, 4]]
    crow = torch.tensor(np.cumsum([0, *map(len, cols)]))
    row, col = (
        torch.repeat_interleave(torch.arange(9), crow.diff()),
        torch.tensor(np.concatenate(cols).astype(np.int64)),
    )
    values = torch.ones(len(col))
    torch.set_num_threads(threads)
    add_sampled(values, crow, col.int(), left, right)
    torch.set_num_threads(1)
    np.testing.assert_allclose(values.numpy(), (left @ right.T)[row, col].numpy() + 1, rtol=1e-4, atol=1e-4)
    pre = torch.randn(137, 1101, generator=generator)
    limits = torch.rand(1101, generator=generator)
    for kind in (torch.float32, torch.bfloat16):
        expected = torch.stack(torch.where(pre.to(kind) > limits.to(kind)))
        crow, col = above(pre.to(kind), limits)
        found = torch.repeat_interleave(torch.arange(137), crow.diff()), col
        np.testing.assert_array_equal(torch.stack(found).numpy(), expected.numpy())


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("width", [64, 150])
def test_slopes_and_decoder_gradient_are_those_of_the_dense_products(width, threads):
    """40 rows, 7 latents of which one has no entries and one has most; 150 columns are two whole blocks and 22."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(40, 7, generator=generator).clamp_min(0)
    codes[:, 3], codes[:, 5] = 0, codes[:, 5] + 0.1
    part, table = torch.randn(40, width, generator=generator), torch.randn(7, width, generator=generator)
    row, col = codes.nonzero(as_tuple=True)
    crow = torch.tensor([0, *(codes > 0).sum(1).cumsum(0).tolist()])
    starts, place, order = by_latent(crow, col.int(), 7)
    slopes, out = torch.ones(len(col)), torch.full((7, width + 3), torch.nan)
    torch.set_num_threads(threads)
    slopes_and_gradient(starts, place, codes[row, col][order], part, table, slopes, out[:, :width])
    torch.set_num_threads(1)
    np.testing.assert_array_equal(place.numpy(), row[order].numpy())
    np.testing.assert_allclose(out[:, :width].numpy(), (codes.T @ part).numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(slopes.numpy(), (part @ table.T)[row, col][order].numpy() + 1, rtol=1e-4, atol=1e-4)
    assert out[:, width:].isnan().all()


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_rows_with_fewer_positive_entries_have_fewer_latents(architecture):
    trainer, x, _ = make(architecture)
    trainer.parameters["b_enc"][3:] = -1e3
    active = select(trainer, x)
    pre = (x @ trainer.parameters["w_enc"].T + trainer.parameters["b_enc"])[:, :3]
    assert len(active.col) == int((pre > 0).sum())
    assert float(active.values.min()) > 0


def test_bfloat16_selects_almost_the_same_and_computes_values_in_float32():
    trainer, x, _ = make("topk")
    exact = select(trainer, x)
    trainer.arch.bf16 = True
    rough = select(trainer, x)
    one, two = (set((part.row * S + part.col).tolist()) for part in (exact, rough))
    assert len(one & two) > 0.98 * len(one)
    pre = x @ trainer.parameters["w_enc"].T + trainer.parameters["b_enc"]
    np.testing.assert_allclose(rough.values.numpy(), pre[rough.row, rough.col].numpy(), atol=1e-4)

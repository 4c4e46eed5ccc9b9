"""The float16 helpers of 2021 as programs call them."""

import math

import pytest
import torch
from torch import nn

from guided_diffusion import fp16_util, logger
from guided_diffusion.fp16_util import MixedPrecisionTrainer


@pytest.fixture(autouse=True)
def quiet_logger(tmp_path):
    with logger.scoped_configure(dir=str(tmp_path), format_strs=[]):
        yield


class Net(nn.Module):
    """A convolution that can be stored in float16 and computes in what it is stored in."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 1)
        self.norm = nn.LayerNorm(3)

    def convert_to_fp16(self):
        self.conv.apply(fp16_util.convert_module_to_f16)

    def forward(self, x):
        return self.norm(self.conv(x.to(self.conv.weight.dtype)).float().mean(-1))


def net():
    torch.manual_seed(0)
    return Net()


def test_convert_touches_convolutions_only():
    model = net()
    model.apply(fp16_util.convert_module_to_f16)
    assert model.conv.weight.dtype == model.conv.bias.dtype == torch.float16
    assert model.norm.weight.dtype == torch.float32
    model.apply(fp16_util.convert_module_to_f32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_groups_are_flat_vectors_then_matrices_and_come_back():
    model = net()
    (vectors, shape0), (matrices, shape1) = groups = fp16_util.get_param_groups_and_shapes(model.named_parameters())
    assert [name for name, _ in vectors] == ["conv.bias", "norm.weight", "norm.bias"] and shape0 == (-1,)
    assert [name for name, _ in matrices] == ["conv.weight"] and shape1 == (1, -1)
    masters = fp16_util.make_master_params(groups)
    assert [tuple(m.shape) for m in masters] == [(9,), (1, 6)]
    assert all(m.dtype == torch.float32 and m.requires_grad for m in masters)
    state = fp16_util.master_params_to_state_dict(model, groups, masters, True)
    assert list(state) == list(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(state[key], value)
    again = fp16_util.state_dict_to_master_params(model, state, True)
    assert all(torch.equal(a, b) for a, b in zip(masters, again))
    with torch.no_grad():
        masters[0].fill_(3.0)
    fp16_util.master_params_to_model_params(groups, masters)
    assert torch.equal(model.norm.bias, torch.full((3,), 3.0))
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    fp16_util.model_grads_to_master_grads(groups, masters)
    assert torch.equal(masters[1].grad, torch.ones(1, 6)) and torch.equal(masters[0].grad, torch.zeros(9))
    fp16_util.zero_master_grads(masters)
    assert masters[0].grad is None
    fp16_util.zero_grad(model.parameters())
    assert torch.equal(model.conv.weight.grad, torch.zeros_like(model.conv.weight))


@pytest.mark.parametrize(
    ("value", "bad"), [(1.0, False), (math.inf, True), (-math.inf, True), (math.nan, True), (1e300, False)]
)
def test_check_overflow(value, bad):
    assert fp16_util.check_overflow(value) is bad


def train(use_fp16, steps=5):
    model = net()
    trainer = MixedPrecisionTrainer(model=model, use_fp16=use_fp16, fp16_scale_growth=0.5, initial_lg_loss_scale=4.0)
    opt = torch.optim.AdamW(trainer.master_params, lr=0.01)
    x = torch.randn(8, 2, 4, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        trainer.zero_grad()
        trainer.backward((model(x)[:, 0] - 1).pow(2).mean())
        assert trainer.optimize(opt)
    return trainer


def test_float16_follows_float32():
    low, full = train(True), train(False)
    assert low.lg_loss_scale == 4.0 + 5 * 0.5
    low_state, full_state = (t.master_params_to_state_dict(t.master_params) for t in (low, full))
    assert list(low_state) == list(full_state)
    for key, value in full_state.items():
        assert low_state[key].dtype == torch.float32
        torch.testing.assert_close(low_state[key], value, atol=5e-3, rtol=1e-2)
    back = low.state_dict_to_master_params(full_state)
    assert [p.shape for p in back] == [p.shape for p in low.master_params]
    assert {"grad_norm", "param_norm", "lg_loss_scale"} <= set(logger.getkvs())


def test_overflow_skips_and_halves_with_a_floor():
    trainer = train(True, steps=1)
    opt = torch.optim.AdamW(trainer.master_params, lr=0.01)
    before = [p.detach().clone() for p in trainer.master_params]
    for _ in range(8):
        trainer.zero_grad()
        for p in trainer.model_params:
            p.grad = torch.full_like(p, math.inf)
        assert not trainer.optimize(opt)
    assert trainer.lg_loss_scale == 0.0
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.master_params))


def test_norms():
    trainer = MixedPrecisionTrainer(model=net())
    trainer.model.conv.weight.grad = torch.full_like(trainer.model.conv.weight, 2.0)
    grad_norm, param_norm = trainer._compute_norms(grad_scale=4.0)
    assert grad_norm == pytest.approx(math.sqrt(6 * 4) / 4)
    everything = torch.cat([p.detach().flatten() for p in trainer.master_params])
    assert param_norm == pytest.approx(float(everything.norm()), rel=1e-6)

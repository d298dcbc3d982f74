"""torch.compile with its default compiler, on images of several sizes: against eager CBAM in float64."""

import copy

import pytest
import torch
from torch import nn

from cbam_mmdet import CBAM
from cbam_mmdet.compat.torch import HAS_CUSTOM_OPERATORS
from cbam_mmdet.ops import compiled as workarounds

pytestmark = pytest.mark.skipif(not HAS_CUSTOM_OPERATORS, reason='torch.compile takes CBAM of any size since torch 2.4')
SIZES = [(2, 16, 7, 14), (2, 16, 9, 20), (1, 16, 33, 20)]  # the second one makes height and width dynamic


@pytest.fixture(scope='module')
def inductor():
    """It needs a C++ compiler, and torch in a path without a blank, which it does not quote."""
    try:
        torch.compile(torch.sin)(torch.ones(3))
    except Exception as error:
        pytest.skip(f'Inductor compiles nothing here: {str(error).splitlines()[0]}')


def step(module, x, grad):
    y = module(x.requires_grad_())
    return [y, *torch.autograd.grad(y, [x, *module.parameters()], grad)]


@pytest.mark.parametrize('variant', [{}, dict(order='parallel'), dict(spatial='conv')], ids=str)
def test_training_on_several_sizes(variant, inductor):
    torch._dynamo.reset()
    torch.manual_seed(0)
    # Between convolutions, as in a backbone: Inductor treats what they keep in a way of its own.
    module = nn.Sequential(nn.Conv2d(16, 16, 1), CBAM(16, reduction=4, **variant), nn.Conv2d(16, 16, 3, padding=1))
    compiled = torch.compile(module)
    for size in SIZES:
        x, grad = torch.randn(2, *size, dtype=torch.float64)
        expected = step(copy.deepcopy(module).double(), x, grad)
        for actual, wanted in zip(step(compiled, x.float(), grad.float()), expected, strict=True):
            torch.testing.assert_close(actual.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('dim', [1, 2])
def test_first_maximum_by_hand(dim):
    u = torch.tensor([[[1.0, 3, 3], [3, 2, 0]]], requires_grad=True)
    top, argmax = workarounds._first_maximum(u, dim)
    by_hand = [[[3.0, 3, 3]], [[1, 0, 0]]] if dim == 1 else [[[3.0], [3.0]], [[1], [0]]]
    assert [top[0].tolist(), argmax[0].tolist()] == by_hand
    torch.library.opcheck(workarounds._first_maximum, (u, dim))
    top.sum().backward()
    assert u.grad[0].tolist() == ([[0, 1, 1], [1, 0, 0]] if dim == 1 else [[0, 1, 0], [1, 0, 0]])

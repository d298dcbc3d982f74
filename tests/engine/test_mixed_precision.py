"""--amp, as far as a CPU shows it."""

import pytest
import torch
from conftest import DEMO, tiny
from torch import nn

from cbam_mmdet.engine.mixed_precision import BFloat16OptimWrapper


def test_bf16_computes_in_bfloat16_and_steps_in_float32():
    model = nn.Linear(4, 4)
    wrapper = BFloat16OptimWrapper(torch.optim.SGD(model.parameters(), lr=1.0))
    before = model.weight.detach().clone()
    with wrapper.optim_context(model):
        out = model(torch.ones(2, 4))
    assert out.dtype == torch.bfloat16
    wrapper.update_params(out.float().sum())
    assert model.weight.dtype == torch.float32
    torch.testing.assert_close(model.weight.detach(), before - 2)  # d(sum)/dw = 2 for two rows of ones
    assert model(torch.ones(2, 4)).dtype == torch.float32, 'the context has ended'


@pytest.mark.skipif(torch.cuda.is_available(), reason='fp16 works on a GPU')
def test_fp16_without_a_gpu(run_tool, shapes, tmp_path):
    result = run_tool('train.py', DEMO, '--amp', *tiny(tmp_path, shapes))
    assert result.code == 2
    assert '--amp bf16' in result.err

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


@pytest.mark.skipif(torch.cuda.is_available(), reason='fp16 works on a GPU')
def test_mmengines_wrapper_in_a_config(run_tool, shapes, tmp_path):
    """It needs a GPU. --amp bf16 takes its place, and leaves out the settings that are its own."""
    config = tmp_path / 'amp.py'
    config.write_text(
        f"_base_ = {DEMO!r}\noptim_wrapper = dict(type='AmpOptimWrapper', dtype='bfloat16', loss_scale='dynamic')\n"
    )
    result = run_tool('train.py', config, *tiny(tmp_path / 'a', shapes))
    assert result.code == 2 and "'AmpOptimWrapper' needs a GPU" in result.err and '--amp bf16' in result.err
    result = run_tool('train.py', config, '--amp', 'bf16', *tiny(tmp_path / 'b', shapes))
    assert result.code == 0, result.err[-2000:]
    assert "without optim_wrapper.loss_scale='dynamic'" in result.out + result.err

"""The self-test of the six passes finds what is broken on purpose, and `auto` does without kernels that fail it.

The kernels run under Triton's interpreter, in a process of their own (test_triton_passes.py).
"""

import dataclasses
import warnings

import pytest
import torch
from passes_cases import DEVICE, DTYPES, FUSED, LAYOUTS, NO_LIBRARY

from cbam_mmdet import CBAM
from cbam_mmdet.errors import UserError
from cbam_mmdet.models.cbam import cbam_reference
from cbam_mmdet.ops import c_passes, functional, self_test, torch_passes
from cbam_mmdet.ops.passes import SCHEMAS

CHANNELS_LAST = pytest.mark.parametrize('channels_last', [False, True])
KERNELS = pytest.mark.parametrize('impl', [FUSED])


def off(function, which, by=1e-3):
    """The function with one element of one of its results wrong, by a part of the greatest."""

    def broken(*args):
        results = function(*args)
        value = results if torch.is_tensor(results) else results[which]
        place = (0,) * value.ndim
        value[place] += by * value.abs().max() if value.is_floating_point() else 1
        return results

    return broken


def raises(*args, **kwargs):
    raise RuntimeError('no kernel image is available\nfor execution on the device')


@pytest.mark.parametrize('dtype', DTYPES)
@CHANNELS_LAST
def test_right_passes_pass(dtype, channels_last):
    state = torch.random.get_rng_state()
    assert self_test.find_difference(torch_passes.EAGER_FUNCTIONS, 'cpu', dtype, channels_last) is None
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.skipif(bool(NO_LIBRARY), reason=str(NO_LIBRARY))
@pytest.mark.parametrize('dtype', c_passes.DTYPES)
@CHANNELS_LAST
def test_the_c_library_passes(dtype, channels_last):
    shapes = (self_test.LARGE, *self_test.SMALL, self_test.WIDE)
    assert self_test.find_difference(c_passes.EAGER_FUNCTIONS, 'cpu', dtype, channels_last, shapes) is None


@pytest.mark.parametrize(
    ('name', 'which'),
    [(name, 0) for name in SCHEMAS] + [('pool_pixels', 1), ('pool_channels', 1), ('backward_maps', 1)],
)
@CHANNELS_LAST
def test_a_wrong_element_is_found(name, which, channels_last):
    right = torch_passes.EAGER_FUNCTIONS
    wrong = dataclasses.replace(right, **{name: off(getattr(right, name), which)})
    assert name in self_test.find_difference(wrong, 'cpu', torch.float32, channels_last)


def test_a_nan_is_found():
    right = torch_passes.EAGER_FUNCTIONS
    wrong = dataclasses.replace(right, refine=off(right.refine, 0, by=float('nan')))
    assert 'differs by nan' in self_test.find_difference(wrong, 'cpu', torch.float32)


def test_the_last_of_equal_maxima_is_found():
    right = torch_passes.EAGER_FUNCTIONS

    def last(x, with_argmax):
        descriptor, _ = right.pool_pixels(x, with_argmax)
        return descriptor, (x.shape[2] - 1 - x.flip(2).max(2).indices).int()

    wrong = dataclasses.replace(right, pool_pixels=last)
    assert "pool_pixels' argmax" in self_test.find_difference(wrong, 'cpu', torch.float32)


@pytest.fixture
def fresh(monkeypatch):
    """A process that has tested no kernel, in which 'auto' takes the kernels where they run."""
    monkeypatch.setattr(self_test, '_verdicts', {})
    monkeypatch.setattr(self_test, '_warned', [])
    monkeypatch.setattr(functional, 'TRITON_DEVICES', (DEVICE,))
    return monkeypatch


def break_kernels(patch, how):
    from cbam_mmdet.ops import triton_passes

    right = triton_passes.EAGER_FUNCTIONS
    broken = dict(wrong=off(right.backward_maps, 0), failing=raises)[how]
    patch.setattr(triton_passes, 'EAGER_FUNCTIONS', dataclasses.replace(right, backward_maps=broken))


@pytest.fixture
def module_and_map():
    torch.manual_seed(0)
    return CBAM(16).to(DEVICE), torch.randn(2, 16, 5, 6).to(DEVICE)


@KERNELS
def test_auto_takes_kernels_that_pass_and_tests_them_once(impl, fresh, module_and_map):
    module, x = module_and_map
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        state = torch.random.get_rng_state()
        with torch.inference_mode(), torch.autocast(DEVICE, torch.bfloat16):
            assert module.implementation(x) == 'fused'
        assert torch.equal(torch.random.get_rng_state(), state)
    assert self_test._verdicts == {(x.device, torch.float32, False, False): None}
    fresh.setattr(self_test, '_test_kernels', None)  # not to be called again
    assert module.implementation(x) == 'fused'


@KERNELS
@pytest.mark.parametrize('how', ['wrong', 'failing'])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_broken_kernels_are_not_taken(impl, layout, how, fresh, module_and_map):
    break_kernels(fresh, how)
    module, x = module_and_map
    x = x.contiguous(memory_format=layout)
    module.eval()
    with pytest.warns(UserWarning, match=r'python tools/doctor\.py') as caught:
        for again in (x, x.double().float(), x.bfloat16(), x.contiguous()):
            module(again)
    (message,) = [str(warning.message) for warning in caught if 'doctor' in str(warning.message)]
    reason = 'backward_maps' if how == 'wrong' else 'RuntimeError: no kernel image is available'
    assert reason in message and 'float32' in message
    torch.testing.assert_close(module(x), cbam_reference(x, module.channel, module.spatial))

    module.impl = 'fused'
    with pytest.raises(UserError, match=rf"impl='fused' needs .*self-test.*{reason}.*doctor\.py"):
        module(x)


@KERNELS
@pytest.mark.parametrize('how', [None, 'failing'])
def test_compiles_without_graph_break_at_first_use(impl, how, fresh, module_and_map):
    """The self-test runs while torch.compile traces, and answers a constant."""
    torch._dynamo.reset()
    if how:
        break_kernels(fresh, how)
    module, x = module_and_map
    module.eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        y = torch.compile(module, fullgraph=True, backend='aot_eager')(x)
    assert len([warning for warning in caught if 'doctor' in str(warning.message)]) == (1 if how else 0)
    torch.testing.assert_close(y, cbam_reference(x, module.channel, module.spatial))
    assert [bool(reason) for reason in self_test._verdicts.values()] == [bool(how)]


@KERNELS
@pytest.mark.parametrize('dtype', DTYPES)
@CHANNELS_LAST
def test_the_kernels_pass(impl, dtype, channels_last):
    for tail in (False, True):
        assert self_test.kernels_obstacle(torch.device(DEVICE), dtype, channels_last, tail) is None


@KERNELS
@CHANNELS_LAST
def test_the_kernels_pass_with_every_shape(impl, channels_last):
    from cbam_mmdet.ops import triton_passes

    kernels, tail = triton_passes.EAGER_FUNCTIONS, triton_passes.tail_passes
    assert self_test.find_difference(kernels, DEVICE, torch.float32, channels_last) is None
    assert self_test.find_tail_difference(tail, DEVICE, torch.float32, channels_last) is None


def test_nothing_is_tested_while_a_cuda_graph_is_captured(fresh):
    fresh.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
    device = torch.device('cuda', 0)
    assert 'before a CUDA graph' in self_test.kernels_obstacle(device, torch.float32, False)
    assert not self_test._verdicts, 'it is tested at the next use'
    self_test._verdicts[device, torch.float32, False, False] = None
    assert self_test.kernels_obstacle(device, torch.float32, False) is None

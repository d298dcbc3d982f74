"""Self-tests of every way to compute CBAM, against the equations in float64 on the CPU, forward and gradients."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cbam_mmdet.apis.doctor.case import Case, Skip, in_one_line
from cbam_mmdet.models.cbam import CBAM, cbam_reference
from cbam_mmdet.ops import c_branches, c_passes, torch_passes
from cbam_mmdet.ops.functional import HAS_TRITON, INTERPRETED, map_functions
from cbam_mmdet.ops.passes import Passes, apply, as_map
from cbam_mmdet.ops.self_test import LARGE, SMALL, WIDE, find_difference, find_tail_difference
from cbam_mmdet.ops.variants import recompute

LAYOUTS = {'contiguous': torch.contiguous_format, 'channels-last': torch.channels_last}
# Those of the paper's tables 1 to 3, and the gate that starts as the identity.
VARIANTS: tuple[dict, ...] = (
    dict(pools=('avg',)), dict(pools=('max',)), dict(pools=('avg', 'max', 'lp', 'lse')), dict(spatial='conv'),
    dict(spatial=None), dict(order='spatial-channel'), dict(order='parallel'), dict(gate='unit'),
)  # fmt: skip
REPORT = 'please report it with this page'
TRITON_REMEDY = f"impl='auto' does without these kernels by itself, and impl='eager' asks for it; {REPORT}"
C_REMEDY = (
    'set CBAM_CPU_KERNEL=0, which switches the library off, or build it anew: pip install --force-reinstall --no-deps '
    f'.; {REPORT}'
)


def cases(devices: list[str]) -> Iterator[Case]:
    """A self-test for each implementation and device."""
    for device in devices:
        for name, compute in (('equations', cbam_reference), ('recomputation', recompute)):
            test = functools.partial(_compare_all, compute, device, [torch.float64, torch.float32])
            yield Case(f'CBAM, {name}, {device}', test, REPORT)
        for name, (find, remedy) in implementations(device).items():
            yield Case(f'CBAM, {name}, {device}', functools.partial(_passes, find, device), remedy)
        yield Case(f'CBAM, tail of a block, {device}', functools.partial(_tail, device), TRITON_REMEDY)
        yield Case(f"CBAM, impl='auto', its variants, {device}", functools.partial(_variants, device), REPORT)
        yield Case(f'CBAM, torch.compile, {device}', functools.partial(_compiled, device), REPORT)


def implementations(device: str) -> dict[str, tuple[Callable[[], Passes], str]]:
    """By name: what returns the six passes, or raises Skip, and what to do if they are wrong."""
    on_cpu = {
        "PyTorch's operators": (lambda: torch_passes.EAGER_FUNCTIONS, REPORT),
        'C library': (_c_library, C_REMEDY),
    }
    kernels = {'Triton': (functools.partial(_triton, device), TRITON_REMEDY)}
    return {**on_cpu, **kernels} if device == 'cpu' else kernels


def _c_library() -> Passes:
    reason = c_passes.unavailable()
    if reason in (c_passes.NOT_BUILT, c_passes.SWITCHED_OFF):
        raise Skip(f'it {reason}')
    if reason:
        raise RuntimeError(f'it {reason}')
    return c_passes.EAGER_FUNCTIONS


def _triton(device: str) -> Passes:
    _require_kernels(device)
    from cbam_mmdet.ops import triton_passes

    return triton_passes.EAGER_FUNCTIONS


def _require_kernels(device: str) -> None:
    if not HAS_TRITON:
        raise Skip('Triton 3, which comes with torch 2.4, is not installed')
    if device == 'cpu':
        if not INTERPRETED:
            raise Skip('it needs a GPU')
    elif torch.cuda.get_device_capability(device) < (8, 0):
        raise Skip('it needs a GPU of compute capability 8.0')


def _dtypes(device: str) -> list[torch.dtype]:
    if device == 'cpu' and INTERPRETED:  # which takes its time
        return [torch.float32]
    return [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def _shapes(device: str, dtype: torch.dtype) -> tuple[tuple[int, int, int], ...]:
    """On a GPU, where other shapes are compiled anew, all of them in one dtype only."""
    if device == 'cpu':
        return (LARGE, *SMALL) if INTERPRETED else (LARGE, *SMALL, WIDE)
    return (LARGE, *SMALL) if dtype == torch.float32 else (LARGE,)


def _passes(find: Callable[[], Passes], device: str) -> str | None:
    """Each pass alone, then all of them as a CBAM."""
    passes = find()
    dtypes = [*c_passes.DTYPES] if find is _c_library else _dtypes(device)
    for dtype, name in itertools.product(dtypes, LAYOUTS):
        difference = find_difference(passes, device, dtype, name == 'channels-last', _shapes(device, dtype))
        if difference:
            return f'{_short(dtype)}, {name}: {difference}'

    small = (c_branches.sum_of_mlp, c_branches.convolve) if find is _c_library else ()

    def compute(x: Tensor, channel, spatial, order: str) -> Tensor:
        return as_map(apply(x.flatten(2), *map_functions(channel, spatial, x, *small), passes), x.shape)

    return _compare_all(compute, device, dtypes)


def _tail(device: str) -> str | None:
    _require_kernels(device)
    from cbam_mmdet.ops import triton_passes

    for dtype, name in itertools.product(_dtypes(device), LAYOUTS):
        shapes = _shapes(device, dtype)
        difference = find_tail_difference(triton_passes.tail_passes, device, dtype, name == 'channels-last', shapes)
        if difference:
            return f'{_short(dtype)}, {name}: {difference}'
    return None


def _variants(device: str) -> str | None:
    for options in ({}, *VARIANTS):
        for training in (True, False):
            module = _module(training, **options)

            def compute(x: Tensor, *_, module: CBAM = module) -> Tensor:
                return module(x)

            difference = _compare(compute, module, device, torch.float32, torch.contiguous_format)
            if difference:
                return f'{options or "the paper"}, {"training" if training else "inference"}: {difference}'
    return None


def _compiled(device: str) -> str | None:
    """Traced without a graph break. Then the operators run as they are: to generate code takes long."""
    module = _module(True)
    try:
        from torch import _dynamo

        _dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend='eager')
    except (ImportError, RuntimeError) as error:  # on some systems, and for Pythons newer than the torch
        raise Skip(f'this torch does not compile here ({in_one_line(error)})') from error
    return _compare(lambda x, *_: compiled(x), module, device, torch.float32, torch.contiguous_format)


def _compare_all(compute: Callable[..., Tensor], device: str, dtypes: list[torch.dtype]) -> str | None:
    for dtype, (name, layout) in itertools.product(dtypes, LAYOUTS.items()):
        difference = _compare(compute, _module(True), device, dtype, layout)
        if difference:
            return f'{_short(dtype)}, {name}: {difference}'
    return None


def _module(training: bool, **options) -> CBAM:
    """A CBAM with the same weights at every call, none of them at its initial value."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = CBAM(24, reduction=4, **options).train(training)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return module


def _compare(
    compute: Callable[..., Tensor], module: CBAM, device: str, dtype: torch.dtype, layout: torch.memory_format
) -> str | None:
    """What differs between compute(x, channel, spatial, order) and the equations; the module is moved to the device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        x, grad = torch.randn(2, 2, 24, 9, 14, dtype=torch.float64).to(dtype).unbind(0)
    exact = copy.deepcopy(module).double()
    x64 = x.double().requires_grad_()
    y64 = cbam_reference(x64, exact.channel, exact.spatial, exact.order)
    truth = [y64.detach(), *torch.autograd.grad(y64, [x64, *exact.parameters()], grad.double())]

    module.to(device)
    if dtype == torch.float64:
        module.double()
    x, grad = (t.to(device).contiguous(memory_format=layout) for t in (x, grad))
    x.requires_grad_()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # which would round the convolution's products
        y = compute(x, module.channel, module.spatial, module.order)
        actual = [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], grad)]
    limit = {torch.float64: 1e-10, torch.float32: 2e-5}.get(dtype, torch.finfo(dtype).eps)
    names = ['the result', 'the gradient of x', *(f'the gradient of {name}' for name, _ in module.named_parameters())]
    for name, value, right in zip(names, actual, truth, strict=True):
        error = float((value.cpu().double() - right).abs().max() / right.abs().max().clamp(min=1e-3))
        if not error <= limit:  # nor is NaN
            return f'{name} differs by {error:.1e} of its greatest value'
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')

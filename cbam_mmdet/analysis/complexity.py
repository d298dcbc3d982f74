"""The cost of a network: parameters, multiply-adds, speed and memory, and CBAM's share of them (tools/complexity.py).

One FLOP is one multiply-add, as in the paper. MMEngine's counter (mmengine.analysis) traces the forward pass and counts
convolutions, linear layers, matrix products, norms and interpolation, but no pooling and no elementwise operation. The
paper's figures do not include norms. `Complexity.flops_of_layers` leaves them out, too.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mmdet.models  # noqa: F401  (registers the detectors)
import torch
from mmdet.structures import DetDataSample
from mmengine.analysis import FlopAnalyzer
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS
from torch import Tensor, nn
from tqdm import tqdm

import cbam_mmdet.compat.ssd_head  # noqa: F401  (patches SSD)
from cbam_mmdet.compat.torch import memory_changes
from cbam_mmdet.errors import UserError
from cbam_mmdet.models.cbam import CBAM
from cbam_mmdet.models.gates import find_cbams
from cbam_mmdet.models.plugins.checks import check_plugins
from cbam_mmdet.utils.config import set_default_scope, split_datasets, type_name
from cbam_mmdet.utils.devices import choose_device
from cbam_mmdet.utils.tables import Cell, Column, Table, code

LAYERS = ('conv', 'linear', 'matmul', 'mm', 'addmm', 'bmm', 'einsum')  # MMEngine's names of what the paper counts


@dataclass(frozen=True)
class Stage:
    """The CBAMs of one stage, and the stage itself.

    Args:
        name: the backbone's child that holds them, e.g. 'backbone.layer1'.
        size: (H, W) of the feature map.
        cbams: the number of CBAMs.
        parameters: the parameters of the CBAMs.
        flops: the multiply-adds of the CBAMs.
        stage_parameters: the parameters of the child, with its CBAMs. None if its CBAMs have feature maps of several
            sizes, or if it is a CBAM itself.
        stage_flops: the multiply-adds of the child, likewise.
    """

    name: str
    size: tuple[int, int]
    cbams: int
    parameters: int
    flops: int
    stage_parameters: int | None
    stage_flops: int | None


@dataclass(frozen=True)
class Complexity:
    """The cost of a network for one image.

    Args:
        name: the name of the config.
        size: (H, W) of the image.
        parameters: the number of all parameters.
        operators: multiply-adds by kind of operator.
        cbams: the number of CBAM modules.
        cbam_parameters: their parameters.
        cbam_flops: their multiply-adds.
        stages: CBAM's share of each stage.
        speed: images per second, for the forward pass without post-processing.
        inference_memory: peak bytes of tensors beyond the weights, in a forward pass without gradients.
        training_memory: the same for forward and backward, with the gradients but without the optimizer's state.
    """

    name: str
    size: tuple[int, int]
    parameters: int
    operators: Counter[str]
    cbams: int
    cbam_parameters: int
    cbam_flops: int
    stages: list[Stage] = field(default_factory=list)
    speed: float | None = None
    inference_memory: int | None = None
    training_memory: int | None = None

    @property
    def flops(self) -> int:
        """All multiply-adds that are counted."""
        return int(sum(self.operators.values()))

    @property
    def flops_of_layers(self) -> int:
        """The multiply-adds of convolutions, linear layers and matrix products, which the paper counts."""
        return int(sum(self.operators[kind] for kind in LAYERS))


def measure(
    cfg: Config,
    name: str,
    size: Sequence[int] | None = None,
    *,
    rounds: int = 0,
    memory: bool = False,
    device: str | None = None,
) -> Complexity:
    """Build a config's network with random weights, and measure it.

    Args:
        cfg: the config of a detector (or of a classifier of mmpretrain).
        name: its name in the table.
        size: (H, W) of the image. By default this is the size of a landscape photograph after the config's test
            pipeline.
        rounds: the number of measurements of the speed. With 0 it is not measured.
        memory: whether to measure the peak memory.
        device: the device for speed and memory, by default the GPU if there is one.

    Raises:
        UserError: if the config does not give the image's size, or the network cannot be traced with it.
    """
    set_default_scope(cfg)
    check_plugins(cfg)
    device = choose_device(device)
    height, width = size or input_size(cfg, name)
    network = MODELS.build(cfg.model).eval().to(device)
    image = torch.rand(1, 3, height, width, device=device)
    samples = [sample_of(height, width)]
    result = count(network, image, samples, name)
    extra = {}
    raw = _RawOutputs(network, samples)
    if rounds:
        with torch.no_grad(), _all_proposals(network):
            extra['speed'] = interleaved_speeds({name: lambda: raw(image)}, rounds)[name]
    if memory:
        with _all_proposals(network):
            _forward(raw, image)  # the first pass allocates memory that is not measured
            extra['inference_memory'] = peak_memory(lambda: _forward(raw, image), device)
            network.train()
            extra['training_memory'] = peak_memory(lambda: _forward_and_backward(raw, image), device)
    return Complexity(**{**vars(result), **extra})


def measure_all(configs: Mapping[str, Config], size: Sequence[int] | None = None, **how: object) -> list[Complexity]:
    """Call :func:`measure` for several configs, by path. Each one's name is that of its file."""
    rows = []
    for path, cfg in tqdm(configs.items(), unit='config', disable=len(configs) < 2):
        with contextlib.redirect_stdout(sys.stderr):
            rows.append(measure(cfg, Path(path.split('::')[-1]).stem, size, **how))
    return rows


def input_size(cfg: Config, name: str = 'the config') -> tuple[int, int]:
    """(H, W) of a landscape photograph after the test pipeline and the padding of the data preprocessor.

    Raises:
        UserError: if the pipeline has no Resize.
    """
    datasets = split_datasets(cfg, 'test') or split_datasets(cfg, 'val')
    pipeline = datasets[0].get('pipeline', []) if datasets else []
    for i, transform in enumerate(pipeline):
        if type_name(transform.type) == 'Resize' and 'scale' in transform:
            scale = transform.scale
            width, height = (scale, scale) if isinstance(scale, int) else scale
            if transform.get('keep_ratio'):
                width, height = max(width, height), min(width, height)
            for pad in [later for later in pipeline[i + 1 :] if type_name(later.type) == 'Pad']:
                width, height = map(max, (width, height), pad.get('size') or (0, 0))
                if pad.get('pad_to_square'):
                    width = height = max(width, height)
                width, height = (_round_up(side, pad.get('size_divisor') or 1) for side in (width, height))
            pixels = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}  # as the Runner takes it
            divisor = pixels.get('pad_size_divisor', 1)
            return _round_up(height, divisor), _round_up(width, divisor)
    raise UserError(
        f'{name}: its test pipeline has no Resize with a scale, so the image has no known size: give it, '
        '--shape HEIGHT WIDTH'
    )


def sample_of(height: int, width: int) -> DetDataSample:
    """The data sample that a detector needs for an image of this size."""
    size = (height, width)
    return DetDataSample(
        metainfo=dict(
            img_id=0, img_shape=size, ori_shape=size, batch_input_shape=size, pad_shape=size, scale_factor=(1.0, 1.0)
        )
    )


def count(network: nn.Module, image: Tensor, samples: list, name: str = '') -> Complexity:
    """Parameters and multiply-adds of a network, and CBAM's share.

    Args:
        network: a model of MMEngine (forward(image, samples, mode='tensor')), in eval mode.
        image: (1, 3, H, W).
        samples: the image's data sample, in a list.
        name: its name in the table.

    Raises:
        UserError: if the network cannot be run or traced with this image.
    """
    sizes: dict[str, tuple[int, int]] = {}
    cbams = find_cbams(network)
    try:
        with contextlib.ExitStack() as stack:
            for path, module in cbams.items():
                stack.callback(module.register_forward_hook(_note_size(sizes, path)).remove)
            counter = _counter(network, image, samples)
        operators, by_module = counter.by_operator(), counter.by_module()
    except UserError:
        raise
    except Exception as error:  # tracing fails in many ways
        raise UserError(
            f'{name}: the network cannot be traced with an image of {tuple(image.shape[2:])} '
            f'({type(error).__name__}: {error}). Give another size, --shape HEIGHT WIDTH'
        ) from error
    return Complexity(
        name=name,
        size=tuple(image.shape[2:]),
        parameters=_parameters(network),
        operators=Counter({kind: int(value) for kind, value in operators.items()}),
        cbams=len(cbams),
        cbam_parameters=sum(map(_parameters, cbams.values())),
        cbam_flops=int(sum(by_module[f'network.{path}'] for path in cbams)),
        stages=_stages(network, cbams, sizes, by_module),
    )


def multiply_adds(detector: nn.Module, image: Tensor, samples: list) -> int:
    """Multiply-adds of a detector for one image, without post-processing.

    A two-stage detector is counted with as many proposals as its test_cfg allows, so that the count does not depend on
    the number of proposals in an image.

    Args:
        detector: the detector, in eval mode.
        image: (1, 3, H, W).
        samples: the image's data sample, in a list.
    """
    return int(_counter(detector, image, samples).total())


def interleaved_speeds(forwards: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Calls per second of each function: the median of interleaved rounds, so that a slow moment affects all."""
    times: dict[str, list[float]] = {name: [] for name in forwards}
    for i in range(rounds + 2):
        for name, forward in forwards.items():
            _synchronize()
            start = time.perf_counter()
            forward()
            _synchronize()
            if i >= 2:  # the first two rounds are a warm-up
                times[name].append(time.perf_counter() - start)
    return {name: 1 / statistics.median(values) for name, values in times.items()}


def peak_memory(function: Callable[[], object], device: str = 'cpu') -> int:
    """The peak number of bytes of a call's tensors, beyond those that existed before.

    PyTorch's allocator measures it on a GPU, and PyTorch's profiler on a CPU. It does not include memory that libraries
    (cuDNN, oneDNN) allocate on their own.
    """
    gc.collect()  # memory that is freed during the call would reduce the result
    if str(device).startswith('cuda'):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return max(0, *itertools.accumulate(memory_changes(function)))


# The tables


def markdown(rows: Sequence[Complexity]) -> str:
    """The table with a row for each network, without the columns that were not measured."""
    columns = {
        'config': lambda row: row.name,
        Column('input', number=True): lambda row: _size(row.size),
        Column('parameters (M)', '.2f'): lambda row: row.parameters / 1e6,
        'FLOPs (G)': lambda row: row.flops / 1e9,
        'without norms (G)': lambda row: row.flops_of_layers / 1e9,
        'CBAMs': lambda row: row.cbams,
        Column("CBAM's parameters (M)", number=True): lambda row: _share(row.cbam_parameters, row.parameters, 1e6),
        Column("CBAM's FLOPs (G)", number=True): lambda row: _share(row.cbam_flops, row.flops, 1e9),
    }
    if any(row.speed for row in rows):
        columns[Column('images/s', '.2f')] = lambda row: row.speed
    if any(row.inference_memory for row in rows):
        columns[Column('peak memory, inference (MiB)', '.0f')] = lambda row: row.inference_memory / 2**20
        columns[Column('peak memory, training (MiB)', '.0f')] = lambda row: row.training_memory / 2**20
    return Table.of(rows, columns).markdown()


def stages_markdown(row: Complexity) -> str:
    """CBAM's share of each stage of one network."""
    columns = {
        Column('stage', code): lambda stage: stage.name,
        Column('map', number=True): lambda stage: _size(stage.size),
        'CBAMs': lambda stage: stage.cbams,
        Column("CBAM's parameters (M)", number=True): lambda stage: _share(
            stage.parameters, stage.stage_parameters, 1e6
        ),
        Column("CBAM's FLOPs (G)", number=True): lambda stage: _share(stage.flops, stage.stage_flops, 1e9),
    }
    return Table.of(row.stages, columns).markdown()


def report(rows: Sequence[Complexity], rounds: int, device: str | None = None) -> str:
    """The table, the stages of each network, and an explanation of the columns."""
    parts = [markdown(rows), f'{notes(rows, rounds, device)}\n']
    parts += [f"CBAM's share of each stage of {row.name}:\n\n{stages_markdown(row)}" for row in rows if row.stages]
    return '\n'.join(parts)


def as_csv(rows: Sequence[Complexity]) -> str:
    """All values as plain numbers, with a line for each network and one for each of its stages."""
    header = [
        'config', 'stage', 'height', 'width', 'parameters', 'flops', 'flops_without_norms', 'cbams', 'cbam_parameters',
        'cbam_flops', 'images_per_second', 'inference_bytes', 'training_bytes',
    ]  # fmt: skip
    lines: list[list[Cell]] = []
    for row in rows:
        network = [row.parameters, row.flops, row.flops_of_layers, row.cbams, row.cbam_parameters, row.cbam_flops]
        speed = None if row.speed is None else f'{row.speed:.4g}'
        lines.append([row.name, None, *row.size, *network, speed, row.inference_memory, row.training_memory])
        for stage in row.stages:
            costs = [stage.stage_parameters, stage.stage_flops, None, stage.cbams, stage.parameters, stage.flops]
            lines.append([row.name, stage.name, *stage.size, *costs, None, None, None])
    return Table(header, lines).csv()


def notes(rows: Sequence[Complexity], rounds: int, device: str | None = None) -> str:
    """The explanation of the columns."""
    lines = [
        'One FLOP is one multiply-add. Counted are convolutions, linear layers, matrix products, norms and '
        'interpolation, of one image; two-stage detectors with as many proposals as their test_cfg allows.'
    ]
    cuda = torch.cuda.is_available() and not str(device).startswith('cpu')
    where = torch.cuda.get_device_name() if cuda else f'the CPU, {torch.get_num_threads()} threads'
    if rounds:
        lines.append(
            f'images/s: forward pass without post-processing, batch of 1, torch {torch.__version__} on {where}, '
            f'median of {rounds}.'
        )
    if any(row.inference_memory for row in rows):
        lines.append(
            'Peak memory: tensors beyond the weights, batch of 1; training with the gradients, without the optimizer.'
        )
    return '\n'.join(lines)


# Counting


class _RawOutputs(nn.Module):
    """A network as a function of the image alone, which tracing needs."""

    def __init__(self, network: nn.Module, samples: list) -> None:
        super().__init__()
        self.network = network
        self.samples = samples

    def forward(self, image: Tensor) -> object:
        return self.network(image, self.samples, mode='tensor')


def _counter(network: nn.Module, image: Tensor, samples: list) -> FlopAnalyzer:
    counter = FlopAnalyzer(_RawOutputs(network, samples), (image,))
    counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    # MMEngine counts neither.
    counter.set_op_handle('aten::scaled_dot_product_attention', _attention_flops)
    counter.set_op_handle('aten::baddbmm', _baddbmm_flops)
    # With gradients the trace would not show the operators inside CBAM's autograd function.
    with torch.no_grad(), _all_proposals(network), warnings.catch_warnings():
        warnings.simplefilter('ignore', torch.jit.TracerWarning)
        counter.total()  # this traces the network, and the counter keeps the result
    return counter


def _attention_flops(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Those of softmax(Q K^T) V: one product with each row of K, and one with each of V."""
    query, key = (value.type().sizes() for value in inputs[:2])
    (output,) = (value.type().sizes() for value in outputs)
    return Counter(matmul=math.prod(query) * key[-2] + math.prod(output) * key[-2])


def _baddbmm_flops(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    first, output = (value.type().sizes() for value in (inputs[1], outputs[0]))
    return Counter(bmm=math.prod(output) * first[-1])


@contextlib.contextmanager
def _all_proposals(detector: nn.Module) -> Iterator[None]:
    head = getattr(detector, 'rpn_head', None)
    if head is None:
        yield
        return
    usual, count = head.test_cfg, head.test_cfg.max_per_img
    nms = dict(type='nms', iou_threshold=2.0)  # no two boxes overlap by more than 1
    head.test_cfg = ConfigDict(nms_pre=count, max_per_img=count, nms=nms, min_bbox_size=-1)
    try:
        yield
    finally:
        head.test_cfg = usual


def _stages(network: nn.Module, cbams: dict[str, CBAM], sizes: dict, by_module: Counter[str]) -> list[Stage]:
    groups: dict[tuple[str, tuple[int, int]], list[str]] = {}
    for path in cbams:
        if path in sizes:
            groups.setdefault(('.'.join(path.split('.')[:2]), sizes[path]), []).append(path)
    holders = Counter(holder for holder, _ in groups)
    stages = []
    for (holder, size), paths in groups.items():
        total = None, None
        if holders[holder] == 1 and holder not in cbams:
            total = _parameters(network.get_submodule(holder)), int(by_module[f'network.{holder}'])
        parameters = sum(_parameters(cbams[path]) for path in paths)
        flops = int(sum(by_module[f'network.{path}'] for path in paths))
        stages.append(Stage(holder, size, len(paths), parameters, flops, *total))
    return stages


def _note_size(sizes: dict[str, tuple[int, int]], path: str) -> Callable:
    def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        sizes[path] = tuple(int(length) for length in output.shape[2:])  # in a trace the lengths are tensors

    return hook


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _forward(raw: nn.Module, image: Tensor) -> None:
    with torch.no_grad():
        raw(image)


def _forward_and_backward(raw: nn.Module, image: Tensor) -> None:
    # Any loss that depends on every output keeps the same tensors as training does.
    outputs = [value.sum() for value in _tensors(raw(image)) if value.requires_grad]
    sum(outputs).backward()


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _round_up(size: int, divisor: int) -> int:
    return -(-size // divisor) * divisor


def _size(size: tuple[int, int]) -> str:
    return f'{size[0]}x{size[1]}'


def _share(part: int, total: int | None, unit: float) -> str:
    digits = 3 if unit == 1e6 else 4
    return f'{part / unit:.{digits}f}' + (f' ({part / total:.2%})' if total and part else '')

"""What a network costs: parameters, multiply-adds, speed and memory, and CBAM's share of them. See tools/complexity.py.

One FLOP is one multiply-add, as in the paper. MMEngine's counter (mmengine.analysis) traces the forward pass and counts
convolutions, linear layers, matrix products, norms and interpolation, but no other pooling or elementwise operation.
The paper's figures have no norms either: `Complexity.flops_of_layers` leaves them out.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mmdet.models  # noqa: F401  (registers the detectors)
import torch
from mmdet.structures import DetDataSample
from mmengine.analysis import FlopAnalyzer
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS
from torch import Tensor, nn
from tqdm import tqdm

import cbam_mmdet.compat.ssd_head  # noqa: F401  (SSD is mended)
from cbam_mmdet.errors import UserError
from cbam_mmdet.models.cbam import CBAM
from cbam_mmdet.models.gates import find_cbams
from cbam_mmdet.models.plugins.checks import check_plugins
from cbam_mmdet.utils.config import set_default_scope, split_datasets
from cbam_mmdet.utils.tables import Cell, Column, Table, code

LAYERS = ('conv', 'linear', 'matmul', 'mm', 'addmm', 'bmm', 'einsum')  # what the paper counts, as MMEngine names it


@dataclass(frozen=True)
class Stage:
    """The CBAMs of one stage, and the stage itself.

    Args:
        name: the backbone's child that holds them, e.g. 'backbone.layer1'.
        size: (H, W) of the feature map.
        cbams: how many.
        parameters: of the CBAMs.
        flops: of the CBAMs.
        stage_parameters: of the child, CBAMs included; None where it holds CBAMs of several sizes, or is one itself.
        stage_flops: likewise.
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
    """What a network costs for one image.

    Args:
        name: of the config.
        size: (H, W) of the image.
        parameters: all of them.
        operators: multiply-adds by kind of operator.
        cbams: CBAM modules.
        cbam_parameters: theirs.
        cbam_flops: theirs.
        stages: CBAM's share of each stage.
        speed: images a second, forward pass without post-processing.
        inference_memory: peak bytes of tensors beyond the weights, in a forward pass without gradients.
        training_memory: the same, forward and backward, with the gradients, without the optimizer's state.
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
        """All that is counted."""
        return int(sum(self.operators.values()))

    @property
    def flops_of_layers(self) -> int:
        """Convolutions, linear layers and matrix products alone: the paper's count."""
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
        name: what the table calls it.
        size: (H, W) of the image; by default what the config's test pipeline makes of a landscape photograph.
        rounds: measurements of the speed; 0 leaves it out.
        memory: measure the peak memory, too.
        device: for speed and memory; by default the GPU if there is one.

    Raises:
        UserError: if the config does not say the image's size, or the network cannot be traced with it.
    """
    set_default_scope(cfg)
    check_plugins(cfg)
    if device is None:
        device = 'cuda:0' if torch.cuda.is_available() else 'cpu'
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
            _forward(raw, image)  # what a first pass sets up is not measured
            extra['inference_memory'] = peak_memory(lambda: _forward(raw, image), device)
            network.train()
            extra['training_memory'] = peak_memory(lambda: _forward_and_backward(raw, image), device)
    return Complexity(**{**vars(result), **extra})


def measure_all(configs: Mapping[str, Config], size: Sequence[int] | None = None, **how: object) -> list[Complexity]:
    """:func:`measure` for several, by path; each is called by its file's name."""
    rows = []
    for path, cfg in tqdm(configs.items(), unit='config', disable=len(configs) < 2):
        with contextlib.redirect_stdout(sys.stderr):
            rows.append(measure(cfg, Path(path.split('::')[-1]).stem, size, **how))
    return rows


def input_size(cfg: Config, name: str = 'the config') -> tuple[int, int]:
    """(H, W) of what the test pipeline makes of a landscape photograph, padded as the data preprocessor does.

    Raises:
        UserError: if there is no Resize in it.
    """
    datasets = split_datasets(cfg, 'test') or split_datasets(cfg, 'val')
    for transform in datasets[0].get('pipeline', []) if datasets else []:
        if transform.type.rpartition('.')[2] == 'Resize' and 'scale' in transform:
            width, height = transform.scale
            if transform.get('keep_ratio'):
                width, height = max(width, height), min(width, height)
            divisor = cfg.model.get('data_preprocessor', {}).get('pad_size_divisor', 1)
            return _round_up(height, divisor), _round_up(width, divisor)
    raise UserError(
        f'{name}: its test pipeline has no Resize with a scale, so the image has no known size: '
        'give it, --shape HEIGHT WIDTH'
    )


def sample_of(height: int, width: int) -> DetDataSample:
    """What a detector wants to know of an image of this size."""
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
        name: what the table calls it.

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

    A two-stage detector gets as many proposals as its test_cfg allows: with fewer found in an image it would look
    cheaper than another detector.

    Args:
        detector: in eval mode.
        image: (1, 3, H, W).
        samples: the image's data sample, in a list.
    """
    return int(_counter(detector, image, samples).total())


def interleaved_speeds(forwards: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Calls a second of each function: the median of rounds that take turns, so that a slow moment meets all."""
    times: dict[str, list[float]] = {name: [] for name in forwards}
    for i in range(rounds + 2):
        for name, forward in forwards.items():
            _synchronize()
            start = time.perf_counter()
            forward()
            _synchronize()
            if i >= 2:  # the first two warm up
                times[name].append(time.perf_counter() - start)
    return {name: 1 / statistics.median(values) for name, values in times.items()}


def peak_memory(function: Callable[[], object], device: str = 'cpu') -> int:
    """The most bytes that a call's tensors take at once, beyond what was there before.

    PyTorch's allocator counts them on a GPU, its profiler on a CPU. Neither counts what libraries (cuDNN, oneDNN)
    take for themselves.
    """
    gc.collect()  # what is freed meanwhile would count as less taken
    if str(device).startswith('cuda'):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        function()
    taken = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == '[memory]']
    for event in sorted(events, key=lambda event: event.start_ns()):
        taken += event.nbytes()
        peak = max(peak, taken)
    return peak


# The tables


def markdown(rows: Sequence[Complexity]) -> str:
    """The table of several networks, one row each; columns that were not measured are left out."""
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
    """The table, each network's stages, and what the columns mean."""
    parts = [markdown(rows), f'{notes(rows, rounds, device)}\n']
    parts += [f"CBAM's share of each stage of {row.name}:\n\n{stages_markdown(row)}" for row in rows if row.stages]
    return '\n'.join(parts)


def as_csv(rows: Sequence[Complexity]) -> str:
    """All of it with plain numbers: a line for each network, and one for each of its stages."""
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
    """What the columns mean."""
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
    """A network as a function of the image alone, as tracing wants it."""

    def __init__(self, network: nn.Module, samples: list) -> None:
        super().__init__()
        self.network = network
        self.samples = samples

    def forward(self, image: Tensor) -> object:
        return self.network(image, self.samples, mode='tensor')


def _counter(network: nn.Module, image: Tensor, samples: list) -> FlopAnalyzer:
    counter = FlopAnalyzer(_RawOutputs(network, samples), (image,))
    counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    # With gradients the trace would hide what CBAM's own function does.
    with torch.no_grad(), _all_proposals(network), warnings.catch_warnings():
        warnings.simplefilter('ignore', torch.jit.TracerWarning)
        counter.total()  # it is traced here, and remembered
    return counter


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
        stage = None, None
        if holders[holder] == 1 and holder not in cbams:
            stage = _parameters(network.get_submodule(holder)), int(by_module[f'network.{holder}'])
        parameters = sum(_parameters(cbams[path]) for path in paths)
        flops = int(sum(by_module[f'network.{path}'] for path in paths))
        stages.append(Stage(holder, size, len(paths), parameters, flops, *stage))
    return stages


def _note_size(sizes: dict[str, tuple[int, int]], path: str) -> Callable:
    def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        sizes[path] = tuple(int(length) for length in output.shape[2:])  # in a trace they are tensors

    return hook


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _forward(raw: nn.Module, image: Tensor) -> None:
    with torch.no_grad():
        raw(image)


def _forward_and_backward(raw: nn.Module, image: Tensor) -> None:
    # Any loss that every output takes part in keeps what training keeps.
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

"""Write a detector as an ONNX file, and read what such a file says of itself."""

from __future__ import annotations

import inspect
import io
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmcv import transforms
from mmdet.datasets.transforms import LoadAnnotations, PackDetInputs, Pad, Resize
from mmdet.utils import get_test_pipeline_cfg
from mmengine.config import Config, ConfigDict
from torch import nn

from cbam_mmdet.datasets.transforms.loading import LoadCheckedImage
from cbam_mmdet.deploy.graph import DetectorGraph
from cbam_mmdet.deploy.packages import require_packages
from cbam_mmdet.deploy.pixels import Pixels
from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.config import class_of, set_default_scope
from cbam_mmdet.utils.files import AtomicLocalBackend
from cbam_mmdet.utils.text import abridge, brief
from cbam_mmdet.version import __version__

OPSET = 17
INPUT = 'images'
TRACED = (2, 192, 256)  # images, height and width that are traced where they may differ in use
# Operators that square or add up, and those that may follow before a norm divides by the root.
SUMS = ('Pow', 'ReduceL2', 'ReduceLogSumExp', 'ReduceSum', 'ReduceSumSquare')
AFTER_SUMS = (*SUMS, 'Add', 'Cast', 'Clip', 'Div', 'Expand', 'Max', 'Reciprocal', 'ReduceMean', 'Sqrt')


def write_onnx(
    model: nn.Module,
    out: str | Path,
    *,
    fixed_size: tuple[int, int] | None = None,
    fixed_batch: int | None = None,
    float_input: bool = False,
    half: bool = False,
) -> None:
    """Write a detector as one graph of standard ONNX operators, of opset 17.

    Its input `images` is (B, H, W, 3), BGR, 0 to 255, and its outputs are those of deploy.graph.DetectorGraph: `boxes`,
    `scores`, `labels`, and `masks` of a detector that has them. Its metadata say the class names, mean, std, and more.

    Args:
        model: a detector from apis.infer.load_detector, on the CPU.
        out: the file to write.
        fixed_size: the one height and width of the images, for runtimes that need it. By default any.
        fixed_batch: the one number of images. By default any.
        float_input: images are float32, not uint8.
        half: weights and most of the computation in float16.

    Raises:
        UserError: for a detector that cannot be exported, or a missing package.
    """
    require_packages('onnx', *(['onnxruntime'] if half else []))
    import onnx

    graph = DetectorGraph(model).eval()
    if fixed_size is None:
        _require_any_size(graph)
    resize = resize_of(model.cfg)
    usual = TRACED[1:] if resize['keep_ratio'] or not resize['scale'] else resize['scale'][::-1]
    batch, height, width = (fixed_batch or TRACED[0], *(fixed_size or usual))
    dtype = torch.float32 if float_input else torch.uint8
    images = torch.randint(0, 256, (batch, height, width, 3), generator=torch.Generator().manual_seed(0)).to(dtype)
    free = {} if fixed_batch else {0: 'batch'}
    axes = {INPUT: free | ({} if fixed_size else {1: 'height', 2: 'width'}), **dict.fromkeys(graph.outputs, free)}
    content = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        # The older exporter, which knows the operators of torchvision in every version of torch from 2.1 on.
        warnings.simplefilter('ignore')
        try:
            torch.onnx.export(
                graph,
                (images,),
                content,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=list(graph.outputs),
                dynamic_axes=axes,
                **_older_exporter(),
            )
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise UserError(
                f'{type(model).__name__} cannot be exported: a part of it has no ONNX operators ({brief(error)})'
            ) from error
    made = onnx.load_from_string(content.getvalue())
    foreign = sorted({f'{node.domain}::{node.op_type}' for node in made.graph.node if node.domain})
    if foreign:
        raise UserError(f'{type(model).__name__} cannot be exported: ONNX has no operator {abridge(foreign)}')
    made = _in_half_precision(made) if half else made
    facts = dict(**facts_of_model(model), mask_threshold=_mask_threshold(model), half=half)
    onnx.helper.set_model_props(made, {key: json.dumps(value) for key, value in facts.items()})
    onnx.checker.check_model(made)
    AtomicLocalBackend().put(made.SerializeToString(), out)


def _require_any_size(graph: DetectorGraph) -> None:
    """Refuse timm's convolutions with TensorFlow's padding on inputs whose size is no multiple of their strides.

    How much they pad depends on the input's size, and the graph keeps what it was for the size that was traced. MMCV's
    are refused altogether: they write the size itself into the graph.
    """
    if any(type(module).__name__ == 'Conv2dAdaptivePadding' for module in graph.model.modules()):
        raise UserError(
            "the backbone's Conv2dAdaptivePadding pads by the size of the image, which a graph for any size cannot do: "
            'give --fixed-size'
        )
    strides = [max(m.stride) for m in graph.model.modules() if type(m).__name__ in ('Conv2dSame', 'Conv2dSameExport')]
    stride = math.prod(strides)
    if graph.pixels.divisor % stride:
        raise UserError(
            "the backbone's convolutions pad by the size of the image, which a graph for any size cannot do: set "
            f'model.data_preprocessor.pad_size_divisor={stride} (it is {graph.pixels.divisor}), as for the training, '
            'or give --fixed-size'
        )


def _older_exporter() -> dict[str, Any]:
    return dict(dynamo=False) if 'dynamo' in inspect.signature(torch.onnx.export).parameters else {}


def _in_half_precision(model: Any) -> Any:
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    # Coordinates and scores stay in float32, and norms: sums of squares exceed the largest number of float16, 65504.
    blocked = [*DEFAULT_OP_BLOCK_LIST, 'RoiAlign', 'NonMaxSuppression', 'TopK', 'Range', 'Cast', 'Where', 'ScatterND']
    blocked += [*SUMS, 'InstanceNormalization', 'LayerNormalization', 'GroupNormalization']
    inside = _nodes_of_the_network(model.graph) - _nodes_of_norms(model.graph)
    outside = [node.name for node in model.graph.node if node.name not in inside]
    half = convert_float_to_float16(model, keep_io_types=True, op_block_list=blocked, node_block_list=outside)
    _remove_detours(half.graph)
    made = OnnxModel(half)
    made.prune_graph()
    made.topological_sort()  # the conversion appends its casts at the end
    return made.model


def _nodes_of_the_network(graph: Any) -> set[str]:
    """The names of the nodes whose results are features that reach a convolution or a product with weights.

    All others work on boxes and scores, also those that say from where RoiAlign takes features.
    """
    # The inputs that are features, of operators that also take a place, a shape or a choice.
    data = ('RoiAlign', 'Gather', 'GatherElements', 'GatherND', 'Reshape', 'Expand', 'Slice', 'Resize')
    features = {**dict.fromkeys(data, slice(1)), **dict.fromkeys(('Cast', 'Shape'), slice(0))}
    features |= {'Where': slice(1, 3), 'ScatterND': slice(0, 3, 2)}
    makers = {name: node for node in graph.node for name in node.output}
    found: set[str] = set()
    left = [node for node in graph.node if node.op_type in ('Conv', 'ConvTranspose', 'Gemm', 'MatMul')]
    while left:
        node = left.pop()
        if node.name not in found:
            found.add(node.name)
            left += [makers[name] for name in node.input[features.get(node.op_type, slice(None))] if name in makers]
    return found


def _nodes_of_norms(graph: Any) -> set[str]:
    """The names of the nodes between a sum of squares and the division by its root, this one included."""
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    found: set[str] = set()
    left = [node for node in graph.node if node.op_type in SUMS or _squares(node)]
    while left:
        node = left.pop()
        if node.name not in found:
            found.add(node.name)
            if node.op_type not in ('Div', 'Reciprocal'):
                left += [user for name in node.output for user in users.get(name, ()) if user.op_type in AFTER_SUMS]
    return found


def _squares(node: Any) -> bool:
    return node.op_type == 'Mul' and node.input[0] == node.input[1]


def _remove_detours(graph: Any) -> None:
    """Let nodes in float32 take their input from each other. The conversion puts casts to float16 and back between."""
    from onnx import TensorProto

    def is_cast(node: Any, to: int) -> bool:
        return node is not None and node.op_type == 'Cast' and node.attribute[0].i == to

    makers = {name: node for node in graph.node for name in node.output}
    origin = {
        node.output[0]: makers[node.input[0]].input[0]
        for node in graph.node
        if is_cast(node, TensorProto.FLOAT) and is_cast(makers.get(node.input[0]), TensorProto.FLOAT16)
    }
    for node in graph.node:
        for i, name in enumerate(node.input):
            while name in origin:
                name = origin[name]
            node.input[i] = name


def facts_of_model(model: nn.Module) -> dict[str, Any]:
    """What a program must know that runs an exported file: class names, how to resize an image, and more."""
    pixels = Pixels(model.data_preprocessor)
    return dict(
        classes=list(model.dataset_meta['classes']),
        mean=pixels.mean.flatten().tolist(),
        std=pixels.std.flatten().tolist(),
        channels='RGB' if pixels.swaps_channels else 'BGR',
        config=Path(model.cfg.filename or 'config').name,
        **resize_of(model.cfg),
        cbam_mmdet=__version__,
    )


# The steps that a program of a few lines can do, each with the settings that may have any value.
_LOAD = frozenset({'backend_args', 'file_client_args', 'on_error'})
_RESIZE = frozenset({'scale', 'keep_ratio', 'clip_object_border'})
_PAD = frozenset({'size', 'pad_val'})
_PLAIN = {
    transforms.LoadImageFromFile: _LOAD,
    LoadCheckedImage: _LOAD,
    Resize: _RESIZE,
    transforms.Resize: _RESIZE,
    Pad: _PAD,
    transforms.Pad: _PAD,
}
_NOT_OF_THE_IMAGE = LoadAnnotations, transforms.LoadAnnotations, PackDetInputs


def resize_of(cfg: Config) -> dict[str, Any]:
    """How the test pipeline makes the network's input of an image.

    `scale`, (width, height), and `keep_ratio`; then `pad_to`, (width, height) or None, and `pad_value`, one for each
    channel. For a pipeline that does anything else `scale` is None, and `pipeline` says its steps.
    """
    set_default_scope(cfg)
    with transforms.TRANSFORMS.switch_scope_and_registry(None) as registry:
        classed = [(class_of(registry, step['type']), step) for step in get_test_pipeline_cfg(cfg)]
    steps = [(cls, step) for cls, step in classed if cls not in _NOT_OF_THE_IMAGE]
    resize, pad = (steps[i][1] if len(steps) > i else {} for i in (1, 2))
    scale, pad_to, value = _pair(resize.get('scale')), _pair(pad.get('size')), _three(pad.get('pad_val', 0))
    plain = [_PLAIN.get(cls) if _is_plain(cls, step) else None for cls, step in steps]
    known = plain in ([_LOAD, _RESIZE], [_LOAD, _RESIZE, _PAD])
    if known and scale and value and bool(pad) == bool(pad_to):
        return dict(scale=scale, keep_ratio=bool(resize.get('keep_ratio')), pad_to=pad_to, pad_value=value)
    told = [{**step, 'type': getattr(cls, '__name__', str(step['type']))} for cls, step in steps]
    return dict(scale=None, keep_ratio=False, pad_to=None, pad_value=[0] * 3, pipeline=json.dumps(told, default=str))


def _is_plain(cls: type | None, step: ConfigDict) -> bool:
    """Whether a step is one of _PLAIN, no derived class, and its other settings have their defaults."""
    if cls not in _PLAIN:
        return False
    defaults = {key: it.default for key, it in inspect.signature(cls).parameters.items()}
    return all(
        key in defaults and value == defaults[key] for key, value in step.items() if key not in {'type', *_PLAIN[cls]}
    )


def _pair(value: Any) -> list[int] | None:
    """Width and height. As in mmcv, one number is both."""
    pair = [value] * 2 if isinstance(value, int) else value
    whole = isinstance(pair, (list, tuple)) and len(pair) == 2 and all(type(v) is int and v > 0 for v in pair)
    return list(pair) if whole else None


def _three(value: Any) -> list[float] | None:
    """What mmcv's Pad writes into each channel. Of a float OpenCV fills the first channel alone: it is not plain."""
    value = value.get('img', 0) if isinstance(value, dict) else value
    three = (value,) * 3 if type(value) is int else value
    plain = isinstance(three, (list, tuple)) and len(three) == 3 and all(type(v) in (int, float) for v in three)
    return list(three) if plain else None


def _mask_threshold(model: nn.Module) -> float | None:
    test_cfg = getattr(getattr(model, 'roi_head', None), 'test_cfg', None) or {}
    return test_cfg.get('mask_thr_binary')


def open_session(path: str | Path) -> Any:
    """An onnxruntime.InferenceSession on the CPU for a file.

    Raises:
        UserError: if it is no ONNX file, or the package is not installed.
    """
    require_packages('onnxruntime')
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    except Exception as error:  # onnxruntime has an exception for each kind of failure, of no common class
        raise UserError(
            f'{path} is not an ONNX file that onnxruntime can run ({str(error).splitlines()[0]})'
        ) from error


def facts_of(session: Any, path: str | Path) -> dict[str, Any]:
    """What a file says of itself: `classes`, `mean`, `std`, `channels`, `config`, `mask_threshold`, ...

    Raises:
        UserError: if this package did not write it.
    """
    try:
        facts = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
        names = facts['classes']
    except (KeyError, ValueError, RecursionError) as error:
        raise UserError(f'{path} does not say its classes: tools/export.py has not written it') from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f'{path} does not say its classes as a list of names')
    named = [node.name for node in (*session.get_inputs(), *session.get_outputs())]
    if named[:4] != [INPUT, 'boxes', 'scores', 'labels']:
        raise UserError(
            f'{path} takes and gives {", ".join(named)}, where a detector of tools/export.py takes {INPUT} and gives '
            'boxes, scores and labels'
        )
    return facts


def require_same_resize(cfg: Config, facts: dict[str, Any], path: str | Path) -> None:
    """Refuse a config whose test pipeline makes another input of an image than the file was exported for.

    Raises:
        UserError: for another size, ratio or padding.
    """
    here, there = resize_of(cfg), dict(facts)
    if 'pad_value' in there:  # which earlier versions wrote as one number for all channels
        there['pad_value'] = _three(there['pad_value'])
    keys = ('pipeline',) if here['scale'] is None and there.get('scale') is None else tuple(here)
    other = [key for key in keys if key in here and key in there and here[key] != there[key]]
    if other:
        key = other[0]
        raise UserError(
            f"{path} was exported for {key}={there[key]} of the test pipeline, and the config's is {here[key]}: the "
            'detector would see other images. Give the config that it was exported with, or export it anew'
        )


def run_session(session: Any, images: np.ndarray) -> list[np.ndarray]:
    """The outputs for (B, H, W, 3) images, as the file's input wants them.

    Raises:
        UserError: for images of another size than a file of a fixed size takes.
    """
    given = session.get_inputs()[0]
    fixed = {i: size for i, size in enumerate(given.shape) if isinstance(size, int)}
    if any(images.shape[i] != fixed.get(i, images.shape[i]) for i in (1, 2)):
        raise UserError(
            f'the ONNX file takes images of {given.shape[2]} x {given.shape[1]} pixels only, and this one is '
            f'{images.shape[2]} x {images.shape[1]}: export it without --fixed-size, or give it images of that size'
        )
    count = len(images)
    if fixed.get(0, count) > count:  # a file of a fixed batch detects in copies, too
        images = np.concatenate([images, np.repeat(images[-1:], fixed[0] - count, 0)])
    wanted = np.float32 if 'float' in given.type else np.uint8
    if wanted is np.uint8 and images.dtype != np.uint8:  # of a pipeline with to_float32
        images = images.round().clip(0, 255)
    return [output[:count] for output in session.run(None, {INPUT: images.astype(wanted)})]

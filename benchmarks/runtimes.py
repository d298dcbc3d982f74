"""The time of a detector in PyTorch, onnxruntime and OpenVINO on a CPU, plain and with CBAM.

    python benchmarks/runtimes.py --out benchmarks/results/runtimes_cpu

The detectors of a pair have the same random weights, and CBAM's gates start as 1: they find the same proposals, so both
do the same work behind the backbone. All variants take turns, one image each; the figures are medians. OpenVINO is left
out where it is not installed.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from record import keep_freed_memory, machine, rotated, write

import cbam_mmdet
from cbam_mmdet.deploy.export import detect
from cbam_mmdet.deploy.onnx_file import INPUT, write_onnx

PAIRS = {
    'EfficientNet-Lite0, 320 x 256': ('faster_rcnn_effnet_lite0', (256, 320)),
    'ResNet-50, 640 x 512': ('faster_rcnn_r50', (512, 640)),
}


def build(name: str, weights: dict[str, torch.Tensor] | None = None) -> torch.nn.Module:
    """The detector of a shipped config, with random weights or, but for CBAM's, with those of its plain twin."""
    cfg = Config.fromfile(cbam_mmdet.config_path(f'{name}.py'))
    for part in (cfg.model.backbone, cfg.model.backbone.get('backbone') or {}):
        part.update(init_cfg=None) if part else None
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).eval()
    if weights:
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected and all('cbam' in name for name in missing), (missing, unexpected)
    model.cfg, model.dataset_meta = cfg, dict(classes=tuple(str(i) for i in range(80)))
    return model


def runtimes(model: torch.nn.Module, image: np.ndarray, folder: Path) -> dict[str, Callable[[], object]]:
    """For each runtime a function that detects in the image."""
    file = folder / 'detector.onnx'
    write_onnx(model, file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=['CPUExecutionProvider'])
    made = {
        'PyTorch': lambda: detect(model, [image]),
        'onnxruntime': lambda: session.run(None, {INPUT: image[None]}),
    }
    if find_spec('openvino'):
        import openvino

        hints = {'INFERENCE_PRECISION_HINT': 'f32', 'INFERENCE_NUM_THREADS': torch.get_num_threads()}
        compiled = openvino.Core().compile_model(str(file), 'CPU', hints)
        made['OpenVINO'] = lambda: compiled(image[None])
    return made


def measure(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median milliseconds of each. They take turns, each time in another order."""
    for function in functions.values():
        function(), function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds):
        for name in rotated([*functions], turn):
            start = time.perf_counter()
            functions[name]()
            times[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path)
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--threads', type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    kept = keep_freed_memory()
    record = dict(
        **machine('benchmarks/runtimes.py', 'onnxruntime', 'openvino'),
        threads=args.threads,
        memory_is_kept=kept,
        rows=[],
    )
    for label, (name, size) in PAIRS.items():
        image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
        functions, weights = {}, None
        with tempfile.TemporaryDirectory() as folder:
            for kind in ('plain', 'CBAM'):
                place = Path(folder, kind)
                place.mkdir()
                model = build(name if kind == 'plain' else f'{name}_cbam', weights)
                weights = model.state_dict()
                functions.update({(runtime, kind): f for runtime, f in runtimes(model, image, place).items()})
            times = measure(functions, args.rounds)
        for runtime in dict.fromkeys(runtime for runtime, _ in functions):
            plain, ours = times[runtime, 'plain'], times[runtime, 'CBAM']
            cost = f'{100 * (ours / plain - 1):+.1f} %'
            record['rows'].append(
                dict(detector=label, runtime=runtime, plain_ms=plain, with_cbam_ms=ours, cbam_costs=cost)
            )
    bars = {kind: [row[f'{kind}_ms'] for row in record['rows']] for kind in ('plain', 'with_cbam')}
    write(record, args.out, [f'{row["runtime"]}\n{row["detector"]}' for row in record['rows']], bars, 'milliseconds')


if __name__ == '__main__':
    main()

"""Write a detector's backbone and neck as a program of torch.export."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import cv2
import torch
from torch import Tensor, nn

from cbam_mmdet.compat.torch import HAS_CUSTOM_OPERATORS
from cbam_mmdet.datasets.transforms.loading import read_image
from cbam_mmdet.deploy.onnx_file import facts_of_model
from cbam_mmdet.deploy.pixels import Pixels
from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.files import AtomicLocalBackend
from cbam_mmdet.utils.text import brief

FACTS = 'facts.json'  # the file in the program that says the class names, mean, std, and more


class Features(nn.Module):
    """A detector from pixels (B, H, W, 3) to the feature maps of its neck, or of its backbone without one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.pixels = Pixels(model.data_preprocessor)
        self.backbone = model.backbone
        self.neck = model.neck if model.with_neck else nn.Identity()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.neck(self.backbone(self.pixels(images))))


def export_features(
    model: nn.Module, out: str | Path, size: tuple[int, int], files: Sequence[str | Path], batch: int | None = None
) -> float:
    """Write backbone and neck as a program of PyTorch's own operators, which runs where only torch is installed.

    Its input is (B, H, W, 3), BGR, 0 to 255, uint8. `torch.export.load(out)` reads it; its extra file `facts.json` says
    the class names, mean, std, and more.

    Args:
        model: a detector from apis.infer.load_detector, on the CPU.
        out: the file to write.
        size: height and width of the images. A network that pads by the size of its input has no graph for all sizes.
        files: images, one or more, to compare the written file with the detector on.
        batch: the one number of images. By default any.

    Returns:
        The largest difference of a feature from the detector's own, as a part of its map's largest value.

    Raises:
        UserError: before torch 2.4, for a network that torch.export cannot follow, or an image that cannot be read.
    """
    if not HAS_CUSTOM_OPERATORS:
        raise UserError(f'a .pt2 file needs torch 2.4 or later, this is {torch.__version__}; a .onnx file does not')
    if not hasattr(model, 'backbone'):
        raise UserError(f'{type(model).__name__} has no backbone of its own, whose features could be exported')
    features = Features(model).eval()
    images = torch.zeros((batch or 2, *size, 3), dtype=torch.uint8)
    free = None if batch else ({0: torch.export.Dim('batch', min=1, max=4096)},)
    try:
        with torch.no_grad():
            program = torch.export.export(features, (images,), dynamic_shapes=free, strict=False)
    except Exception as error:  # torch.export has an exception for each kind of failure, of no common class
        raise UserError(
            f'torch.export cannot follow {type(model.backbone).__name__} and {type(features.neck).__name__} '
            f'({brief(f"{type(error).__name__}: {error}")})'
        ) from error
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={FACTS: json.dumps(facts_of_model(model))})
    AtomicLocalBackend().put(content.getvalue(), out)
    content.seek(0)
    with warnings.catch_warnings():
        # torch reads the weights in place, and warns that they cannot be written to.
        warnings.filterwarnings('ignore', message='The given buffer is not writable')
        written = torch.export.load(content).module()
    pictures = [torch.from_numpy(cv2.resize(read_image(str(file)), size[::-1])) for file in files]
    with torch.no_grad():
        gaps = [_differences(features, written, picture.expand(batch or 1, -1, -1, -1)) for picture in pictures]
        return float(torch.cat(gaps).amax())  # NaN, if one of them is


def _differences(features: nn.Module, written: nn.Module, images: Tensor) -> Tensor:
    pairs = [*zip(features(images), written(images), strict=True)]
    tiny = torch.finfo(torch.float32).tiny
    return torch.stack([(ours - theirs).abs().amax() / ours.abs().amax().clamp(min=tiny) for ours, theirs in pairs])

"""Load an image, or name the one that cannot be loaded."""

from __future__ import annotations

import io
import itertools
import os
import warnings

import cv2
import mmcv
import mmengine.fileio as fileio
import numpy as np
from mmcv.transforms import LoadImageFromFile
from mmengine.logging import print_log
from mmengine.registry import TRANSFORMS
from PIL import Image

from cbam_mmdet.compat.patches import replaced
from cbam_mmdet.errors import UserError

# Other flags of mmcv.imfrombytes for the image as it is stored, without the turn that its EXIF data ask for.
AS_STORED = {'color': 'color_ignore_orientation', 'grayscale': 'grayscale_ignore_orientation'}
MAX_PIXELS = int(os.environ.get('CBAM_MAX_PIXELS', 2**28))
# The last bytes of a complete JPEG and of a complete PNG.
END_MARKERS = (b'\xff\xd9', b'IEND\xaeB`\x82')


@TRANSFORMS.register_module()
class LoadCheckedImage(LoadImageFromFile):
    """MMCV's LoadImageFromFile, which names the file when it is missing, truncated or not an image.

    OpenCV fills the missing part of a truncated JPEG with grey and reports nothing. So a file without its end marker is
    decoded a second time by Pillow, which reports it.

    Args:
        on_error: 'raise', or 'skip' to log the file's name once and return None, for which MMEngine's data sets take
            another image.
        **kwargs: those of LoadImageFromFile.

    Raises:
        UserError: in `transform`, for an image that cannot be read, if on_error is 'raise'.
    """

    def __init__(self, on_error: str = 'raise', **kwargs) -> None:
        super().__init__(**kwargs)
        self.on_error = on_error
        self.reported: set[str] = set()

    @classmethod
    def like(cls, loader: LoadImageFromFile, on_error: str) -> LoadCheckedImage:
        """A transform with the settings of another loader."""
        keys = ('to_float32', 'color_type', 'imdecode_backend', 'backend_args')
        return cls(on_error, **{key: getattr(loader, key) for key in keys})

    def transform(self, results: dict) -> dict | None:
        path = results['img_path']
        try:
            annotated = _annotated_size(results)
            image = read_image(path, self.color_type, self.imdecode_backend, self.backend_args, annotated)
            _check_size(path, image, annotated)
        except UserError as error:
            if self.on_error == 'raise':
                raise
            if path not in self.reported:
                self.reported.add(path)
                print_log(f"{error} Skipped (broken_images='skip').", logger='current', level=30)
            return None
        results['img'] = image.astype(np.float32) if self.to_float32 else image
        results['img_shape'] = results['ori_shape'] = image.shape[:2]
        return results


def _annotated_size(results: dict) -> tuple[int, int] | None:
    size = results.get('height'), results.get('width')
    return None if None in size else size


def _check_size(path: str, image: np.ndarray, annotated: tuple[int, int] | None) -> None:
    if annotated and annotated != image.shape[:2]:
        raise UserError(
            f'image {path} has {image.shape[1]}x{image.shape[0]} pixels, '
            f'its annotation says {annotated[1]}x{annotated[0]}: was one of them resized? The boxes would not fit.'
        )


def read_image(
    path: str,
    color_type: str = 'color',
    backend: str = 'cv2',
    backend_args: dict | None = None,
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Read an image, by default as (H, W, 3) uint8, BGR.

    A camera may store an image on its side, and say in its EXIF data how to turn it. OpenCV turns it. Some annotation
    tools do not, and the boxes they write are of the image as it is stored.

    Args:
        path: the file.
        color_type: the flag of mmcv.imfrombytes.
        backend: what decodes it, see mmcv.imfrombytes.
        backend_args: where it is, see mmengine.fileio.get.
        size: (height, width) as the annotation says. An image that has it only as it is stored is not turned.

    Raises:
        UserError: if the file is missing, truncated, not an image, or has more than MAX_PIXELS. The message names it.
    """
    data = _read_bytes(path, backend_args)
    _refuse_huge(path, data)
    image = _decode(path, data, color_type, backend) if _is_complete(path, data) else None
    if image is not None and size and size == image.shape[1::-1] != image.shape[:2] and color_type in AS_STORED:
        image = _decode(path, data, AS_STORED[color_type], backend)
        _say_once(path)
    if image is None:
        raise UserError(f'image {path} is not an image that OpenCV can read.')
    return image


_turns = itertools.count()


def _say_once(path: str) -> None:
    if next(_turns) == 0:
        print_log(
            f'image {path} has its boxes in the frame in which it is stored, by the size that its annotation says: '
            'like others of its kind it is not turned by its EXIF orientation.',
            logger='current',
        )


def _read_bytes(path: str, backend_args: dict | None) -> bytes:
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f'image {path} is no file (but a folder, a device or a pipe).')
        data = fileio.get(path, backend_args=backend_args)
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        raise UserError(f'image {path} cannot be read: {getattr(error, "strerror", None) or error}.') from error
    if not data:
        raise UserError(f'image {path} is empty.')
    return data


def _decode(path: str, data: bytes, flag: str, backend: str) -> np.ndarray | None:
    try:
        return mmcv.imfrombytes(data, flag=flag, backend=backend)
    except cv2.error as error:
        raise UserError(f'image {path} cannot be decoded by OpenCV ({error.err}).') from error


def _refuse_huge(path: str, data: bytes) -> None:
    """A small file may be a picture of gigabytes. Its header says so before it is decoded."""
    try:
        with replaced(Image, MAX_IMAGE_PIXELS=None):  # Pillow's own limit, which is another one
            width, height = Image.open(io.BytesIO(data)).size
    except Exception:  # whatever Pillow cannot read: OpenCV may, by a limit of its own
        return
    if width * height > MAX_PIXELS:
        raise UserError(
            f'image {path} has {width}x{height} pixels by its header, and would take {3 * width * height / 2**30:.1f} '
            f'GiB. The limit is {MAX_PIXELS} pixels; the environment variable CBAM_MAX_PIXELS sets another one.'
        )


def _is_complete(path: str, data: bytes) -> bool:
    if data.rstrip(b'\0').endswith(END_MARKERS):
        return True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            Image.open(io.BytesIO(data)).load()
    except Image.UnidentifiedImageError:
        return _opencv_alone_reads(path, data)
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error and more for broken files
        raise UserError(f'image {path} is truncated or damaged ({error}).') from error
    return True


def _opencv_alone_reads(path: str, data: bytes) -> bool:
    """Whether OpenCV reads an image whose format Pillow does not know (HDR, EXR, PFM)."""
    return _decode(path, data, 'color', 'cv2') is not None

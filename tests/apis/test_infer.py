"""Detection on a user's own images: what is read, and the pictures."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import DEMO, ROOT, SMALL, cfg_options
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import nn

from cbam_mmdet.apis.infer import LEGIBLE, _Painter, load_detector
from cbam_mmdet.utils.config import load_config

WHERE = ['--device', 'cpu', '--score-thr', 0, *cfg_options(SMALL)]


def test_pictures_of_an_earlier_run_are_no_inputs(run_tool, trained, shapes, tmp_path):
    """They would be detected in, and the pictures of a run that follows be told from them by numbers alone."""
    photos = shutil.copytree(shapes / 'val2017', tmp_path / 'photos')
    count = len(list(photos.iterdir()))
    for out in (photos / 'out', photos):
        (photos / 'predictions.json').unlink(missing_ok=True)
        shutil.rmtree(photos / 'out', ignore_errors=True)
        first, second = (run_tool('infer.py', DEMO, trained, photos, '--out-dir', out, *WHERE) for _ in range(2))
        assert first.code == second.code == 0, first.err + second.err
        assert f'in {count} images' in first.out and 'left out' not in first.out + first.err
        assert f'in {count} images' in second.out and len(list((out / 'vis').iterdir())) == count
        said = second.out + second.err
        assert f'{count} images and videos below {out} are left out' in said
        assert f'the results of an earlier run in {out} are replaced' in said


@pytest.mark.parametrize(
    ('tool', 'name'), [('infer.py', 'vis/a.jpg'), ('gradcam.py', 'a.png'), ('attention_maps.py', 'vis/a.png')]
)
def test_no_picture_replaces_an_input(run_tool, trained, shapes, tmp_path, tool, name):
    image = tmp_path / name
    image.parent.mkdir(exist_ok=True)
    shutil.copy(next((shapes / 'val2017').iterdir()), image)
    before = image.read_bytes()
    where = WHERE if tool != 'attention_maps.py' else ['--device', 'cpu', *cfg_options(SMALL)]
    result = run_tool(tool, DEMO, trained, image, '--out-dir', tmp_path, *where)
    assert result.code == 2 and f'a picture would replace the input {image}' in result.err
    assert image.read_bytes() == before


def test_a_detector_of_grey_images_is_refused(run_tool, trained, shapes, tmp_path):
    """Its own loading is replaced by an image in memory, which is in colour."""
    grey = {'test_pipeline.0.color_type': 'grayscale', 'test_dataloader.dataset.pipeline.0.color_type': 'grayscale'}
    image = next((shapes / 'val2017').iterdir())
    result = run_tool('infer.py', DEMO, trained, image, '--out-dir', tmp_path, *WHERE, *cfg_options(grey)[1:])
    assert result.code == 2 and "reads images as color_type='grayscale'" in result.err


def test_boxes_at_the_edge_are_no_reason_to_warn(trained, shapes, tmp_path):
    """MMEngine's visualizer warns of each."""
    arguments = [DEMO, trained, shapes / 'val2017', '--out-dir', tmp_path, *WHERE]
    command = [sys.executable, ROOT / 'tools/infer.py', *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)  # pytest has filters of its own
    assert done.returncode == 0 and 'pictures: ' in done.stdout
    assert 'Warning' not in done.stderr, done.stderr


def test_a_config_without_a_test_pipeline(run_tool, trained, shapes, tmp_path):
    (tmp_path / 'config.py').write_text(
        f'_base_ = {DEMO!r}\ntest_dataloader = None\ntest_evaluator = None\ntest_cfg = None\n'
    )
    result = run_tool('infer.py', tmp_path / 'config.py', trained, shapes / 'val2017', *WHERE)
    assert result.code == 2 and 'Traceback' not in result.err
    assert 'config.py has no test pipeline' in result.err and 'test_dataloader is None' in result.err


def test_a_preprocessor_beside_the_model(trained):
    """MMEngine's Runner puts it into the model, so a training and a test have it."""
    cfg = load_config(str(next(trained.glob('*.py'))))
    inside = load_detector(cfg.copy(), str(trained), 'cpu').data_preprocessor
    cfg.data_preprocessor = cfg.model.pop('data_preprocessor')
    beside = load_detector(cfg, str(trained), 'cpu').data_preprocessor
    assert torch.equal(beside.mean, inside.mean) and beside.pad_size_divisor == inside.pad_size_divisor


@pytest.mark.parametrize('tool', ['infer.py', 'gradcam.py', 'attention_maps.py'])
def test_a_classifier_is_no_detector(run_tool, trained, shapes, tool):
    pytest.importorskip('mmpretrain')
    config = ROOT / 'configs/imagenet/resnet18_cbam_in1k.py'
    result = run_tool(tool, config, trained, shapes / 'val2017')
    assert result.code == 2 and 'Traceback' not in result.err
    assert 'is the config of a classifier' in result.err and 'expected that of a detector' in result.err


def test_a_small_image_is_drawn_larger():
    """Its labels would be as large as its objects."""
    model = nn.Module()
    model.dataset_meta = dict(classes=('star',), palette=[(255, 0, 0)])
    mask = torch.zeros(1, 48, 64, dtype=torch.bool)
    mask[:, 20:40, 10:30] = True
    found = InstanceData(
        bboxes=torch.tensor([[10.0, 20.0, 30.0, 40.0]]),
        labels=torch.tensor([0]),
        scores=torch.tensor([0.9]),
        masks=mask,
    )
    sample = DetDataSample(pred_instances=found)
    picture = _Painter(model, 0.5)(np.zeros((48, 64, 3), np.uint8), sample)
    factor = picture.shape[1] // 64
    assert picture.shape == (48 * factor, 64 * factor, 3) and LEGIBLE <= picture.shape[1] < LEGIBLE + 64
    rows, columns = np.nonzero(picture[:, :, 2] > 200)  # the box's edge
    box = np.array([columns.min(), rows.min(), columns.max(), rows.max()]) / factor
    assert np.allclose(box, [10, 20, 30, 40], atol=0.6)
    assert picture[30 * factor, 20 * factor].any() and not picture[10 * factor, 50 * factor].any()  # the mask
    assert sample.pred_instances.bboxes.tolist() == [[10.0, 20.0, 30.0, 40.0]]  # what is written is not enlarged

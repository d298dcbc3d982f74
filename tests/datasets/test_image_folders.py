"""ImageNet classification by the same tools, on a small ImageFolder, and its checkpoint in a detector."""

import json
import re
import shutil

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, forget_earlier_runs
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from cbam_mmdet import CBAM

pytest.importorskip('mmpretrain')
CONFIGS = ROOT / 'configs/imagenet'
# The paper's table 4: millions of parameters with CBAM.
PAPER = {
    'resnet18': 11.78, 'resnet34': 21.96, 'resnet50': 28.09, 'resnet101': 49.33, 'wide_resnet18_x1.5': 26.08,
    'wide_resnet18_x2.0': 45.97, 'resnext50_32x4d': 27.56, 'resnext101_32x4d': 48.96,
}  # fmt: skip


@pytest.fixture(autouse=True)
def mmdet_scope_afterwards():
    yield
    forget_earlier_runs()
    init_default_scope('mmdet')


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """6 classes of noise around a color each, 4 + 2 images of 40x32."""
    root = tmp_path_factory.mktemp('imagefolder')
    rng = np.random.default_rng(0)
    for split, count in (('train', 4), ('val', 2)):
        for i in range(6):
            folder = root / split / f'class{i}'
            folder.mkdir(parents=True)
            color = np.array([40 * i, 255 - 40 * i, 128])
            for j in range(count):
                image = np.clip(color + rng.normal(0, 10, (32, 40, 3)), 0, 255).astype(np.uint8)
                cv2.imwrite(str(folder / f'{j}.png'), image)
    return root


def options(*more):
    loaders = [f'{s}_dataloader.{key}' for s in ('train', 'val', 'test') for key in ('num_workers=0', 'batch_size=8')]
    return ['--cfg-options', 'train_cfg.max_epochs=1', *loaders, 'train_dataloader.dataset.pipeline.1.scale=32',
            'default_hooks.logger.interval=1', *more]  # fmt: skip


@pytest.mark.parametrize('name', PAPER)
def test_parameters_are_the_papers(name):
    cfg = Config.fromfile(CONFIGS / f'{name}_cbam_in1k.py')
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PAPER[name], abs=0.01)
    assert any(isinstance(module, CBAM) for module in model.modules())


def test_trains_tests_and_goes_into_a_detector(run_tool, folders, tmp_path):
    config = CONFIGS / 'resnet50_cbam_in1k.py'
    arguments = ['--data-root', folders, '--classes', 'auto', '--work-dir', tmp_path]
    result = run_tool('train.py', config, *arguments, *options())
    assert result.code == 0, result.err[-3000:]
    rows = [json.loads(line) for line in next(tmp_path.glob('*/vis_data/scalars.json')).read_text().splitlines()]
    scored = next(row for row in rows if 'error/top1' in row)
    assert scored['error/top1'] == pytest.approx(100 - scored['accuracy/top1'])
    assert scored['error/top5'] == pytest.approx(100 - scored['accuracy/top5'])
    result = run_tool('test.py', config, tmp_path, *arguments, *options())
    assert result.code == 0, result.err[-3000:]
    tested = json.loads(max(tmp_path.glob('*/*.json')).read_text())
    assert tested['error/top1'] == pytest.approx(scored['error/top1'])

    detector = Config.fromfile(ROOT / 'configs/faster_rcnn_r50_cbam.py').model
    init_default_scope('mmdet')
    detector.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'epoch_1.pth'), prefix='backbone.')
    backbone = MODELS.build(detector.backbone)
    weights = torch.load(tmp_path / 'epoch_1.pth', weights_only=False)['state_dict']
    inside = {key.removeprefix('backbone.'): value for key, value in weights.items() if key.startswith('backbone.')}
    assert inside.keys() == backbone.state_dict().keys()
    backbone.init_weights()
    assert all(torch.equal(value, inside[key]) for key, value in backbone.state_dict().items())


def test_a_basic_block_too(run_tool, folders, tmp_path):
    arguments = ['--data-root', folders, '--classes', 'auto', '--work-dir', tmp_path]
    assert run_tool('train.py', CONFIGS / 'resnet18_cbam_in1k.py', *arguments, *options()).code == 0
    weights = torch.load(tmp_path / 'epoch_1.pth', weights_only=False)['state_dict']
    detector = Config.fromfile(ROOT / 'configs/faster_rcnn_r18_cbam.py').model
    init_default_scope('mmdet')
    detector.backbone.backbone.init_cfg = None
    keys = {key.removeprefix('backbone.') for key in weights if key.startswith('backbone.')}
    assert keys == MODELS.build(detector.backbone).state_dict().keys()


def test_a_checkpoint_of_other_classes_is_refused(run_tool, folders, tmp_path):
    """Labels are places among the sorted folders, so the scores would be those of others."""
    config, trained = CONFIGS / 'resnet18_cbam_in1k.py', tmp_path / 'work'
    where = ['--classes', 'auto', '--work-dir', trained]
    assert run_tool('train.py', config, '--data-root', folders, *where, *options()).code == 0
    other = shutil.copytree(folders, tmp_path / 'data')
    for split in ('train', 'val'):
        (other / split / 'class0').rename(other / split / 'zebra')
    for tool, arguments in (
        ('test.py', [config, trained / 'epoch_1.pth']),
        ('train.py', [config, '--resume', trained / 'epoch_1.pth']),
    ):
        result = run_tool(tool, *arguments, '--data-root', other, *where, *options())
        assert result.code == 2 and 'Traceback' not in result.err, result.err
        assert re.search("knows the classes .*'class0', 'class1'.* data set has .*'class5', 'zebra'", result.err)
    load = options(f'load_from={trained / "epoch_1.pth"}')
    result = run_tool('train.py', config, '--data-root', other, '--classes', 'auto', '--work-dir', tmp_path / 'new',
                      *load)  # fmt: skip
    assert result.code == 0 and 'was trained on other classes (class0' in result.out + result.err
    names = [f'class{i}' for i in (1, 2, 3, 4, 5, 0)]
    result = run_tool('test.py', config, trained / 'epoch_1.pth', '--data-root', folders, *where,
                      *options(f'test_dataloader.dataset.metainfo.classes={names}'))  # fmt: skip
    assert result.code == 2 and 'another order' in result.err, result.err


@pytest.mark.parametrize(
    ('change', 'arguments', 'message'),
    [
        ('', [], '6 class folders.*num_classes is 1000: give --classes auto'),
        ('val', ['--classes', 'auto'], 'val does not exist; expected: .*val/CLASS'),
        ('val/class3', ['--classes', 'auto'], 'val has 5 class folders'),
        ('', ['--classes', 'a,b'], '--classes a,b: the class folders are class0, class1'),
    ],
)
def test_folders_that_do_not_fit(run_tool, folders, tmp_path, change, arguments, message):
    root = shutil.copytree(folders, tmp_path / 'data')
    if change:
        shutil.rmtree(root / change)
    result = run_tool(
        'train.py',
        CONFIGS / 'resnet18_cbam_in1k.py',
        '--data-root',
        root,
        *arguments,
        '--work-dir',
        tmp_path,
        *options(),
    )
    assert result.code == 2 and 'Traceback' not in result.err
    assert re.search(message, result.err), result.err

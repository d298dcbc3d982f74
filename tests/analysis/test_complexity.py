"""Complexity: the paper's own figures, counts by hand, and CBAM's share as the difference from the plain twin."""

import csv

import numpy as np
import pytest
import torch
from conftest import DEMO, ROOT
from mmcv.transforms import Compose
from mmdet.registry import TRANSFORMS
from mmengine.config import Config, ConfigDict
from torch import nn

from cbam_mmdet.analysis.complexity import count, input_size, measure, peak_memory
from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.config import load_config

PLAIN = str(ROOT / 'configs/demo/faster_rcnn.py')
SSD = str(ROOT / 'configs/ssd300_vgg16_voc0712.py')


@pytest.fixture
def paper_table():
    pytest.importorskip('mmpretrain')
    from cbam_mmdet.analysis import paper_table

    return paper_table


def check(rows):
    for row in rows:
        assert abs(row.parameter_difference) < 0.0101, row.name
        assert abs(row.flops_difference) < 0.005, row.name


def test_paper_figures(paper_table):
    names = [name for name in paper_table.PAPER if name[0] in ('ResNet-18', 'ResNet-50')]
    rows = paper_table.count_networks(names)
    assert len(rows) == 6
    check(rows)


@pytest.mark.slow
def test_every_paper_figure(paper_table):
    rows = paper_table.count_networks()
    assert len(rows) == 18
    check(rows)


def test_torchvision_counts_more_as_the_note_says(paper_table):
    """An independent ResNet-50, whose stride is in the 3x3 convolution."""
    from torchvision.models import resnet50

    counted = count(paper_table._Classifier(resnet50().eval()), torch.zeros(1, 3, 224, 224), [])
    assert counted.parameters == 25557032  # torchvision's documentation
    assert counted.flops_of_layers / 1e9 == pytest.approx(4.089, abs=6e-4)  # and its 4.09 GFLOPS
    assert '4.089' in paper_table.NOTES


@pytest.fixture(scope='module')
def demo():
    return measure(load_config(DEMO), 'demo', (64, 96)), measure(load_config(PLAIN), 'plain', (64, 96))


def test_cbams_share_is_what_the_plain_twin_lacks(demo):
    ours, plain = demo
    assert ours.cbams == 16 and plain.cbams == 0 and plain.stages == []
    assert ours.parameters - plain.parameters == ours.cbam_parameters
    assert ours.flops - plain.flops == ours.cbam_flops
    assert [stage.size for stage in ours.stages] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert [stage.name for stage in ours.stages] == [f'backbone.layer{i}' for i in (1, 2, 3, 4)]
    assert sum(stage.parameters for stage in ours.stages) == ours.cbam_parameters
    assert sum(stage.flops for stage in ours.stages) == ours.cbam_flops
    for stage, (blocks, channels) in zip(ours.stages, ((3, 64), (4, 128), (6, 256), (3, 512)), strict=True):
        hidden = channels // 4
        assert stage.cbams == blocks
        # Two linear layers with biases, a 7x7 convolution of two planes, a BatchNorm's weight and bias.
        assert stage.parameters == blocks * (2 * channels * hidden + hidden + channels + 98 + 2)


def test_norms_are_what_the_papers_count_leaves_out(demo):
    plain = demo[1]
    assert plain.flops - plain.flops_of_layers == sum(
        value for kind, value in plain.operators.items() if 'norm' in kind or 'upsample' in kind
    )


def test_peak_memory_of_a_net_counted_by_hand():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()).eval()
    image = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        assert peak_memory(lambda: net(image)) == 2 * 8 * 64 * 64 * 4  # both outputs are alive at once


@pytest.mark.parametrize('operator', ['attention', 'baddbmm'])
def test_products_that_mmengine_does_not_count(operator):
    class Products(nn.Module):
        def forward(self, x, samples, mode):
            q, k = x[:, :, :6], x
            if operator == 'attention':
                return nn.functional.scaled_dot_product_attention(q, k, k)
            return torch.baddbmm(x.new_zeros(1), q[0], k[0].transpose(1, 2))

    counted = count(Products().eval(), torch.rand(1, 3, 8, 16), [])
    once = 3 * 6 * 8 * 16  # of each of 6 queries with 8 keys of 16 numbers, in 3 heads
    assert counted.flops_of_layers == (2 * once if operator == 'attention' else once)


def test_image_size_is_the_test_pipelines():
    assert input_size(load_config(DEMO)) == (128, 128)
    assert input_size(load_config(str(ROOT / 'configs/faster_rcnn_r50_cbam.py'))) == (800, 1344)
    assert input_size(load_config(SSD)) == (300, 300)
    cfg = load_config(DEMO)
    cfg.data_preprocessor = cfg.model.pop('data_preprocessor')  # beside the model, where MMEngine's Runner finds it
    for step in cfg.test_dataloader.dataset.pipeline:
        step['type'] = TRANSFORMS.get(step['type'])  # as in MMEngine's configs of pure Python
    assert input_size(cfg) == (128, 128)
    with pytest.raises(UserError, match='--shape'):
        input_size(Config(dict(model=dict(type='X'))))


@pytest.mark.parametrize(
    ('pad', 'expected'),
    [
        (dict(size=(192, 160)), (160, 192)),  # width, height
        (dict(size_divisor=48), (144, 144)),
        (dict(size_divisor=48, pad_to_square=True), (144, 144)),
    ],
)
def test_the_size_of_an_image_that_the_pipeline_pads(pad, expected):
    cfg = load_config(DEMO)
    cfg.model.data_preprocessor.pad_size_divisor = 1
    pipeline = cfg.test_dataloader.dataset.pipeline
    pipeline.insert(2, ConfigDict(type='Pad', **pad))
    assert input_size(cfg) == expected
    padded = Compose(pipeline[1:3])(dict(img=np.zeros((128, 128, 3)), img_shape=(128, 128)))
    assert padded['img'].shape[:2] == expected


def test_the_size_of_an_image_that_is_resized_to_a_number():
    cfg = load_config(DEMO)
    resize = cfg.test_dataloader.dataset.pipeline[1]
    resize.update(scale=96, keep_ratio=False)
    padded = Compose([resize])(dict(img=np.zeros((50, 70, 3), np.uint8)))
    assert input_size(cfg) == padded['img'].shape[:2] == (96, 96)


def test_tool(run_tool, tmp_path):
    tables = [tmp_path / 'new/table.md', tmp_path / 'table.csv']
    result = run_tool(
        'complexity.py',
        DEMO,
        PLAIN,
        '--shape',
        64,
        64,
        '--throughput',
        2,
        '--memory',
        '--device',
        'cpu',
        '--out',
        *tables,
    )
    assert result.code == 0, result.err
    assert result.out == tables[0].read_text()
    rows = list(csv.DictReader(tables[1].open()))
    assert [row['config'] for row in rows if not row['stage']] == ['faster_rcnn_cbam', 'faster_rcnn']
    ours, plain = (row for row in rows if not row['stage'])
    assert float(ours['images_per_second']) > 0
    assert int(ours['training_bytes']) > int(ours['inference_bytes']) > 64 * 64 * 3 * 4
    assert int(ours['parameters']) - int(ours['cbam_parameters']) == int(plain['parameters'])


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['no.py'], "config 'no.py' does not exist"),
        ([DEMO, '--shape', '0', '5'], 'positive'),
        ([DEMO, '--paper'], 'give configs, or --paper'),
        ([], 'give configs, or --paper'),
        ([DEMO, '--out', 'table.txt'], '.md or .csv'),
        ([SSD, '--shape', '32', '32'], 'cannot be traced with an image of (32, 32)'),
    ],
)
def test_mistakes_end_in_one_message(run_tool, arguments, message):
    result = run_tool('complexity.py', *arguments)
    assert result.code == 2
    assert message in result.err
    assert 'Traceback' not in result.err

"""Attention maps: the table's figures by hand, over images of several sizes, and what the tool writes."""

import copy
import csv
import shutil

import cv2
import matplotlib
import numpy as np
import pytest
import torch
from mmdet.apis import inference_detector
from mmengine.config import Config
from PIL import Image

from cbam_mmdet.apis.infer import load_detector
from cbam_mmdet.datasets.transforms.arrays import array_pipeline
from cbam_mmdet.errors import UserError
from cbam_mmdet.models.gates import RecordedGates, record_gates
from cbam_mmdet.visualization.attention import GateAverage, attend, draw_gates, gates_over, stage_and_block


@pytest.fixture(scope='module')
def detector(trained):
    return load_detector(Config.fromfile(next(trained.glob('*.py'))), str(trained), 'cpu')


def test_average_by_hand():
    # Three channels: one moves by half, one by too little, one is shut.
    channel = [torch.tensor([0.2, 0.5, 0.01]), torch.tensor([0.7, 0.505, 0.01])]
    spatial = [torch.tensor([[0.1, 0.3], [0.5, 0.97]]), torch.full((2, 2), 0.4)]
    average = GateAverage('backbone.layer1.0.cbam', upper=1)
    for c, s in zip(channel, spatial, strict=True):
        average.add(RecordedGates(1, [c], [s]))
    of_channels, of_places = average.rows()
    for row, values in ((of_channels, channel), (of_places, spatial)):
        array = torch.stack(values).double().numpy()
        assert row.images == 2
        assert row.mean == pytest.approx(array.mean())
        assert row.spread == pytest.approx(array.std())
        assert row.closed == pytest.approx((array < 0.05).mean())
        assert row.open == pytest.approx((array > 0.95).mean())
        assert row.saturated == pytest.approx(row.closed + row.open)
        assert row.distance == pytest.approx(np.abs(array - 1).mean())
    assert of_channels.dead == pytest.approx(2 / 3)
    assert of_places.dead == 1 / 2, 'the second map is flat'
    torch.testing.assert_close(average.map, (spatial[0] + spatial[1]) / 2)
    assert average.counts.sum() == 6 and average.counts[0] == 2


def test_one_image_cannot_tell_a_dead_channel_and_sizes_may_differ():
    average = GateAverage('neck.cbam3', upper=2)
    average.add(RecordedGates(2, [torch.rand(4)], [torch.full((4, 6), 0.5)]))
    assert average.rows()[0].dead is None
    average.add(RecordedGates(2, [torch.rand(4)], [torch.full((9, 5), 1.5)]))
    torch.testing.assert_close(average.map, torch.ones(4, 6))


def test_maps_of_a_sheet_share_their_colours(tmp_path):
    """A flat gate looks like one that is flat at another value only where each map has a range of its own."""
    averages = []
    for value in (0.25, 0.75):
        average = GateAverage(f'backbone.layer1.{value}.cbam', upper=1)
        average.add(RecordedGates(1, [torch.rand(4)], [torch.full((8, 8), value)]))
        averages.append(average)
    drawn = cv2.imread(str(draw_gates(averages, tmp_path / 'sheet.png'))).reshape(-1, 3)
    viridis = matplotlib.colormaps['viridis']
    for end in (0.0, 1.0):
        colour = (np.array(viridis(end)[2::-1]) * 255).round()
        assert (np.abs(drawn - colour).max(1) <= 2).sum() > 1000, 'a whole panel'


def test_names():
    assert stage_and_block('backbone.layer1.0.cbam') == ('backbone.layer1', '0')
    assert stage_and_block('backbone.layer1.0.bn2.cbam') == ('backbone.layer1', '0.bn2')
    assert stage_and_block('backbone.features.3.cbam') == ('backbone.features', '3')
    assert stage_and_block('neck.cbam3') == ('neck', 'cbam3')


def test_padding_is_cut_off(detector):
    pipeline = array_pipeline(detector.cfg)
    square, wide = (
        gates_over(detector, np.full((height, 64, 3), 90, np.uint8), pipeline)['backbone.layer1.0.cbam']
        for height in (64, 36)
    )
    assert square.spatial[0].shape == (32, 32), 'of 128x128'
    assert wide.spatial[0].shape == (18, 32), 'of 72x128, which is padded to 96x128'
    padding = copy.deepcopy(detector.cfg)
    padding.test_dataloader.dataset.pipeline.insert(2, dict(type='Pad', size=(160, 128)))
    image = np.full((36, 64, 3), 90, np.uint8)
    padded = gates_over(detector, image, array_pipeline(padding))['backbone.layer1.0.cbam']
    assert padded.spatial[0].shape == (18, 32), 'of 72x128, which the pipeline pads to 128x160'


def test_a_border_on_all_sides_is_cut_off(detector):
    centred = copy.deepcopy(detector.cfg)
    load, resize, *_, pack = centred.test_dataloader.dataset.pipeline
    load.to_float32 = True
    pack.meta_keys = ('ori_shape', 'img_shape', 'scale_factor', 'border')
    pad = dict(ratios=None, border=None, mean=[0] * 3, std=[1] * 3, to_rgb=False, test_mode=True, test_pad_add_pix=0)
    pad.update(type='RandomCenterCropPad', test_pad_mode=['size_divisor', 64])
    centred.test_dataloader.dataset.pipeline = [load, resize, pad, pack]
    pipeline = array_pipeline(centred)
    image = np.random.default_rng(0).integers(0, 255, (36, 64, 3), dtype=np.uint8)
    with record_gates(detector) as recorded:
        inference_detector(detector, image, pipeline)
    whole = recorded['backbone.layer1.0.cbam'].spatial[0]
    assert whole.shape == (32, 32), 'of 72x128, with 28 above and below'
    np.testing.assert_array_equal(
        gates_over(detector, image, pipeline)['backbone.layer1.0.cbam'].spatial[0], whole[7:25]
    )


def test_images_of_a_validation_set_are_in_the_frame_of_their_annotation(detector, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (36, 64, 3), dtype=np.uint8)
    turned, plain = tmp_path / 'turned.png', tmp_path / 'plain.png'
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(turned, exif=exif)
    Image.fromarray(pixels).save(plain)
    found = {
        name: attend(detector, [file], tmp_path / name, sizes=sizes, pictures=0)
        for name, file, sizes in (
            ('plain', plain, None), ('stored', turned, {turned: (36, 64)}),
            ('shown', turned, {turned: (64, 36)}), ('unknown', turned, {turned: None}),
        )
    }  # fmt: skip
    assert found['stored'] == found['plain'] != found['shown'] == found['unknown']


def test_tool_on_a_folder_and_on_the_validation_set(run_tool, trained, shapes, tmp_path):
    config = next(trained.glob('*.py'))
    result = run_tool('attention_maps.py', config, trained, '--out-dir', tmp_path,
                      '--pictures', 1, '--device', 'cpu')  # fmt: skip
    assert result.code == 0, result.err
    written = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob('*.*')}
    assert written == {'vis/shapes_val_000000.png', 'average.png', 'gates.md', 'gates.csv', 'gates_by_image.csv'}
    assert cv2.imread(str(tmp_path / 'average.png')).std() > 10, 'something is drawn'
    with open(tmp_path / 'gates.csv') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 32 and {row['images'] for row in rows} == {'4'}
    with open(tmp_path / 'gates_by_image.csv') as file:
        single = list(csv.DictReader(file))
    assert len(single) == 4 * 32
    ours = [float(row['mean']) for row in single if row['name'] == rows[0]['name'] and row['gate'] == 'channel']
    assert np.mean(ours) == pytest.approx(float(rows[0]['mean']))
    assert (tmp_path / 'gates.md').read_text().split('\n\npictures')[0].strip() in result.out
    # The order that was, and options among the words.
    chosen = ['--config', config, '--out-dir', tmp_path / 'again', '--checkpoint', trained]
    again = run_tool('attention_maps.py', *chosen, shapes / 'val2017', '--device', 'cpu')
    assert again.code == 0, again.err
    assert (tmp_path / 'again/gates.md').read_text() == (tmp_path / 'gates.md').read_text()


def test_bad_input(run_tool, trained, shapes, tmp_path):
    config = next(trained.glob('*.py'))
    image = sorted((shapes / 'val2017').iterdir())[0]
    broken = tmp_path / 'broken.jpg'
    broken.write_bytes(b'no image')
    shutil.copy(image, tmp_path / 'film.avi')
    where = ['--device', 'cpu', '--out-dir', tmp_path / 'out']
    for arguments, message in (
        ([broken, *where], 'none of the 1 images can be read'),
        ([tmp_path / 'nowhere.jpg', *where], 'nowhere.jpg does not exist'),
        ([tmp_path / 'film.avi', *where], 'no image among them'),
        ([image, *where, '--cfg-options', 'model.backbone.plugins=None'], 'cbam'),
    ):
        result = run_tool('attention_maps.py', config, trained, *arguments)
        assert result.code == 2 and 'Traceback' not in result.err, result.err
        assert message in result.err.splitlines()[-1]


def test_a_plain_detector_has_no_gates(trained, shapes):
    cfg = Config.fromfile(next(trained.glob('*.py')))
    cfg.model.backbone.plugins = None
    from mmdet.apis import init_detector

    with pytest.raises(UserError, match='holds no CBAM'):
        plain = init_detector(cfg, None, device='cpu')
        gates_over(plain, np.zeros((64, 64, 3), np.uint8), array_pipeline(cfg))

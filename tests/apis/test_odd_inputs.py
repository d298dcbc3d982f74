"""Inputs of inference, of copied work dirs and of checkpoints that were wrong without a word, or ended everything."""

import json
import os
import shutil

import cv2
import numpy as np
import pytest
import torch
from conftest import DEMO, SMALL, cfg_options
from mmengine.config import Config

from cbam_mmdet.apis.infer import _require_frames
from cbam_mmdet.datasets.checks import check_data
from cbam_mmdet.datasets.convert import convert
from cbam_mmdet.engine.checkpoint.files import find_checkpoint
from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.config import load_config, set_default_scope


@pytest.fixture
def infer(run_tool, trained, tmp_path):
    def run(*inputs, checkpoint=trained):
        options = ['--out-dir', tmp_path / 'out', '--device', 'cpu', '--score-thr', 0.0]
        return run_tool('infer.py', DEMO, checkpoint, *inputs, *options, *cfg_options(SMALL))

    return run


def write_video(path, frames):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'MJPG'), 10, (64, 64))
    for i in range(frames):
        writer.write(np.full((64, 64, 3), 5 * i, np.uint8))
    writer.release()


def test_a_video_that_is_cut_off_is_named(infer, tmp_path):
    write_video(tmp_path / 'whole.avi', 20)
    whole = infer(tmp_path / 'whole.avi')
    assert whole.code == 0 and 'cut off' not in whole.out + whole.err
    data = (tmp_path / 'whole.avi').read_bytes()
    (tmp_path / 'half.avi').write_bytes(data[: len(data) // 2])
    result = infer(tmp_path / 'half.avi')
    assert 'half.avi' in result.err and ('cut off' in result.err or 'is not one that OpenCV can read' in result.err)


def test_a_video_that_is_not_written_whole_is_named(tmp_path):
    """As on a full disk, of which OpenCV's writer says nothing."""
    write_video(tmp_path / 'whole.avi', 20)
    _require_frames(tmp_path / 'whole.avi', 20)
    data = (tmp_path / 'whole.avi').read_bytes()
    (tmp_path / 'half.avi').write_bytes(data[: len(data) // 2])
    for name, count in (('half.avi', 20), ('whole.avi', 21), ('nothing.avi', 1)):
        with pytest.raises(UserError, match=f'{name} could not be written whole'):
            _require_frames(tmp_path / name, count)


@pytest.mark.parametrize('kind', ['pipe', 'text', 'picture', 'thin'])
def test_one_odd_input_does_not_end_the_folder(infer, shapes, tmp_path, kind):
    folder = tmp_path / 'inputs'
    folder.mkdir()
    shutil.copy(next((shapes / 'val2017').iterdir()), folder / 'good.jpg')
    odd = folder / ('odd.jpg' if kind == 'thin' else 'odd.mp4')
    if kind == 'pipe':
        os.mkfifo(odd)
    elif kind == 'text':
        odd.write_text('ffconcat version 1.0\nfile missing.avi\n')
    elif kind == 'picture':
        odd.write_bytes(cv2.imencode('.png', np.zeros((8, 8, 3), np.uint8))[1].tobytes())
    else:
        cv2.imwrite(str(odd), np.zeros((1, 5000, 3), np.uint8))
    result = infer(folder)
    assert 'Traceback' not in result.err and odd.name in result.err, result.err[-1500:]
    found = json.loads((tmp_path / 'out/predictions.json').read_text())
    assert {record['file_name'] for record in found} == {str(folder / 'good.jpg')}


def test_a_copied_work_dir_stands_for_its_own_checkpoints(trained, tmp_path):
    """Its last_checkpoint names one of the original by its whole path."""
    original = shutil.copytree(trained, tmp_path / 'original')
    shutil.copy(original / 'epoch_1.pth', original / 'epoch_2.pth')
    (original / 'last_checkpoint').write_text(str(original / 'epoch_2.pth'))
    copied = shutil.copytree(original, tmp_path / 'copied')
    (copied / 'epoch_2.pth').unlink()
    assert find_checkpoint(str(copied)) == str(copied / 'epoch_1.pth')


@pytest.mark.parametrize(
    ('meta', 'words'),
    [
        (dict(classes=['a', 'b']), 'the detector has 6 classes, and the checkpoint names 2'),
        (dict(classes='circle'), 'does not say its classes as a list of names'),
        (dict(classes=[1, 2, 3, 4, 5, 6]), 'does not say its classes as a list of names'),
        (['circle'], 'does not say its classes as a list of names'),
    ],
)
def test_names_that_do_not_fit_the_head_are_refused(infer, trained, shapes, tmp_path, meta, words):
    checkpoint = torch.load(trained / 'epoch_1.pth', weights_only=False)
    checkpoint['meta']['dataset_meta'] = meta
    torch.save(checkpoint, tmp_path / 'odd.pth')
    result = infer(shapes / 'val2017', checkpoint=tmp_path / 'odd.pth')
    assert result.code == 2 and words in result.err, result.err[-1500:]


def test_a_palette_that_is_too_short_is_replaced(infer, trained, shapes, tmp_path):
    checkpoint = torch.load(trained / 'epoch_1.pth', weights_only=False)
    checkpoint['meta']['dataset_meta']['palette'] = [(1, 2, 3)]
    torch.save(checkpoint, tmp_path / 'odd.pth')
    assert infer(shapes / 'val2017', checkpoint=tmp_path / 'odd.pth').code == 0


def test_braces_in_a_class_name_are_inserted_as_they_are(run_tool, trained, tmp_path):
    """MMEngine would read them as a variable of the file."""
    plain = Config.fromfile(DEMO.replace('_cbam', ''))
    plain.classes = ('{{fileBasename}}', *plain.classes[1:])
    for split in ('train', 'val', 'test'):
        plain[f'{split}_dataloader'].dataset.metainfo.classes = plain.classes
    plain.merge_from_dict(SMALL)
    config = tmp_path / 'plain.py'
    config.write_text(plain.pretty_text.replace('{{', '{\\x7b'))
    assert Config.fromfile(config).classes[0] == '{{fileBasename}}'
    weights = torch.load(trained / 'epoch_1.pth', weights_only=False)['state_dict']
    torch.save({key: value for key, value in weights.items() if '.cbam.' not in key}, tmp_path / 'plain.pth')
    result = run_tool('insert_cbam.py', config, tmp_path / 'plain.pth', '--out-dir', tmp_path / 'inserted')
    assert result.code == 0, result.err[-1500:]
    [written] = (tmp_path / 'inserted').glob('*.py')
    assert Config.fromfile(written).train_dataloader.dataset.metainfo.classes[0] == '{{fileBasename}}'


@pytest.mark.parametrize('what', ['images', 'categories'])
def test_ids_given_twice_are_not_converted(shapes, tmp_path, what):
    content = json.loads((shapes / 'annotations/instances_val2017.json').read_text())
    content[what][1]['id'] = content[what][0]['id']
    (tmp_path / 'a.json').write_text(json.dumps(content))
    with pytest.raises(UserError, match=r'share their id|have the id'):
        convert(str(tmp_path / 'a.json'), str(tmp_path / 'VOC/ImageSets/Main/a.txt'))
    assert not (tmp_path / 'VOC').exists()


def test_a_box_of_less_than_a_pixel_stays_a_box(tmp_path):
    image = dict(id=1, file_name='a.jpg', width=9, height=9)
    box = dict(id=1, image_id=1, category_id=1, bbox=[0.5, 0.5, 0.4, 1.5], area=0.6, iscrowd=0)
    content = dict(images=[image], annotations=[box], categories=[dict(id=1, name='cat')])
    (tmp_path / 'a.json').write_text(json.dumps(content))
    convert(str(tmp_path / 'a.json'), str(tmp_path / 'VOC/ImageSets/Main/a.txt'))
    text = (tmp_path / 'VOC/Annotations/a.xml').read_text()
    low, high = (int(text.split(f'<{key}>')[1].split('<')[0]) for key in ('xmin', 'xmax'))
    assert low <= high


def test_images_that_are_trained_on_and_scored_are_named(own_shapes, tmp_path, capsys):
    cfg = load_config(DEMO)
    set_default_scope(cfg)
    for split in ('train', 'val'):
        dataset = cfg[f'{split}_dataloader'].dataset
        dataset.data_root = f'{own_shapes}/'
        dataset.ann_file, dataset.data_prefix = 'annotations/instances_val2017.json', dict(img='val2017/')
    cfg.val_evaluator.ann_file = str(own_shapes / 'annotations/instances_val2017.json')
    check_data(cfg, ['train', 'val'])
    said = capsys.readouterr()
    assert '4 of 4 images are trained on, too' in said.out + said.err

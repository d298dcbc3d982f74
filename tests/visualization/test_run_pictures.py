"""tools/draw_run.py: the curve and the sheet of a run."""

import json
import os
import pickle
import shutil

import cv2
import pytest
import torch
from conftest import DEMO, tiny

from cbam_mmdet.errors import UserError
from cbam_mmdet.utils.config import load_config
from cbam_mmdet.visualization import run_pictures
from cbam_mmdet.visualization.run_pictures import draw_curve, draw_sheet


@pytest.fixture
def work_dir(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / 'work')


def test_draw_run_reads_the_newest_config(run_tool, work_dir, shapes, tmp_path):
    done = run_tool('test.py', DEMO, work_dir, '--out', work_dir / 'results.pkl', *tiny(tmp_path / 'test', shapes))
    assert done.code == 0, done.err
    older = work_dir / 'another.py'
    older.write_text('model = dict()\n')  # of a training in the same folder: it names no data
    os.utime(older, (1, 1))
    result = run_tool('draw_run.py', work_dir, '--num-images', 4)
    assert result.code == 0, result.err
    for name in ('curve.png', 'detections.png'):
        assert cv2.imread(str(work_dir / name)).std() > 10, 'something is drawn'


def test_a_sheet_draws_the_objects_that_count_and_the_detections_of_its_images_alone(shapes, tmp_path, monkeypatch):
    annotations = tmp_path / 'annotations.json'
    data = json.loads((shapes / 'annotations/instances_val2017.json').read_text())
    first = data['images'][0]['id']
    for i, annotation in enumerate(it for it in data['annotations'] if it['image_id'] == first):
        annotation['iscrowd'] = int(i == 0)
    annotations.write_text(json.dumps(data))
    cfg = load_config(DEMO, {'test_dataloader.dataset.data_root': str(shapes)})
    cfg.test_dataloader.dataset.ann_file = str(annotations)
    cfg.test_dataloader.dataset.metainfo = dict(classes=[category['name'] for category in data['categories']])
    nothing = dict(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long), scores=torch.zeros(0))
    samples = [
        dict(img_id=image['id'], img_path=f'/elsewhere/{image["file_name"]}', pred_instances=nothing)
        for image in data['images']
    ]
    drawn = []
    monkeypatch.setattr(run_pictures, 'draw_box', lambda axes, box, **style: drawn.append(box))
    with open(tmp_path / 'results.pkl', 'wb') as file:
        pickle.dump(samples, file)
    draw_sheet(cfg, tmp_path / 'results.pkl', tmp_path / 'sheet.png', num_images=1)
    counted = [it['bbox'] for it in data['annotations'] if it['image_id'] == first and not it['iscrowd']]
    assert drawn and sorted(drawn) == sorted((x, y, x + width, y + height) for x, y, width, height in counted)

    samples[0]['img_path'] = '/elsewhere/another.jpg'
    with open(tmp_path / 'results.pkl', 'wb') as file:
        pickle.dump(samples, file)
    with pytest.raises(UserError, match='written for another one'):
        draw_sheet(cfg, tmp_path / 'results.pkl', tmp_path / 'sheet.png', num_images=1)


def test_a_curve_without_a_finite_loss_is_one_message(tmp_path):
    log = tmp_path / '20260101_000000/vis_data/scalars.json'
    log.parent.mkdir(parents=True)
    log.write_text('{"loss": NaN, "step": 1, "epoch": 1}\n')
    with pytest.raises(UserError, match='infinite or NaN'):
        draw_curve(tmp_path, tmp_path / 'curve.png')

"""The tools do what their help says, on a tiny data set."""

import json
import shutil
from pathlib import Path

import cv2
import pytest
from coco_records import coco_records
from conftest import DEMO, ROOT, needs_served_operators, pretend_tested, tiny
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from cbam_mmdet.engine.checkpoint.loading import load_plain_pickle


def test_train_writes_a_checkpoint_and_a_log(trained):
    assert (trained / 'epoch_1.pth').is_file()
    scalars = next(trained.glob('*/vis_data/scalars.json')).read_text()
    assert 'loss_bbox' in scalars
    assert 'coco/bbox_mAP' in scalars


def test_test_scores_as_pycocotools_does(run_tool, trained, shapes, tmp_path):
    out = tmp_path / 'results.pkl'
    result = run_tool('test.py', DEMO, trained, '--out', out, *tiny(tmp_path, shapes))
    assert result.code == 0
    scored = json.loads(next(tmp_path.glob('*/*.json')).read_text())
    truth = COCO(str(shapes / 'annotations/instances_val2017.json'))
    evaluation = COCOeval(truth, truth.loadRes(coco_records(out)), 'bbox')
    evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    for key, value in zip(('', '_50', '_75', '_s', '_m', '_l'), evaluation.stats[:6], strict=True):
        assert scored[f'coco/bbox_mAP{key}'] == pytest.approx(value, abs=5e-4)


def test_resume_goes_on_where_it_stopped(run_tool, shapes, tmp_path):
    assert run_tool('train.py', DEMO, *tiny(tmp_path, shapes)).code == 0
    result = run_tool('train.py', DEMO, '--resume', *tiny(tmp_path, shapes, 'train_cfg.max_epochs=2'))
    assert result.code == 0
    assert 'resumed epoch: 1' in result.out + result.err
    assert (tmp_path / 'epoch_2.pth').is_file()


@needs_served_operators
def test_train_warns_of_a_layer_whose_operator_is_not_served(run_tool, shapes, tmp_path):
    result = run_tool('train.py', DEMO, *tiny(tmp_path, shapes, 'model.neck.type=FPN_CARAFE'))
    said = result.out + result.err
    assert result.code != 0 and 'Traceback' not in said, said[-3000:]
    warned, ended = said.index('is a layer of mmcv.ops whose operators (carafe'), said.index("'carafe_forward' needs a")
    assert warned < ended


def test_auto_scale_lr(run_tool, shapes, tmp_path):
    for flags, lr in (([], 1e-3), (['--auto-scale-lr'], 0.5e-3)):  # batch 4, where the config's lr is for 8
        work_dir = tmp_path / str(lr)
        options = tiny(work_dir, shapes, 'param_scheduler=[]')
        assert run_tool('train.py', DEMO, *flags, *options).code == 0
        rows = [json.loads(line) for line in next(work_dir.glob('*/vis_data/scalars.json')).read_text().splitlines()]
        assert rows[0]['lr'] == pytest.approx(lr)


def test_tta_and_show_dir(run_tool, trained, shapes, tmp_path):
    result = run_tool('test.py', DEMO, trained / 'epoch_1.pth', '--tta', *tiny(tmp_path / 'tta', shapes))
    assert result.code == 0
    assert 'bbox_mAP' in result.out + result.err
    result = run_tool('test.py', DEMO, trained / 'epoch_1.pth', '--show-dir', 'vis', *tiny(tmp_path, shapes))
    assert result.code == 0
    assert len(list(tmp_path.glob('*/vis/*'))) == 4


def test_tta_does_not_merge_masks(run_tool, trained, shapes, tmp_path):
    config = tmp_path / 'masks.py'
    config.write_text(f"_base_ = {DEMO!r}\nmodel = dict(roi_head=dict(mask_head=dict(type='FCNMaskHead')))\n")
    result = run_tool('test.py', config, trained / 'epoch_1.pth', '--tta', *tiny(tmp_path, shapes))
    assert result.code == 2 and 'this detector also has masks' in result.err


@pytest.mark.parametrize('flags', [[], ['--tta']])
def test_two_data_sets_of_which_each_has_its_metric(run_tool, trained, shapes, tmp_path, flags):
    """MMDetection's MultiDatasetsEvaluator takes as many metrics as data sets."""
    config = tmp_path / 'two.py'
    config.write_text(
        f'_base_ = {DEMO!r}\n'
        "first = dict(_base_.test_dataloader.dataset, ann_file='annotations/instances_train2017.json', "
        "data_prefix=dict(img='train2017/'))\n"
        'second = dict(_base_.test_dataloader.dataset)\n'
        "test_dataloader = dict(dataset=dict(_delete_=True, type='ConcatDataset', datasets=[first, second]))\n"
        'metric = dict(_base_.test_evaluator)\n'
        "test_evaluator = dict(_delete_=True, type='MultiDatasetsEvaluator', dataset_prefixes=['a', 'b'], metrics=["
        "dict(metric, ann_file=metric['ann_file'].replace('val2017', 'train2017')), metric])\n"
    )
    out = tmp_path / 'all.pkl'
    options = tiny(tmp_path / 'work', shapes)
    result = run_tool('test.py', config, trained / 'epoch_1.pth', '--out', out, *flags, *options)
    assert result.code == 0, result.err[-2000:]
    assert all(f'{prefix}/coco/bbox_mAP' in result.out + result.err for prefix in 'ab')
    assert len(load_plain_pickle(str(out))) == 12


def test_infer_on_images_a_folder_and_a_video(run_tool, trained, shapes, tmp_path):
    folder = shapes / 'val2017'
    image = sorted(folder.iterdir())[0]
    video = str(tmp_path / 'film.avi')
    writer = cv2.VideoWriter(video, cv2.VideoWriter_fourcc(*'MJPG'), 5, (64, 64))
    for _ in range(3):
        writer.write(cv2.imread(str(image)))
    writer.release()
    out = tmp_path / 'out'
    config = next(trained.glob('*.py'))
    arguments = [
        config,
        trained / 'epoch_1.pth',
        image,
        folder,
        video,
        '--out-dir',
        out,
        '--score-thr',
        0,
        '--device',
        'cpu',
    ]
    result = run_tool('infer.py', *arguments)
    assert result.code == 0, result.err
    assert '8 images' in result.out  # one, four of the folder, three frames
    pictures = sorted(p.name for p in (out / 'vis').iterdir())
    assert len(pictures) == 6 and 'film.mp4' in pictures, 'the image given twice keeps two names'
    records = json.loads((out / 'predictions.json').read_text())
    assert {r['image_id'] for r in records} <= set(range(1, 9))
    frames = [r for r in records if r['file_name'] == video]
    assert {r['frame'] for r in frames} == {0, 1, 2}
    assert all(0 <= r['score'] <= 1 and len(r['bbox']) == 4 and 1 <= r['category_id'] <= 6 for r in records)
    assert {r['category'] for r in records} <= {'circle', 'square', 'triangle', 'star', 'ring', 'cross'}
    same = [[r['bbox'] for r in records if r['image_id'] == i] for i in (1, 2)]
    assert same[0] == same[1], 'the same image gives the same boxes'
    assert cv2.imread(str(out / 'vis' / pictures[-1])).shape == (448, 448, 3), 'large enough for labels'
    film = cv2.VideoCapture(str(out / 'vis/film.mp4'))
    assert film.read()[1].shape == (448, 448, 3)


def test_pictures_get_names_of_their_own():
    from cbam_mmdet.datasets.inputs import unique_names

    files = [Path(p) for p in ('a.jpg', 'b/a.jpg', 'a_2.jpg', '10.11.12.jpg', '10.11.13.jpg')]
    assert unique_names(files) == ['a', 'a_2', 'a_2_2', '10.11.12', '10.11.13']


def test_draw_run(run_tool, trained, shapes, tmp_path):
    result = run_tool(
        'test.py', DEMO, trained / 'epoch_1.pth', '--out', trained / 'results.pkl', *tiny(tmp_path, shapes)
    )
    assert result.code == 0
    result = run_tool('draw_run.py', trained, '--num-images', 4)
    assert result.code == 0, result.err
    for name in ('curve.png', 'detections.png'):
        assert str(trained / name) in result.out
        assert cv2.imread(str(trained / name)).std() > 10, 'something is drawn'
    # The test's record lies elsewhere, so whose detections they are is not known.
    assert 'is not known to hold the detections of the newest checkpoint' in result.err
    work = shutil.copytree(trained, tmp_path / 'work')
    pretend_tested(work)
    assert 'is not known' not in run_tool('draw_run.py', work, '--num-images', 4).err


@pytest.mark.parametrize(
    'name', ['train.py', 'test.py', 'ablate.py', 'infer.py', 'draw_run.py', 'report.py', 'make_shapes.py']
)
def test_help(run_tool, name):
    result = run_tool(name, '--help')
    assert result.code == 0
    assert 'usage' in result.out


def test_data_root_reaches_every_loader_and_evaluator(tmp_path):
    from mmengine.config import Config

    from cbam_mmdet.utils.config import set_data_root, split_datasets

    cfg = Config.fromfile(ROOT / 'configs/faster_rcnn_r50_cbam.py')
    cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=2, dataset=dict(
        type='ConcatDataset', datasets=[cfg.train_dataloader.dataset, cfg.val_dataloader.dataset]))  # fmt: skip
    set_data_root(cfg, str(tmp_path / 'coco'))
    for split, count in (('train', 2), ('val', 1), ('test', 1)):
        datasets = split_datasets(cfg, split)
        assert [d.data_root for d in datasets] == [f'{tmp_path}/coco/'] * count
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        assert evaluator.ann_file == f'{tmp_path}/coco/annotations/instances_val2017.json'
    assert 'data/coco' not in str(cfg.train_dataloader)


def test_the_pages_of_two_data_sets_stand_beside_each_other(run_tool, shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('cells', 'raccoons'):
        shutil.copytree(shapes, tmp_path / 'data' / name)
        result = run_tool('look_at_data.py', f'data/{name}/', '--num-images', 2)
        assert result.code == 0 and f'work_dirs/data_{name}.html' in result.out, result.err
    assert sorted(path.name for path in Path('work_dirs').iterdir()) == ['data_cells.html', 'data_raccoons.html']

"""A checkpoint says what to remove later. Nothing outside the run's own folder is."""

import shutil

import pytest
import torch
from conftest import DEMO, tiny

BEST = 'default_hooks.checkpoint.save_best=coco/bbox_mAP'


@pytest.mark.parametrize(('key', 'value'), [('best_ckpt', 'victim'), ('keep_ckpt_ids', '/../../victim/mine')])
def test_a_strangers_checkpoint_removes_nothing(run_tool, trained, shapes, tmp_path, key, value):
    victim = tmp_path / 'victim'
    victim.mkdir()
    (victim / 'mine.pth').write_text('mine')
    checkpoint = torch.load(trained / 'epoch_1.pth', weights_only=False)
    info = {'best_score': -1.0, key: str(victim) if value == 'victim' else [value, 1, 2]}
    checkpoint['message_hub']['runtime_info'] |= info
    checkpoint['message_hub']['resumed_keys'] |= dict.fromkeys(info, True)
    torch.save(checkpoint, tmp_path / 'stranger.pth')
    work = tmp_path / 'work'
    (work / 'epoch_').mkdir(parents=True)
    options = ['train_cfg.max_epochs=2', BEST, 'default_hooks.checkpoint.max_keep_ckpts=1']
    result = run_tool('train.py', DEMO, '--resume', tmp_path / 'stranger.pth', *tiny(work, shapes, *options))
    assert result.code == 0, result.err[-2000:]
    assert (victim / 'mine.pth').read_text() == 'mine'


def test_a_run_resumed_elsewhere_leaves_the_best_of_the_first(run_tool, trained, shapes, tmp_path):
    first = shutil.copytree(trained, tmp_path / 'first')
    best = first / 'best_coco_bbox_mAP_epoch_0.pth'
    shutil.copy(first / 'epoch_1.pth', best)
    checkpoint = torch.load(first / 'epoch_1.pth', weights_only=False)
    info = {'best_score': -2.0, 'best_ckpt': str(best)}
    checkpoint['message_hub']['runtime_info'] |= info
    checkpoint['message_hub']['resumed_keys'] |= dict.fromkeys(info, True)
    torch.save(checkpoint, first / 'epoch_1.pth')
    for work, stays in ((tmp_path / 'second', True), (first, False)):
        options = ['train_cfg.max_epochs=2', BEST]
        result = run_tool('train.py', DEMO, '--resume', first / 'epoch_1.pth', *tiny(work, shapes, *options))
        assert result.code == 0, result.err[-2000:]
        assert best.exists() == stays and any(work.glob('best_*'))

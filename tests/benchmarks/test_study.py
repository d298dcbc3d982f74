"""The accuracy study's table: which validations count, and what is compared with what."""

import json
import runpy
import statistics
import sys

from conftest import ROOT

SCALARS = 'run/vis_data/scalars.json'


def finished(folder, epochs, mean_ap):
    """A work dir as a training leaves it: losses, the gates' statistics, and a validation per epoch."""
    path = folder / SCALARS
    path.parent.mkdir(parents=True)
    rows = [dict(loss=1.0, step=epochs), {'gates/backbone.cbam/mean': 1.0, 'step': epochs}]
    rows += [{'coco/bbox_mAP': mean_ap if step == epochs else 0.0, 'step': step} for step in range(1, epochs + 1)]
    path.write_text(''.join(f'{json.dumps(row)}\n' for row in rows))


def test_table_compares_with_the_control_of_the_same_seed(tmp_path, monkeypatch):
    runs = {
        'finetune/plain': (6, [0.5, 0.4, 0.6]),
        'finetune/cbam': (6, [0.4, 0.5, 0.3]),
        'finetune/plain_full_rate': (6, [0.7, 0.6]),
        'finetune/unit_gate_full_rate': (6, [0.8, 0.9, 0.9]),  # the third has no control yet
        'scratch/plain': (16, [0.3]),
        'scratch/se': (15, [0.9]),  # an epoch short
    }
    for name, (epochs, values) in runs.items():
        for seed, value in enumerate(values):
            finished(tmp_path / 'shapes' / name / f'seed{seed}', epochs, value)
    out = tmp_path / 'table.md'
    arguments = ['study.py', 'table', '--data', 'shapes', '--work-dir', tmp_path, '--out', out]
    monkeypatch.setattr(sys, 'argv', [*map(str, arguments)])
    runpy.run_path(str(ROOT / 'benchmarks/accuracy/study.py'), run_name='__main__')

    rows = {(row['stage'], row['name']): row for row in json.loads(out.with_suffix('.json').read_text())['rows']}
    assert set(rows) == {
        ('scratch', 'plain'),
        ('finetune', 'plain'),
        ('finetune', 'CBAM'),
        ('finetune', 'plain, full rate'),
        ('finetune', 'unit gate, full rate'),
    }
    assert rows['finetune', 'CBAM']['paired'] == [-0.1, 0.1, -0.3]
    assert rows['finetune', 'unit gate, full rate']['paired'] == [0.1, 0.3]
    spread = statistics.stdev([-0.1, 0.1, -0.3])
    (line,) = (line for line in out.read_text().splitlines() if ': CBAM |' in line)
    assert line == f'| fine-tuned from plain: CBAM | 0, 1, 2 | 0.400 | 0.100 | -0.100 | {spread:.3f} |'

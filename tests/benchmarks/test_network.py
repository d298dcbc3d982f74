"""The benchmarks that the doctor runs, with its arguments, on small networks and maps."""

import json
import sys

import cbam_op
import network
import pytest
import torch

from cbam_mmdet.apis.doctor.measure import ON_CPU


@pytest.fixture
def run_script(monkeypatch, tmp_path):
    monkeypatch.setattr(cbam_op, 'SHAPES', dict.fromkeys(cbam_op.SHAPES, (8, 5, 6)))
    tiny = network.Network('faster_rcnn_r18_cbam.py', 'detector', 1, 64, 64)
    monkeypatch.setattr(network, 'NETWORKS', dict.fromkeys(network.NETWORKS, tiny))
    threads = torch.get_num_threads()

    def run(script, arguments):
        monkeypatch.setattr(sys, 'argv', ['', *arguments.split(), '--device', 'cpu', '--out', str(tmp_path / 'record')])
        script.main()
        return json.loads((tmp_path / 'record.json').read_text())

    yield run
    torch.set_num_threads(threads)


def test_cbam_alone(run_script):
    record = run_script(cbam_op, ON_CPU['cbam_op'][1])
    kept = {row['what']: row['kept_percent'] for row in record['rows']}
    assert {'textbook', 'eager'} <= kept.keys()
    assert kept['textbook'] > 100
    assert record['geometric_mean_speedup']['textbook'] == 1


def test_without_the_c_library_it_is_left_out(run_script, monkeypatch):
    monkeypatch.setattr(cbam_op.CBAM, 'implementation', refuse)
    record = run_script(cbam_op, ON_CPU['cbam_op'][1])
    assert {row['what'] for row in record['rows']} == {'textbook', 'eager'}


def refuse(module, x):
    raise cbam_op.UserError('needs the C library')


def test_whole_networks(run_script):
    record = run_script(network, ON_CPU['network'][1])
    assert {(row['mode'], row['what']) for row in record['rows']} == {
        (mode, what) for mode in ('inference', 'training') for what in ('plain', 'textbook', 'ours')
    }
    assert all(row['ms'] > 0 for row in record['rows'])
    assert all(row['added_percent'] == 0 for row in record['rows'] if row['what'] == 'plain')

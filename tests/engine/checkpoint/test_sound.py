"""Weights that cannot be those of a detector are refused where they are loaded."""

import zipfile
from collections import OrderedDict

import pytest
import torch
from torch import nn

from cbam_mmdet.engine.checkpoint.compare import compare_state_dicts
from cbam_mmdet.engine.checkpoint.files import find_checkpoint
from cbam_mmdet.engine.checkpoint.loading import load_checkpoint
from cbam_mmdet.errors import UserError
from cbam_mmdet.models.variant import KEY

MODEL = nn.Sequential(nn.Linear(2, 2))


def weights(**changes):
    return OrderedDict(MODEL.state_dict(), **changes)


def with_metadata(metadata):
    given = weights()
    given._metadata = metadata
    return given


@pytest.mark.parametrize(
    ('given', 'words'),
    [
        (
            weights(**{'0.weight': torch.tensor([[1.0, float('nan')], [0, 0]])}),
            '0.weight holds numbers that are not finite',
        ),
        (weights(**{'0.bias': torch.tensor([1.0, float('inf')])}), '0.bias holds numbers that are not finite'),
        (weights(**{'0.weight': torch.empty(2, 2, device='meta')}), 'without values'),
        (weights(**{'0.weight': torch.zeros(2, 2).to_sparse()}), 'sparse'),
        (OrderedDict({**weights(), 7: torch.zeros(1)}), 'a weight is called 7'),
        (with_metadata(7), 'damaged'),
        (with_metadata({'': 5}), 'damaged'),
    ],
)
@pytest.mark.parametrize('strict', [True, False])
def test_unsound_weights_are_refused(given, words, strict):
    with pytest.raises(UserError, match=words):
        compare_state_dicts(given, MODEL, strict, 'a.pth')


def test_sound_weights_are_taken():
    compare_state_dicts(weights(), MODEL, True, 'a.pth')
    compare_state_dicts(with_metadata({'': {'version': 1}}), MODEL, True, 'a.pth')


BAD_META = [
    (dict(epoch=-1), 'its epoch is -1'),
    (dict(iter='2'), "its iter is '2'"),
    (dict(epoch=2.5), r'its epoch is 2\.5'),
    (dict(seed='abc'), "its seed is 'abc'"),
    (dict(dataset_meta={5: 1}), 'other keys than names'),
    (dict(dataset_meta=dict(classes=('a', 'b'), CLASSES=('b', 'a'))), 'names its classes twice'),
    (dict(dataset_meta=dict(classes=('a', 'a'))), 'a name for each'),
    (dict(dataset_meta=dict(classes=('a', ' '))), 'a name for each'),
]
BAD_WEIGHTS = [
    ({'module.0.bias': torch.zeros(2)}, 'twice, with and without module'),
    ({'0.bias': 'text'}, '0.bias is a str'),
    ({'0.bias': torch.zeros(2, dtype=torch.complex64)}, 'complex64'),
    ({'0.bias': torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8)}, 'qint8|_rebuild_qtensor'),
    ({'0.bias': torch.full((2,), 1e300, dtype=torch.float64)}, 'not finite'),
    ({'0.bias': torch.zeros(1).expand(10**7, 10**7)}, 'fewer values'),
    ({'bn.running_var': torch.tensor([1.0, -1.0])}, 'variance below 0'),
]
BAD_VARIANTS = [{}, 'unit', dict(gate='unit')]


@pytest.mark.parametrize(('meta', 'words'), BAD_META)
def test_counters_and_classes_that_cannot_be(tmp_path, meta, words):
    torch.save(dict(meta=meta, state_dict=weights()), tmp_path / 'a.pth')
    with pytest.raises(UserError, match=words):
        load_checkpoint(str(tmp_path / 'a.pth'))


@pytest.mark.parametrize(('changes', 'words'), BAD_WEIGHTS)
def test_weights_that_cannot_be(tmp_path, changes, words):
    torch.save(dict(meta={}, state_dict=weights(**changes)), tmp_path / 'a.pth')
    with pytest.raises(UserError, match=words):
        load_checkpoint(str(tmp_path / 'a.pth'))


@pytest.mark.parametrize('variant', BAD_VARIANTS)
def test_variants_that_cannot_be(tmp_path, variant):
    torch.save(dict(meta={}, state_dict=with_metadata({'0': {KEY: variant}})), tmp_path / 'a.pth')
    with pytest.raises(UserError, match='the variant of the CBAM 0 is'):
        load_checkpoint(str(tmp_path / 'a.pth'))


def test_a_sound_checkpoint_is_loaded(tmp_path):
    meta = dict(epoch=3, iter=7, seed=0, dataset_meta=dict(classes=('a', 'b'), CLASSES=['a', 'b']))
    torch.save(dict(meta=meta, state_dict=with_metadata({'': {'version': 1}})), tmp_path / 'a.pth')
    assert load_checkpoint(str(tmp_path / 'a.pth'))['meta'] == meta


def test_a_last_checkpoint_that_is_no_text(tmp_path):
    torch.save(dict(meta={}, state_dict=weights()), tmp_path / 'epoch_1.pth')
    (tmp_path / 'last_checkpoint').write_bytes(b'\xff\xfe\x00')
    with pytest.raises(UserError, match='folder without a checkpoint of a training run'):
        find_checkpoint(str(tmp_path))  # epoch_1.pth holds no state of a run


def test_a_checkpoint_that_would_unpack_to_a_thousand_times_its_size(tmp_path):
    torch.save(dict(meta={}, state_dict={'0.bias': torch.zeros(5_000_000)}), tmp_path / 'plain.pth')
    with (
        zipfile.ZipFile(tmp_path / 'plain.pth') as plain,
        zipfile.ZipFile(tmp_path / 'a.pth', 'w', zipfile.ZIP_DEFLATED) as out,
    ):
        for member in plain.infolist():
            out.writestr(member.filename, plain.read(member))
    assert load_checkpoint(str(tmp_path / 'plain.pth'))
    with pytest.raises(UserError, match='would unpack to 20'):
        load_checkpoint(str(tmp_path / 'a.pth'))

"""Weights that cannot be those of a detector are refused where they are loaded."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from cbam_mmdet.engine.checkpoint.compare import compare_state_dicts
from cbam_mmdet.errors import UserError

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

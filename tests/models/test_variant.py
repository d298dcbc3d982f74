"""Weights know which variant of CBAM they are of, and another one does not take them."""

import copy
import shutil
from collections import OrderedDict

import pytest
import torch
from conftest import DEMO, SMALL, cfg_options, tiny
from mmdet.registry import MODELS
from mmengine.runner.checkpoint import get_state_dict, load_checkpoint, save_checkpoint
from torch import nn

from cbam_mmdet import CBAM
from cbam_mmdet.engine.checkpoint.compare import compare_state_dicts
from cbam_mmdet.engine.checkpoint.content import weights_of
from cbam_mmdet.engine.checkpoint.loading import safe_loading
from cbam_mmdet.engine.checkpoint.variants import variants_in
from cbam_mmdet.errors import UserError
from cbam_mmdet.models.variant import KEY, any_variant_loaded

OTHERS = [dict(gate='unit'), dict(order='parallel'), dict(pools=('avg', 'lp'))]


def net(**variant):
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 16, 1), cbam=CBAM(16, **variant)))


def forget_variant(state_dict):
    for described in state_dict._metadata.values():
        described.pop(KEY, None)
    return state_dict


@pytest.mark.parametrize('variant', OTHERS, ids=str)
@pytest.mark.parametrize('state_of', [nn.Module.state_dict, get_state_dict], ids=['torch', 'mmengine'])
def test_another_variant_is_refused(variant, state_of, tmp_path):
    torch.save(state_of(net()), tmp_path / 'a.pth')
    weights = torch.load(tmp_path / 'a.pth', weights_only=True)
    net().load_state_dict(weights)
    (name,) = variant
    with pytest.raises(UserError, match=f'trained with {name}=.* in its CBAM cbam, and the config says {name}='):
        net(**variant).load_state_dict(weights)
    with any_variant_loaded():
        net(**variant).load_state_dict(weights)


def test_the_order_of_the_pools_changes_nothing():
    net(pools=('max', 'avg')).load_state_dict(net().state_dict())


def test_without_a_spatial_branch_there_is_no_order():
    net(spatial=None, order='parallel').load_state_dict(net(spatial=None).state_dict())


def test_a_copy_knows_it_too():
    assert copy.deepcopy(net(gate='unit')).state_dict()._metadata['cbam'][KEY]['gate'] == 'unit'


def test_dataparallels_prefix_keeps_it():
    weights = nn.DataParallel(net()).state_dict()
    assert weights_of(weights)._metadata['cbam'][KEY]['gate'] == 'sigmoid'


def test_a_file_that_does_not_say_it_gets_one_warning(tmp_path, logged):
    torch.save(forget_variant(net().state_dict()), tmp_path / 'a.pth')
    with safe_loading():
        load_checkpoint(net(gate='unit'), str(tmp_path / 'a.pth'))
    said = [message for message in logged.messages if 'does not say which variant of CBAM its 1 modules are' in message]
    assert len(said) == 1


@pytest.mark.parametrize('text, gate', [
    ("plugins = [dict(cfg=dict(type='CBAM', reduction=4), position='after_conv3')]", 'sigmoid'),
    ("plugins = [dict(cfg=dict(gate='unit', type='mmengine.CBAM', init_cfg=dict(a=f())))]", 'unit'),
    ('{"plugins": [{"cfg": {"type": "CBAM", "gate": "unit", "x": true}}]}', 'unit'),
])  # fmt: skip
def test_the_config_in_an_older_checkpoint_says_it(text, gate, tmp_path):
    torch.save(dict(meta=dict(cfg=text), state_dict=forget_variant(net().state_dict())), tmp_path / 'a.pth')
    with safe_loading():
        load_checkpoint(net(gate=gate), str(tmp_path / 'a.pth'))
        with pytest.raises(UserError, match=f"trained with gate='{gate}'"):
            load_checkpoint(net(gate='unit' if gate == 'sigmoid' else 'sigmoid'), str(tmp_path / 'a.pth'))


def test_another_position_in_the_block_is_refused():
    """after_conv1 and after_conv2 of a bottleneck give the same keys and shapes."""

    def backbone(position):
        plugins = [dict(cfg=dict(type='CBAM'), position=position)]
        return dict(type='ResNet', depth=50, base_channels=8, plugins=plugins)

    weights = MODELS.build(backbone('after_conv1')).state_dict()
    checkpoint = dict(meta=dict(cfg=f'model = dict(backbone={backbone("after_conv1")!r})'), state_dict=weights)
    compare_state_dicts(checkpoint, MODELS.build(backbone('after_conv1')), True, 'a.pth')
    other = MODELS.build(backbone('after_conv2'))
    with pytest.raises(UserError, match=r"with CBAM at position='after_conv1' .* the config says 'after_conv2'"):
        compare_state_dicts(checkpoint, other, True, 'a.pth')
    with any_variant_loaded():
        compare_state_dicts(checkpoint, other, True, 'a.pth')
    compare_state_dicts(weights, other, True, 'a.pth')  # which does not say it


def test_another_eps_is_refused():
    coarse = dict(type='BN', eps=0.1)
    with pytest.raises(UserError, match=r'trained with norm_cfg\.eps=0\.1 in its CBAM cbam'):
        net().load_state_dict(net(norm_cfg=coarse).state_dict())


@pytest.mark.parametrize('text', ['', '(', 'x' * 10 + '(' * 5000, 3, None, "dict(type='CBAM', **a)", 'a = [CBAM]'])
def test_any_text_is_only_parsed(text, tmp_path):
    assert len(variants_in(text)) <= 1
    assert variants_in(f"open({str(tmp_path / 'a')!r}, 'w'); dict(type='CBAM', gate=f'{{exit()}}')")
    assert not list(tmp_path.iterdir())


def test_pretrained_with_a_prefix_keeps_it(tmp_path):
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'a.pth'), prefix='backbone.')
    backbone = dict(type='ResNet', depth=50, base_channels=8)
    model = MODELS.build(dict(backbone, plugins=[dict(cfg=dict(type='CBAM', gate='unit'), position='after_conv3')]))
    plain = MODELS.build(dict(backbone, plugins=[dict(cfg=dict(type='CBAM'), position='after_conv3')]))
    save_checkpoint(dict(state_dict=nn.ModuleDict(dict(backbone=plain)).state_dict()), str(tmp_path / 'a.pth'))
    model.init_cfg = init_cfg
    with safe_loading(), pytest.raises(UserError, match="trained with gate='sigmoid'"):
        model.init_weights()


GATE = 'model.backbone.plugins.0.cfg.gate'


@pytest.mark.parametrize('tool', ['test.py', 'train.py', 'infer.py', 'gradcam.py'])
def test_the_tools_refuse_it(run_tool, trained, shapes, tmp_path, tool):
    work = shutil.copytree(trained, tmp_path / 'work')
    image = next((shapes / 'val2017').iterdir())
    unit = f'{GATE}=unit'
    arguments = {
        'test.py': [DEMO, work, *tiny(tmp_path / 'out', shapes, unit)],
        'train.py': [DEMO, '--resume', *tiny(work, shapes, unit, 'train_cfg.max_epochs=2')],
        'infer.py': [DEMO, work, image, '--out-dir', tmp_path / 'out', *cfg_options(SMALL, unit)],
        'gradcam.py': [DEMO, work, image, '--out-dir', tmp_path / 'out', *cfg_options(SMALL, unit)],
    }[tool]
    result = run_tool(tool, *arguments)
    assert result.code == 2 and "trained with gate='sigmoid'" in result.err, result.err[-2000:]
    if tool in ('test.py', 'train.py'):
        assert run_tool(tool, *arguments[:1], '--any-variant', *arguments[1:]).code == 0

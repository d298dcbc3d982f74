"""TimmFeatures: its maps are timm's own, what is frozen stays, and mistakes end in one message."""

import pytest
import torch
from conftest import DATA
from mmdet.registry import MODELS
from torch.nn.modules.batchnorm import _BatchNorm

from cbam_mmdet.errors import UserError
from cbam_mmdet.models.plugins.backbone import PluginBackbone
from cbam_mmdet.models.timm_features import TimmFeatures

timm = pytest.importorskip('timm', reason="an optional extra: pip install '.[backbones]'")

LITE = 'tf_efficientnet_lite0'
WEIGHTS = DATA.parent / 'weights/tf_efficientnet_lite0_in1k.pth'
BATCH = torch.rand(2, 3, 96, 70)


@pytest.mark.parametrize(
    ('name', 'out_indices'), [(LITE, (2, 3, 4)), ('resnet18', (1, 4)), ('convnext_atto', (0, 1, 2, 3))]
)
def test_maps_are_timms_own(name, out_indices):
    ours = TimmFeatures(name, out_indices).eval()
    whole = timm.create_model(name)
    left = whole.load_state_dict(ours.timm_model.state_dict(), strict=False)
    assert not left.unexpected_keys
    features = timm.create_model(name, features_only=True, out_indices=out_indices).eval()
    # timm flattens some names in there: 'stages.0' is 'stages_0'. The order is the same.
    pairs = zip(features.state_dict(), ours.timm_model.state_dict().items(), strict=False)
    features.load_state_dict({theirs: value for theirs, (_, value) in pairs}, strict=False)
    with torch.no_grad():
        expected, made = features(BATCH), ours(BATCH)
    assert len(made) == len(out_indices)
    assert [each.shape[1] for each in made] == list(ours.channels)
    for a, b in zip(made, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_every_weight_has_a_part_in_the_maps():
    model = TimmFeatures(LITE, (2, 3))  # what comes after the last map is not there: DDP would wait for it
    sum(each.sum() for each in model(BATCH)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not any(name.startswith(('timm_model.blocks.5', 'timm_model.blocks.6')) for name, _ in model.named_modules())


@pytest.mark.parametrize(
    ('frozen_stages', 'first_that_trains'),
    [(-1, 'conv_stem'), (0, 'blocks.1.0.conv_pw'), (1, 'blocks.2.0.conv_pw'), (2, 'blocks.3.0.conv_pw'), (4, None)],
)
def test_frozen_stages(frozen_stages, first_that_trains):
    model = TimmFeatures(LITE, frozen_stages=frozen_stages).train()
    flags = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    trained = [name for name, flag in flags if flag]
    assert [flag for _, flag in flags] == sorted(flag for _, flag in flags)  # first the frozen ones
    assert (trained[0] if trained else None) == (first_that_trains and f'timm_model.{first_that_trains}.weight')
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    for module in norms.values():
        assert module.training == module.weight.requires_grad


def test_frozen_stages_with_weights_of_their_own():
    """ConvNeXt's blocks have a scale of their own, beside modules with weights."""
    model = TimmFeatures('convnext_atto', (2, 3), frozen_stages=1)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {
        name for name, _ in model.named_parameters() if name.startswith(('timm_model.stages.2', 'timm_model.stages.3'))
    }
    assert any(name.endswith('.gamma') for name, _ in model.named_parameters())


def test_norm_eval_holds_the_statistics():
    model = TimmFeatures(LITE, norm_eval=True).train()
    before = {key: value.clone() for key, value in model.state_dict().items() if 'running' in key}
    model(BATCH)
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    model.norm_eval = False
    model.train()(BATCH)
    assert not all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


def test_pretrained_takes_timms_keys(tmp_path):
    torch.manual_seed(0)
    whole = timm.create_model(LITE)
    torch.save(whole.state_dict(), tmp_path / 'weights.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'weights.pth'))
    backbone = dict(type='TimmFeatures', model_name=LITE, init_cfg=init_cfg)
    plugins = [dict(cfg=dict(type='CBAM', reduction=4, gate='unit'))]
    for model in (MODELS.build(backbone), PluginBackbone(backbone, plugins)):
        model.init_weights()
        own = model.timm_model.state_dict()
        loaded = [key for key, value in whole.state_dict().items() if key in own and torch.equal(own[key], value)]
        assert len(loaded) == sum('cbam' not in key for key in own)
    with torch.no_grad():
        for a, b in zip(model.eval()(BATCH), whole.eval().forward_intermediates(BATCH)[1][1:], strict=True):
            assert torch.equal(a, b)  # the unit gate is the identity


@pytest.mark.parametrize('name', ['resnet18', 'tf_efficientnet_lite1', None])
def test_weights_of_another_network_are_refused(tmp_path, name):
    torch.save(timm.create_model(name).state_dict() if name else {}, tmp_path / 'weights.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'weights.pth'))
    backbone = dict(type='TimmFeatures', model_name=LITE, init_cfg=init_cfg)
    for model in (MODELS.build(backbone), PluginBackbone(backbone, [dict(cfg=dict(type='CBAM', reduction=4))])):
        with pytest.raises(UserError, match='do not fit tf_efficientnet_lite0'):
            model.init_weights()


@pytest.mark.skipif(not WEIGHTS.exists(), reason='needs the ImageNet weights')
def test_imagenet_weights_know_a_unicycle():
    """As the weights' own description has it: mean 127, std 128."""
    cv2 = pytest.importorskip('cv2')
    model = timm.create_model(LITE).eval()
    model.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    features = TimmFeatures(LITE, (4,), init_cfg=dict(type='Pretrained', checkpoint=str(WEIGHTS))).eval()
    features.init_weights()
    (path, *_) = sorted((DATA / 'coco/val2017').glob('*.jpg'))
    image = cv2.resize(cv2.imread(str(path))[..., ::-1], (224, 224))
    x = ((torch.from_numpy(image.copy()).float() - 127) / 128).permute(2, 0, 1)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.forward_head(model.bn2(model.conv_head(features(x)[0]))), model(x))


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (dict(model_name='tf_efficientnet_lite00'), "did you mean 'tf_efficientnet_lite0'"),
        (dict(model_name=LITE, out_indices=(2, 7)), r'out_indices=\(2, 7\).*4 \(stride 32\)'),
        (dict(model_name=LITE, out_indices=()), 'expected some of the maps'),
        (dict(model_name=LITE, out_indices=(2,), frozen_stages=3), 'frozen_stages=3'),
        (dict(model_name=LITE, out_indices=(4, 2)), 'in ascending order'),
        (dict(model_name=LITE, out_indices=(2, 2)), 'in ascending order'),
        (dict(model_name=LITE, out_indices=4, frozen_stages=9), 'out_indices=4, frozen_stages=9'),
        (dict(model_name=LITE, frozen_stages='1'), "frozen_stages='1'"),
        (dict(model_name=LITE, no_such_argument=1), 'no_such_argument'),
        (dict(model_name=LITE, act_layer='nosuch'), 'cannot build'),
        (dict(model_name=LITE, checkpoint_path='a.pth'), 'takes no checkpoint_path: init_cfg'),
        (dict(model_name=5), 'timm has no 5'),
        (dict(model_name='hrnet_w18_small', frozen_stages=1), 'cannot be frozen'),
    ],
)
def test_mistakes(arguments, words):
    with pytest.raises(UserError, match=words):
        TimmFeatures(**arguments)


def test_insertion_leaves_the_frozen_stages_out():
    from cbam_mmdet.apis.insert import _trained_places

    names = _trained_places(TimmFeatures(LITE, frozen_stages=1))
    assert names[0] == 'timm_model.blocks.2.0.bn3'
    assert names[-1] == 'timm_model.blocks.6.0.bn3'
    assert len(names) == 13
    assert all('*' in pattern for pattern in _trained_places(TimmFeatures(LITE)))
    with pytest.raises(UserError, match='every stage is frozen'):
        _trained_places(TimmFeatures(LITE, frozen_stages=4))

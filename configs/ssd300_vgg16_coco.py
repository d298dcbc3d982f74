"""The plain twin of ssd300_vgg16_cbam_coco.py: MMDetection's own SSD300, VGG-16, COCO."""

_base_ = 'mmdet::ssd/ssd300_coco.py'

custom_imports = dict(imports=['cbam_mmdet', 'cbam_mmdet.compat.ssd_head'])

# COCO's own twelve figures; MMDetection's default prints recalls at 100, 300 and 1000 detections.
val_evaluator = dict(proposal_nums=(1, 10, 100))
test_evaluator = val_evaluator

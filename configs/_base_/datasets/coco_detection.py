"""What the configs with COCO's metric add to MMDetection's: COCO's own twelve figures, by a fast evaluation."""

# MMDetection's default prints the recalls at 100, 300 and 1000 detections.
proposal_nums = (1, 10, 100)

# The arguments and figures are those of MMDetection's CocoMetric. It is evaluated by hotcoco where that is installed.
coco_evaluator = dict(type='cbam_mmdet.HotCocoMetric', proposal_nums=proposal_nums)

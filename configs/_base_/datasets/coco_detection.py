"""What the configs with COCO's metric add to MMDetection's: COCO's own twelve figures."""

# MMDetection's default prints the recalls at 100, 300 and 1000 detections.
proposal_nums = (1, 10, 100)

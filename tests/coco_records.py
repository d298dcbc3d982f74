"""Detections as tools/test.py --out writes them, in the form that pycocotools loads."""

import pickle


def coco_records(path):
    """COCO's records of the detections in a file."""
    records = []
    for sample in pickle.loads(path.read_bytes()):
        found = sample['pred_instances']
        for (x1, y1, x2, y2), score, label in zip(found['bboxes'], found['scores'], found['labels'], strict=True):
            box = [float(v) for v in (x1, y1, x2 - x1, y2 - y1)]
            records.append(dict(image_id=sample['img_id'], category_id=int(label) + 1, bbox=box, score=float(score)))
    return records

"""TIDE's kinds of errors (Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", ECCV 2020).

In plain loops, with a foreground IoU of 0.5, a background IoU of 0.1, and COCO's AP. Where the paper leaves it open, as
in the authors' tool: localization goes before classification, that before duplicate. Of all false detections that would
find the same object with their class or box corrected, the one with the highest score finds it.
"""

import numpy as np

KINDS = ('classification', 'localization', 'both', 'duplicate', 'background', 'missed')


def iou(a, b):
    width, height = (max(min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i]), 0) for i in (0, 1))
    return width * height / (a[2] * a[3] + b[2] * b[3] - width * height)


def average_precision(outcomes, count):
    """COCO's AP of (score, whether it finds an object), with so many objects."""
    true = np.cumsum([found for _, found in sorted(outcomes, reverse=True)])
    precision, recall = true / np.arange(1, len(true) + 1), true / max(count, 1)
    return np.mean([max(precision[recall >= threshold], default=0) for threshold in np.linspace(0, 1, 101)])


def tide(objects, detections):
    """The number of errors of each kind, and the gain of the AP at an IoU of 0.5 without them."""
    finds = {}  # detection -> object
    for d in sorted(range(len(detections)), key=lambda d: -detections[d][2]):
        image, label, _, box = detections[d]
        free = [o for o, it in enumerate(objects) if it[:2] == (image, label) and o not in finds.values()]
        best = max(free, key=lambda o: iou(objects[o][2], box), default=None)
        if best is not None and iou(objects[best][2], box) >= 0.5:
            finds[d] = best
    kinds, would_find = {}, {}
    for d in set(range(len(detections))) - finds.keys():
        image, label, _, box = detections[d]
        overlaps = [(iou(it[2], box), o) for o, it in enumerate(objects) if it[0] == image]
        own = max([it for it in overlaps if objects[it[1]][1] == label], default=(0, None))
        other = max([it for it in overlaps if objects[it[1]][1] != label], default=(0, None))
        if 0.1 <= own[0] <= 0.5:
            kinds[d], would_find[d] = 'localization', own[1]
        elif other[0] >= 0.5:
            kinds[d], would_find[d] = 'classification', other[1]
        elif own[0] >= 0.5:
            kinds[d] = 'duplicate'
        else:
            kinds[d] = 'background' if max(own[0], other[0]) <= 0.1 else 'both'
    missed = set(range(len(objects))) - set(finds.values()) - set(would_find.values())

    def mean_ap(mended):
        aps = []
        for label in {it[1] for it in objects}:
            wanted = {o for o, it in enumerate(objects) if it[1] == label}
            outcomes = []
            for d, (_, own, score, _) in enumerate(detections):
                if d in finds or kinds[d] != mended:
                    outcomes += [(score, d in finds)] if own == label else []
                elif would_find.get(d) in wanted - set(finds.values()):
                    rivals = [e for e in would_find if would_find[e] == would_find[d]]
                    outcomes += [(score, True)] if d == max(rivals, key=lambda e: detections[e][2]) else []
            aps.append(average_precision(outcomes, len(wanted - missed if mended == 'missed' else wanted)))
        return np.mean(aps)

    counts = {kind: list(kinds.values()).count(kind) for kind in KINDS} | {'missed': len(missed)}
    return counts, {kind: max(mean_ap(kind) - mean_ap(None), 0) for kind in KINDS}

"""Detect in an image with an exported detector: python run_onnx.py FILE.onnx IMAGE

It needs numpy, opencv-python-headless and onnxruntime, and neither PyTorch nor MMDetection.
"""

import json
import sys

import cv2
import numpy as np
import onnxruntime

file, path = sys.argv[1:]
session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
facts = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}

image = cv2.imread(path)
if image is None:
    sys.exit(f'error: {path} is not an image that OpenCV can read')
height, width = image.shape[:2]
size = facts['scale']  # width and height of the network's input, or the most of both
if size is None:
    sys.exit(f'error: {file} was exported with a test pipeline that does more than resize and pad an image')
if facts['keep_ratio']:
    factor = min(max(size) / max(height, width), min(size) / min(height, width))
    size = [int(width * factor + 0.5), int(height * factor + 0.5)]
resized = cv2.resize(image, size)
if facts['pad_to']:
    beside, below = (max(most - given, 0) for most, given in zip(facts['pad_to'], size, strict=True))
    resized = cv2.copyMakeBorder(resized, 0, below, 0, beside, cv2.BORDER_CONSTANT, value=facts['pad_value'])

fixed = session.get_inputs()[0].shape[1:3]
if any(isinstance(most, int) and most != given for most, given in zip(fixed, resized.shape[:2], strict=True)):
    sys.exit(f'error: {file} takes inputs of {fixed[1]}x{fixed[0]} only, and {path} becomes one of {size[0]}x{size[1]}')
boxes, scores, labels, *_ = (output[0] for output in session.run(None, {'images': resized[None]}))
boxes = boxes / np.tile([size[0] / width, size[1] / height], 2)
for box, score, label in zip(boxes, scores, labels, strict=True):
    if score < 0.3:  # the best come first, and -1 is no detection
        break
    print(facts['classes'][label], round(float(score), 3), *box.round(1))

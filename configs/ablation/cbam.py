"""CBAM in full, the base of the ablations of the paper's tables 1 to 3 (arXiv:1807.06521, section 4.1).

Table 2, last row: channel + spatial (avg & max, k=7). Table 3, row 2: channel + spatial.

The paper's figures are of ImageNet classification; these configs ask the same of a detector. Each differs from this one
in one line, the arguments of the detector's CBAM. The detector is the demo's, on the built-in shapes. Any other config
whose backbone has CBAM as its first plugin can take its place: `tools/ablate.py --base CONFIG`, or the environment
variable ABLATION_BASE, an absolute path or 'cbam_mmdet::NAME.py'.
"""

_base_ = '{{$ABLATION_BASE:../demo/faster_rcnn_cbam.py}}'

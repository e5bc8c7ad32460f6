"""Metrics of dense prediction as pure functions: each validates its input, then *updates* or *computes*.

An update turns one image (or a stack of them) into totals that add up; a compute turns totals into numbers.
How images are combined is part of a metric's definition, and differs between tasks; each module says how.

Tensors may be on any device and are computed there. Where no pixel is valid the result is nan, not an error.
"""

from upbench._lazy import lazily

__getattr__, __dir__ = lazily(
    __name__,
    {
        "upbench.metrics._common": "NAN",
        "upbench.metrics.segmentation": (
            "confusion_matrix areas iou mean_iou pixel_accuracy boundary_areas DILATION_RATIO"
        ),
        "upbench.metrics.depth": (
            "depth_metrics depth_discontinuities mean_over_images DEPTH_JUMP DEPTH_BAND_RATIO MIN_DEPTH"
        ),
        "upbench.metrics.normals": (
            "AngleTotals angular_error angle_totals angle_metrics angle_name ANGLE_THRESHOLDS"
        ),
    },
)

"""Metrics of dense prediction as pure functions: each validates its input, then *updates* or *computes*.

An update turns one image (or a stack of them) into totals that add up; a compute turns totals into numbers.
How images are combined is part of a metric's definition, and differs between tasks; each module says how.

Tensors may be on any device and are computed there. Where no pixel is valid the result is nan, not an error.

To validate is to wait for the device. Evaluators use what each module has for whole batches instead
(`label_counts`, `depth_values`, `angle_totals_of_images`), which gives the same numbers, image by image, and
says along with them whether something was wrong. They import it from its module: what a number depends on is
then seen from imports.
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

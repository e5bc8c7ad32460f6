"""Datasets, one module each; found by the registry. `upbench.contracts.dataset` is what they keep to.

What a dataset of your own reads its files with, each bad file named in one line:

    from upbench.datasets import content_fingerprint, image_size, list_folder, read_array, read_bytes
    from upbench.datasets import read_image, read_labels, read_text, read_values

and, for label maps in files of their own, a class to begin with:

    from upbench.datasets import ImageFiles, PairedDataset
"""

from upbench._lazy import lazily

__getattr__, __dir__ = lazily(
    __name__,
    {
        "upbench.datasets._content": "content_fingerprint",
        "upbench.datasets._arrays": "read_array",
        "upbench.datasets._files": "image_size list_folder read_bytes read_image read_labels read_text "
        "read_values",
        "upbench.datasets._paired": "ImageFiles PairedDataset",
    },
)

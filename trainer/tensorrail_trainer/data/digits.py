"""scikit-learn's handwritten digits: real data that need no download."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from tensorrail_trainer.data.splits import Dataset, InMemory


def digits(seed: int, test_fraction: float = 0.4, size: int = 32) -> Dataset:
    """Return scikit-learn's 1,797 handwritten digits, standardized by the mean and deviation of the training split.

    Args:
        seed: the seed of the split.
        test_fraction: the share of the images in the test split; default 0.4.
        size: the images are resized from 8×8 to size×size; default 32.

    Returns:
        Images (N, 1, size, size) and 10 classes; both splits have the same shares of the classes.

    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    train, test = train_test_split(np.arange(len(raw.target)), test_size=test_fraction, random_state=seed, stratify=raw.target)
    images = torch.from_numpy(raw.images).float().unsqueeze(1) / 16
    images = F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
    mean, deviation = images[train].mean(), images[train].std()
    images = (images - mean) / deviation
    labels = torch.from_numpy(raw.target).long()
    source = f"scikit-learn load_digits, resized to {size}×{size}; {len(train)} training and {len(test)} test images"
    return Dataset(source, 10, InMemory(images[train], labels[train]), InMemory(images[test], labels[test]))

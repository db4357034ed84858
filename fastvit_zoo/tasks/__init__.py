"""Dense tasks on the backbone: segmentation, detection and hands, each on full data or on scenes made from digits."""

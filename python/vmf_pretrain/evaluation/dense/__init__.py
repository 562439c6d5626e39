"""Classes of pixels from frozen features of patches: k-NN and linear segmentation of a folder of images and masks."""

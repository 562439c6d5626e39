"""Objects of a first frame followed through a video by the likeness of patches; and how well that, or anything, does it."""

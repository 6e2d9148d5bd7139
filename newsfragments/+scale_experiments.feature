``dials.diffuse_merge``: Puts stills and sweeps on one scale by the ratio of their counts in common voxels (``scale_experiments``).

"""From images to voxel observations.

``extract`` cuts the images into blocks (a still, or a narrow range of rotation), runs
the pixel loop of the C++ extension over each block, and sorts the sums of all blocks by
voxel into one table on disk.
"""

from __future__ import annotations

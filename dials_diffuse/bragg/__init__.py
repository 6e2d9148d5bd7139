"""Where Bragg peaks are: what extraction leaves out of the diffuse scattering.

``spots`` finds strong peaks in a sample of the images, ``ellipsoid`` fits the region about
the reciprocal lattice points that they cover, ``shoeboxes`` makes rectangles about the
reflections of each image, ``statistical`` finds voxels that stand out of their
neighbours. ``centring`` tells lattice points without reflections, ``lattices`` the crystals
that share an image.
"""

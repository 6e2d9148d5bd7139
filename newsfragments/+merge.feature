``dials.diffuse_merge``: Voxel observations are merged by Laue symmetry into a NeXus map, with half-maps, CC1/2, completeness and a picture of the central layers.

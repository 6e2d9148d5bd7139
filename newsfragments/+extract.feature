``dials.diffuse_extract``: Images of stills and rotation data are extracted to observations of voxels in reciprocal space, with warnings of crystals or stills that do not go together.

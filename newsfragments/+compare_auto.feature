``dials.diffuse_process``: The comparison with the truth of a simulation leaves out the voxels that ``bragg.exclusion=auto`` cuts; ``extracted.refl`` has the regions that were fitted.

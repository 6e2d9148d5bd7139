``dials.diffuse_scale`` warns if an offset takes most of the photons above the background, and says which correlation is the lowest where ``min_cc`` leaves out nothing.

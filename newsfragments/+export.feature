``dials.diffuse_export``: Maps are exported as CCP4/MRC maps for viewers of electron density, and as numpy archives.

``dials.diffuse_export``: The pixels of an image are exported with their scattering vectors, Miller indices, photons and normalisation as numpy archive or CSV (``format=pixels``).

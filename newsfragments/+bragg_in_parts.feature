``dials.diffuse_extract``: ``bragg.refl`` is written part by part, so that memory does not grow with the number of Bragg peaks.

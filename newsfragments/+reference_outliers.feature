``dials.diffuse_scale``: a reference map takes part in outlier rejection and in the error model, with its own errors, so that a single new still can be judged by an old map.

``dials.diffuse_process``: with ``truth=truth.h5`` the map of simulated images is compared with the truth.

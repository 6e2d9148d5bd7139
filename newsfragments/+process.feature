``dials.diffuse_process``: Takes images of stills or rotation data, tells which by their headers, runs DIALS' programs and ours to a merged map, and writes a summary as JSON and as one HTML page.

"""The background of diffraction images, and what to take off their pixels.

Expected photons of the background in a pixel of one image:

    b(x, y) = rate_scale · base(x, y) + [ profile(s) + grid(x, y) ] · M(x, y)

``model`` evaluates it; ``images`` makes bases of exposures without the crystal,
``radial`` profiles and ``modal`` grids of the images themselves.
"""

from __future__ import annotations

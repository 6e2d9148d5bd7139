"""From images to a merged map: DIALS' own programs, then our stages.

``mode`` tells stills from rotation data, ``settings`` holds the choices of the user,
``stages`` lists what is run with which arguments, ``programs`` runs a program of DIALS,
``summary`` collects the figures that the files hold, ``page`` puts them on one page.
"""

from __future__ import annotations

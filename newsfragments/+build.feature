Installation: dials_diffuse builds against DIALS 3.12 to 3.30 by ``pip``, by ``scons`` and as a libtbx module.

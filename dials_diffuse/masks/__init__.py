"""Pixel masks in named layers, from the models, the user and the images themselves.

The experiments that share a detector share its mask (``series``). All their images are
read once (``statistics``): each is compared with the level of its own resolution rings
and of the surroundings of every pixel, so neither the scale of an image nor diffuse
features that move in the series matter. Static layers (``static``, ``shadow``) come from
the models, the user's shapes and the mean image; the pixels that are left are judged by
what they did in the series (``dynamic``). ``make`` does it all.
"""

"""Diffraction images of a crystal whose diffuse scattering is known exactly."""

"""Where each pixel and each frame points: directions of pixels, orientation of frames."""

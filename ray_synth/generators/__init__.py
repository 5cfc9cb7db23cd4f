"""What makes images: diffusers, a GAN, fonts, or a plug-in; one protocol, one registry.

In: plan rows. Out: one image per row, the same whatever batch it is in.
"""

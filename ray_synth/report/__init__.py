"""A run directory in, one static page out: what was gained, the images, the meanings, the curves.

The page is a single file that loads nothing from anywhere, so it can be mailed, archived and logged.
"""

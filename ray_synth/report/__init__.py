"""A run directory in, one static page out: what was gained, the images, the meanings, the curves.

The page is one file that loads nothing from anywhere: it can be mailed, archived and logged.
"""

"""Studies: grids of runs that share what they can, each ending in a table, a plot and a page."""

"""Real images: from a folder, table, archive or hub to an index of labelled rows and their bytes."""

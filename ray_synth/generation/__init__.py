"""Plan rows in, images out: a diffusers pipeline in an actor, a Ray Data stream, a Parquet store."""

"""The Ray Serve app: an LLM, a CLIP, and the disambiguation endpoint over both."""

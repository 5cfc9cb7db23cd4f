"""Training on real and synthetic images: dual BatchNorm, the recipe, the feed and the loop.

In: batches of decoded images of both domains. Out: a timm model, its checkpoints and its metrics.
"""

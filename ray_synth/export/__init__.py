"""A run's images out, as a data set with a card, for other tools.

In: an image store. Out: ImageFolder, WebDataset or Hugging Face datasets.
"""

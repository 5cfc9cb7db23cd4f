"""What a run made, for others: its images as a data set, its model as a file, both on a hub.

In: an image store and trained weights. Out: ImageFolder, WebDataset or Hugging Face datasets; ONNX,
torch.export or timm; predictions; repositories with cards.
"""

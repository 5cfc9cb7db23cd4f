"""What a class name means, judged by its images (the paper's label ambiguity resolution).

Class names and images go in; one meaning phrase per class comes out. Nothing here imports Ray.
"""

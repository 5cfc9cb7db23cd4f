"""What the image generator is asked for (the paper's contextual and stylised diversification).

Class names with their meanings go in; prompts, and the plan of every image to make, come out.
"""

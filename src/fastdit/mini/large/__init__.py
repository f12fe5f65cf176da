"""The larger embedded model: pictures of 512 x 512 pixels over 1,024 tokens, whose prompts leave most of them open.

The recipe is in the repository's benchmarks/training/large.
"""

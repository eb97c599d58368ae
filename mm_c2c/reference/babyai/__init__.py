"""A policy with action tokens on BabyAI levels (arXiv:1810.08272), and questions about its intent.

Levels and demonstrations need `pip install "mm-c2c[robot]"`; the trained policy itself does not.
"""

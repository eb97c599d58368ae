"""A policy of the pi0 class for six tasks of Meta-World, its demonstrations and its questions."""

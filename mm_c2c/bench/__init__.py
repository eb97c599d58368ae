"""Speed as ratios inside one run, beside a plain form of the paper's projector."""
